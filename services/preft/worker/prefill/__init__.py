"""Prefill workers: run prompts with their adapters. No later step uses an adapter."""
