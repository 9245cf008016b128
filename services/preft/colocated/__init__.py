"""Colocated workers: one engine runs the prompt under its adapter and the output without, nothing is transferred."""
