"""Moves a prompt's KV from a prefill worker to a decode worker: staging memory, handles, transports, the connector."""
