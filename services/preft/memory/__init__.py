"""Shared host memory: a worker process writes bytes that its engine process reads, and back."""
