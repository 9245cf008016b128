"""The one rule of retries: which gateway is asked next, and when. Does no input or output.

A failed attempt is repeated while nothing of its answer has reached the caller, and only if a repetition can't do
something twice. The next attempt asks another gateway at once. Once all gateways have failed, the call waits.
"""

from __future__ import annotations

import random
import time

from preft_client.errors import (
    ConnectionFailed,
    DeadlineExceeded,
    PreftError,
    QueueFull,
    RateLimited,
    Unavailable,
)

FIRST_WAIT, LONGEST_WAIT = 0.25, 8.0  # seconds, without the server's own word


class Attempts:
    """The attempts of one call. `target` is the number of the gateway to ask now; times are `time.monotonic()`'s."""

    def __init__(self, targets: int, first: int, retries: int, timeout: float, *, repeatable: bool) -> None:
        """`retries` further rounds over all `targets`. `repeatable`: doing the call twice is as good as once."""
        self.target = first
        self.deadline = time.monotonic() + timeout
        self._targets = targets
        self._timeout = timeout
        self._rounds_left = retries
        self._rounds = 0
        self._untried = targets - 1
        self._repeatable = repeatable

    def seconds_left(self) -> float:
        """Raises DeadlineExceeded if there are none."""
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise DeadlineExceeded(f"there was no whole answer within {self._timeout:g} seconds")
        return left

    def failed(self, error: PreftError) -> float:
        """The seconds to wait before the next attempt. Raises `error` if there is none."""
        if not self._may_repeat(error):
            raise error
        waits_here = isinstance(error, RateLimited)  # all gateways count together
        if self._untried and not waits_here:
            self._untried -= 1
            self.target = (self.target + 1) % self._targets
            return 0.0
        wait = min(FIRST_WAIT * 2.0**self._rounds, LONGEST_WAIT) * random.uniform(0.5, 1.0)
        wait = max(wait, error.retry_after or 0.0)
        if not self._rounds_left or time.monotonic() + wait >= self.deadline:
            raise error
        self._rounds_left -= 1
        self._rounds += 1
        self._untried = self._targets - 1
        if not waits_here:
            self.target = (self.target + 1) % self._targets
        return wait

    def _may_repeat(self, error: PreftError) -> bool:
        if isinstance(error, ConnectionFailed):
            return self._repeatable or not error.sent
        if isinstance(error, RateLimited):
            return error.retry_after is not None
        return isinstance(error, QueueFull) or (self._repeatable and isinstance(error, Unavailable))
