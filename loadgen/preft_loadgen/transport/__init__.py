"""Ways to a server: OpenAI-style HTTP, and PreFT's gRPC. One request in, one answer with arrival times out."""
