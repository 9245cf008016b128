"""Adapters on disk and in host memory: their content, their checks against the base model, and their versions."""
