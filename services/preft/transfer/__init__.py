"""Moves a prompt's KV from a prefill worker to a decode worker: handles, transports, the connector."""
