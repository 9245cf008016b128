"""The formats of adapters on disk, and the checks against the base model, without torch."""
