"""Adapters on disk: what they hold, whether they fit the base model, which version a name points to."""
