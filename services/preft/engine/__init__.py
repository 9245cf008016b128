"""The vLLM engine behind each worker: how it is started, fed and extended. The only package (with the KV connector) that imports vllm."""
