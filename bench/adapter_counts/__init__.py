"""Tokens per second over the number of adapters: PreFT Serve beside vLLM, all servers up at once, in turns."""
