"""Shows whether stock vLLM lets one adapter's overflow reach base model requests that come after it.

Usage: .venv/bin/python bench/stock_overflow.py       (about a minute; needs the project's test helpers)
"""

from __future__ import annotations

import random
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.models import make_model
from support.overflow import OVERFLOWING
from support.reference import Reference

ROUNDS = 12
LENGTHS = (5, 20, 33, 70)


def main() -> int:
    """Asks base prompts before and after prompts under the adapter, one kind at a time; prints how many were wrong."""
    from vllm import LLM, SamplingParams
    from vllm.lora.request import LoRARequest

    draw = random.Random(0)
    greedy = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
    with tempfile.TemporaryDirectory() as folder:
        model = make_model(Path(folder) / "model", seed=1)
        adapter = LoRARequest("large", 1, str(OVERFLOWING["everywhere"](Path(folder) / "large", model)))
        reference = Reference(model)
        llm = LLM(
            str(model),
            skip_tokenizer_init=True,
            dtype="float32",
            enable_lora=True,
            max_loras=2,  # the second slot stays empty: vLLM's CPU path takes "no adapter" for the last one
            kv_cache_memory_bytes=2 << 20,
            block_size=32,
            enforce_eager=True,
            max_model_len=512,
        )

        def answers(lengths: list[int], lora: LoRARequest | None = None) -> tuple[list[list[int]], list[list[int]]]:
            prompts = [[draw.randrange(3, 512) for _ in range(length)] for length in lengths]
            asked = [{"prompt_token_ids": prompt} for prompt in prompts]
            outputs = llm.generate(asked, greedy, lora_request=lora, use_tqdm=False)
            return prompts, [list(output.outputs[0].token_ids) for output in outputs]

        def wrong(lengths: list[int]) -> int:
            return sum(got != reference.greedy(prompt, 10) for prompt, got in zip(*answers(lengths), strict=True))

        before = wrong([*LENGTHS] * 4)
        after = 0
        for _ in range(ROUNDS):
            answers([40] * 4, adapter)
            after += wrong(draw.choices(LENGTHS, k=8))
    print(f"wrong base model answers: {before} of 16 before, {after} of {8 * ROUNDS} after requests under the adapter")
    return 0


if __name__ == "__main__":
    sys.exit(main())
