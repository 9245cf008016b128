"""Decode workers: continue from a prompt's KV cache and the tokens so far, without adapters."""
