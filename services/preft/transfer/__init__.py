"""Moves prompts' KV from a prefill to a decode worker: staging memory, handles, transports, the connector."""
