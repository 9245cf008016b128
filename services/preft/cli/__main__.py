"""`python -m preft.cli` is `preft`."""

from __future__ import annotations

import sys

from preft.cli import main

if __name__ == "__main__":
    sys.exit(main())
