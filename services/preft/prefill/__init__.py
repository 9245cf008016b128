"""Prefill workers: the adapter is applied here, to the prompt, and nowhere after."""
