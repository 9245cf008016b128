"""PreFT Serve: prefill-only finetuned adapters on disaggregated vLLM."""

import os

__version__ = "0.1.0"

# gRPC reads this at import. Its handlers for forks stop gRPC's threads at each start of a child process, and now and
# then for good. No child process of PreFT Serve uses the gRPC of its parent.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
