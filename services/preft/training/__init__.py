"""How to train adapters that are served here: docs/training.md. Needs the extra `train`."""

from preft.training.loop import fit
from preft.training.prefill_only import collate, generate, preft_loss
from preft.training.reft import ReftModel

__all__ = ["ReftModel", "collate", "fit", "generate", "preft_loss"]
