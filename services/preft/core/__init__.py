"""The shared vocabulary: requests, adapters, workers, settings and errors. Imports only the standard library and pydantic."""
