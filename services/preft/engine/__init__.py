"""The vLLM engine behind each worker: its start, its requests, and PreFT's extensions of vLLM."""
