"""Adapters outside of the server: folders, remote places, uploads, and who may name them."""
