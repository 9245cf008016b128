"""The gRPC door: the public services Inference and Adapters, and their server."""
