"""The shared vocabulary: requests, adapters, workers, settings and errors. Standard library and pydantic only."""
