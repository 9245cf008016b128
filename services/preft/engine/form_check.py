"""Tries to compile forms of output in a process of its own, before an engine compiles them.

A few regular expressions that must all match, in 60 characters of JSON Schema, can take the compiler minutes or
gigabytes, and it can't be interrupted. Here the process is killed, and the form refused. The process imports llguidance
alone and starts with the first form.
"""

from __future__ import annotations

import json
import resource
import select
import subprocess
import sys
import threading
from typing import Any

import llguidance

# A form that needs more fails: no form that compiled within these limits took more than 0.2 s, or 10 ms per step.
LIMITS: dict[str, Any] = {
    "initial_lexer_fuel": 200_000,
    "step_lexer_fuel": 50_000,
    "step_max_items": 5_000,
    "max_items_in_row": 400,
    "max_lexer_states": 20_000,
    "max_grammar_size": 50_000,
    "verbose_errors": False,
}
STACK = 256 << 20  # bytes, which are only reserved: the compiler recurses once per rule of a chain
SECONDS = 5.0  # for one form
START_SECONDS = 60.0
MEMORY = 1 << 30  # bytes of address space, for stack and tokenizer too
TOO_COMPLEX = "it is too complex to be compiled"


class FormCheck:
    """Checks forms one at a time. `close` ends the process. Not for several threads."""

    def __init__(self, tokenizer: str, vocab_size: int, eos: int) -> None:
        """`tokenizer` is a tokenizer.json."""
        self._setup = {"tokenizer": tokenizer, "vocab_size": vocab_size, "eos": eos}
        self._process: subprocess.Popen[bytes] | None = None

    def problem(self, source: str) -> str:
        """Why no engine should compile `source`, llguidance's own kind of text; "" if nothing is wrong with it."""
        if self._process is None:
            command = [sys.executable, "-m", __name__]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            if (problem := self._answer(self._setup, START_SECONDS)) != "":
                self.close()
                return "this model's tokenizer can't be used" if problem is None else problem
        problem = self._answer(source, SECONDS)
        if problem is None:
            self.close()
            return TOO_COMPLEX
        return problem

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _answer(self, question: Any, seconds: float) -> str | None:
        """None if the process ends or takes longer."""
        assert self._process is not None
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            return None
        answered = select.poll()  # select() takes no file descriptor above 1023, and a busy server has those
        answered.register(self._process.stdout, select.POLLIN)
        if not answered.poll(1000 * seconds):
            return None
        line = self._process.stdout.readline()
        return str(json.loads(line)) if line else None


def reason(matcher: llguidance.LLMatcher) -> str:
    """Why the matcher is in its error state, in one line; never empty."""
    text = " ".join(str(matcher.get_error()).partition("<non-verbose/>")[0].split())[:400]
    return "no further token fits" if text in ("", "NoExtensionBias") else text


def compiled(tokenizer: llguidance.LLTokenizer, source: str) -> llguidance.LLMatcher:
    return llguidance.LLMatcher(tokenizer, source, log_level=0, limits=llguidance.LLParserLimits(**LIMITS))


def _serve() -> None:
    setup = json.loads(sys.stdin.readline())
    try:
        tokenizer = llguidance.LLTokenizer(setup["tokenizer"], n_vocab=setup["vocab_size"], eos_token=setup["eos"])
    except ValueError as error:
        print(json.dumps(f"this model's tokenizer can't be used: {error}"), flush=True)
        return
    print(json.dumps(""), flush=True)
    for line in sys.stdin:
        matcher = compiled(tokenizer, json.loads(line))
        mask = b"" if matcher.is_error() else matcher.compute_bitmask()
        problem = reason(matcher) if matcher.is_error() else "" if any(mask) else "no token begins such an output"
        print(json.dumps(problem), flush=True)


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    threading.stack_size(STACK)
    threading.Thread(target=_serve).start()
