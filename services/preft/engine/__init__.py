"""The vLLM engine behind each worker: how it is started, fed and extended."""
