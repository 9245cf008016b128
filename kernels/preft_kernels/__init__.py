"""Kernels of adapted prefill: one file per operation, each with its reference and shape contract."""
