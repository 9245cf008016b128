"""The container engine: Docker, or podman with podman-compose. Owns the commands of both, and the images."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from preft.core.errors import PreftError

ROOT = Path(__file__).parents[2]
FILES = Path(__file__).parent / "images"
IMAGE = "preft-serve:cpu"
NETWORK_IMAGE = "preft-serve-network-faults"
BUILD_SECONDS, COMMAND_SECONDS = 3600.0, 300.0


@dataclass(frozen=True, slots=True)
class Engine:
    """`program` is docker or podman, `compose` the beginning of a compose command."""

    program: str
    compose: tuple[str, ...]

    @classmethod
    def find(cls, name: str | None) -> Engine:
        """The engine that `name` names, else the first one that answers. Raises PreftError."""
        known = {"docker": ("docker", "compose"), "podman": ("podman-compose", "--in-pod", "false")}
        for program in known if name is None else [name]:
            compose = known.get(program, ("",))
            if shutil.which(program) and shutil.which(compose[0]):
                answer = subprocess.run([program, "info"], capture_output=True, check=False)
                if answer.returncode == 0:
                    return cls(program, compose)
        raise PreftError("neither Docker (with `docker compose`) nor podman (with podman-compose) answers here")

    def run(
        self,
        *arguments: str,
        environ: Mapping[str, str] | None = None,
        seconds: float = COMMAND_SECONDS,
        command: Sequence[str] | None = None,
    ) -> str:
        """What the engine prints. Raises PreftError if it fails."""
        words = [*(command or [self.program]), *arguments]
        done = subprocess.run(
            words, cwd=ROOT, env=environ, capture_output=True, text=True, timeout=seconds, check=False
        )
        if done.returncode != 0:
            raise PreftError(f"`{shlex.join(words)[:200]}` failed:\n{(done.stderr or done.stdout)[-2000:]}")
        return done.stdout.strip()

    def build(self, tag: str, dockerfile: Path, context: Path) -> None:
        """Builds an image. Machines behind a proxy or a mirror give their flags in CONTAINER_BUILD_ARGS."""
        flags = shlex.split(os.environ.get("CONTAINER_BUILD_ARGS", ""))
        self.run("build", *flags, "-f", str(dockerfile), "-t", tag, str(context), seconds=BUILD_SECONDS)

    def has_image(self, name: str) -> bool:
        """Whether the image is here, or can be pulled."""
        for command in ("inspect", "pull"):
            try:
                self.run("image", command, name)
            except (PreftError, subprocess.TimeoutExpired):
                continue
            return True
        return False

    def make_images(self, images: Mapping[str, str]) -> list[str]:
        """Builds the project's own image, and gets `images`, by service; returns the services without one.

        A stand-in is built where no registry is reached.
        """
        self.build(IMAGE, ROOT / "deploy" / "docker" / "cpu.Dockerfile", ROOT)
        self.build(NETWORK_IMAGE, FILES / "network.Dockerfile", FILES)
        missing = []
        for service, image in images.items():
            stand_in = FILES / f"{service}.Dockerfile"
            if self.has_image(image):
                continue
            if stand_in.exists():
                print(f"{image} can't be pulled: a stand-in is built from Debian's packages", flush=True)
                self.build(image, stand_in, FILES)
            else:
                missing.append(service)
        return missing
