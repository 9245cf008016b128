"""Reports: figures from records, and their tables, files and plots."""
