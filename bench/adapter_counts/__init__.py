"""Tokens per second over the number of adapters: PreFT Serve beside vLLM, in turns."""
