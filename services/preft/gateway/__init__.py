"""The front door: OpenAI-compatible HTTP and the public gRPC API over the Generator and AdapterCatalog ports.

Text exists only here: tokenizing, chat templates, detokenizing, stop strings and the wire formats. Workers speak token
ids. Nothing in this package knows workers, KV caches or engines.
"""
