"""The arena's errors. Its callers translate them, as only the callers know what the bytes are.

ArenaError
├── TooLarge      the arena can never hold so many bytes
├── NoRoom        the arena is full, or closed
└── StaleRegion   the region has other bytes now
"""

from __future__ import annotations

from preft.core.errors import PreftError


class ArenaError(PreftError):
    """Root of the arena's errors."""


class TooLarge(ArenaError):
    """The arena is smaller than the region that was asked for."""


class NoRoom(ArenaError):
    """No room became free in time, or the arena was closed."""


class StaleRegion(ArenaError):
    """The region was released, evicted or reused, so its bytes are no longer the requested ones."""
