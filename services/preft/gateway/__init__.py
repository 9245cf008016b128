"""The front door: OpenAI-compatible HTTP and the public gRPC API over the ports Generator and AdapterCatalog.

Text exists only in this package: tokenizing, chat templates, detokenizing, stop strings and wire formats. Workers speak
token ids. The package knows no workers, KV caches or engines.
"""
