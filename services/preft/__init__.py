"""PreFT Serve: prefill-only finetuned adapters on disaggregated vLLM."""

__version__ = "0.1.0"
