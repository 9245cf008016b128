"""Request bodies, strictly checked: the same for HTTP and gRPC, without a model."""
