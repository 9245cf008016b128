"""Converts adapters of other projects to folders that PreFT serves."""
