"""Colocated workers: one engine runs the prompt with its adapter and the output without it. No KV is transferred."""
