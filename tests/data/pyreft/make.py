"""Makes the folders beside it with pyreft itself, and what its interventions answer.

Was run once, in an environment of its own: pyreft 0.1.0 and pyvene 0.1.8 (installed without their dependencies) on
transformers 4.45.1, datasets 3, torch 2.13. `python tests/data/pyreft/make.py`

Each folder is what `ReftModel.save` writes; answers.safetensors has, per intervention, `<number>.before` and
`<number>.after`, [positions, hidden size].
"""

from __future__ import annotations

from pathlib import Path

import pyreft
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).parent
HIDDEN = 16


def main() -> None:
    torch.manual_seed(0)
    make("loreft", pyreft.LoreftIntervention, [(0, "block_output"), (2, "block_output")], rank=4)
    make("direft", pyreft.DireftIntervention, [(1, "model.layers[1].output")], rank=3)
    make("loreft_two_positions", pyreft.LoreftIntervention, [(1, "block_output"), (1, "block_output")], rank=2)
    make("noreft", pyreft.NodireftIntervention, [(0, "block_output")], rank=2, add_bias=True)


def make(name: str, kind: type, places: list[tuple[int, str]], rank: int, **options: object) -> None:
    config = LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=64
    )
    representations = [
        {
            "layer": layer,
            "component": component,
            "low_rank_dimension": rank,
            "intervention": kind(embed_dim=HIDDEN, low_rank_dimension=rank, dtype=torch.float32, **options),
        }
        for layer, component in places
    ]
    model = pyreft.get_reft_model(LlamaForCausalLM(config), pyreft.ReftConfig(representations=representations))
    answers = {}
    for number, intervention in enumerate(model.interventions.values()):
        with torch.no_grad():
            if hasattr(intervention, "rotate_layer"):  # as after some steps of training
                for parameter in intervention.rotate_layer.parameters():
                    parameter.add_((torch.randn_like(parameter) * 0.3).tril(-1))  # the diagonal has no gradient
            before = torch.randn(5, HIDDEN)
            answers |= {f"{number}.before": before, f"{number}.after": intervention(before)}
    model.save(str(HERE / name))
    save_file(answers, HERE / name / "answers.safetensors")


if __name__ == "__main__":
    main()
