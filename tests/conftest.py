"""Ctrl-C as a terminal has it: a shell's background job ignores SIGINT, and so would every process that tests start."""

from __future__ import annotations

import signal

if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
