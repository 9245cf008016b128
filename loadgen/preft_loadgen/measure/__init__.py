"""Measurements: sends traffic to servers and records every request."""
