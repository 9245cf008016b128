"""Shared by several test suites: tiny models, adapters made from a seed, and the reference for comparisons."""
