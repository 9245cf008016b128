"""What the benchmarks' commands share: a folder for their files, and one line if they fail."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from preft.core.errors import PreftError
from preft_loadgen.errors import LoadgenError


@contextmanager
def bench_folder() -> Iterator[Path]:
    """A temporary folder. A failure within the context ends the process: one line on stderr, and exit status 1."""
    try:
        with tempfile.TemporaryDirectory(prefix="preft-bench-") as folder:
            yield Path(folder)
    except (PreftError, LoadgenError) as error:
        sys.exit(f"bench: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


def say(message: str) -> None:
    """Prints progress to stderr."""
    print(f"bench: {message}", file=sys.stderr, flush=True)
