"""Adapters of other projects, turned into the folders that are served."""
