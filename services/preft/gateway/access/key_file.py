"""Follows the file of API keys: new content counts within a second or two, broken content doesn't count at all."""

from __future__ import annotations

import asyncio
import logging
import os
from pathlib import Path

from preft.core.errors import ConfigError
from preft.gateway.access.keys import read_keys

logger = logging.getLogger(__name__)

LOOK_SECONDS = 1.0

Stamp = tuple[int, int, int, int] | None


class KeyFile:
    """`keys` are those of the last good content. Call `look` every LOOK_SECONDS."""

    def __init__(self, path: Path) -> None:
        """Reads the file. Raises ConfigError."""
        self.path = path
        self._stamp = _stamp(path)
        self.keys = read_keys(path)

    async def look(self) -> None:
        """Reads the file if it has changed. Keeps the old keys if it is broken or gone, and warns once of it."""
        stamp = await asyncio.to_thread(_stamp, self.path)
        if stamp == self._stamp:
            return
        self._stamp = stamp
        try:
            self.keys = await asyncio.to_thread(read_keys, self.path)
        except ConfigError as error:
            logger.warning("the API keys stay as they were: %s", error)
        else:
            logger.info("%s has %d API keys now", self.path, len(self.keys))


def _stamp(path: Path) -> Stamp:
    """Changes with each new content; None while there is no file. Links are followed: Kubernetes replaces a link."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
