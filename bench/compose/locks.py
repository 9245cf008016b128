"""What `--locked` adds to the cluster: mTLS between its processes, with an authority of its own, and API keys.

The commands are those that the docs give to operators.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from bench.compose.engine import ROOT
from preft.core.errors import PreftError

SETTINGS = ROOT / "deploy" / "docker" / "cpu.yaml"
NEW_KEY = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
AUTHORITY = f"req -x509 {NEW_KEY} -days 2 -subj /CN=test -keyout ca.key -out ca.pem"
REQUEST = f"req {NEW_KEY} -subj /CN=preft -addext subjectAltName=DNS:preft -keyout key.pem -out preft.csr"
SIGNED = "x509 -req -in preft.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 1 -copy_extensions copy -out cert.pem"


@dataclass(frozen=True, slots=True)
class Locks:
    """`environ` are Compose's variables; `key` is an operator's API key. Without locks both are empty."""

    environ: Mapping[str, str] = field(default_factory=dict)
    key: str = ""


def make_locks(folder: Path) -> Locks:
    """Writes certificates, keys and settings under `folder`, readable for the containers' user. Raises PreftError."""
    tls, secrets = folder / "tls", folder / "secrets"
    for part in (folder, tls, secrets):
        part.mkdir(exist_ok=True)
        part.chmod(0o755)
    for command in (AUTHORITY, REQUEST, SIGNED):
        _run("openssl", *command.split(), cwd=tls)
    (tls / "ca.key").unlink()
    (tls / "key.pem").chmod(0o644)
    made = _run(sys.executable, "-m", "preft.cli", "key", "operator", "--admin", cwd=folder)
    (secrets / "api_keys.yaml").write_text(made.stdout)
    settings = folder / "cluster.yaml"
    settings.write_text(with_tls(SETTINGS.read_text()))
    named = {
        "TLS_DIR": str(tls),
        "SECRETS_DIR": str(secrets),
        "CPU_SETTINGS": str(settings),
        "API_KEYS": "/run/preft/api_keys.yaml",
    }
    return Locks(named, made.stderr.split()[-1])


def with_tls(settings: str) -> str:
    """The settings file as docs/deployment.md tells: without its line `insecure`, and with the line `tls`."""
    kept = [line for line in settings.splitlines() if not line.startswith("insecure:")]
    changed = "\n".join(line.removeprefix("# ") if line.startswith("# tls:") else line for line in kept)
    if "\ntls:" not in changed or len(kept) == len(settings.splitlines()):
        raise PreftError(f"{SETTINGS} has no lines `insecure` and `# tls`")
    return changed + "\n"


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, cwd=cwd, env=os.environ, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise PreftError(f"`{shlex.join(command)}` failed: {done.stderr[-500:]}")
    return done
