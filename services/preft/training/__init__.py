"""Training of adapters that PreFT serves: docs/training.md. Needs the extra `train`. No server imports this package."""

from preft.training.loop import fit
from preft.training.prefill_only import collate, generate, preft_loss
from preft.training.reft import ReftModel

__all__ = ["ReftModel", "collate", "fit", "generate", "preft_loss"]
