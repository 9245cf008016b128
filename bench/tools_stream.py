"""Chats with tools or a JSON schema, streamed, against plain chats on the same gateway: `python -m bench.tools_stream`.

Gateway, router and gRPC are real; `paced_workers` stand in for engines. The sides take turns. Two speeds are compared:
tokens per second of the streams, and tokens per second of the gateway's CPU time, which other processes don't change.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from bench.command import bench_folder
from bench.comparison import Comparison, comparison_table, take_turns, turns
from bench.paced_gateway import paced_gateway
from bench.rig import MODEL_NAME
from bench.saving import RESULTS, save
from preft_loadgen.errors import RequestFailed
from preft_loadgen.report.progress import progress
from preft_loadgen.served import Served
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.reply import Reply

STREAMS, TOKENS, ROUNDS = 64, 400, 5
PARSER = "hermes"
BAR = 0.9
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
SCHEMA = {"type": "object", "properties": {"text": {"type": "string"}}, "required": ["text"]}
TOOLS = {"tools": [{"type": "function", "function": {"name": "note", "parameters": SCHEMA}}]}
NAMED = {"type": "function", "function": {"name": "note"}}
FORMAT = {"type": "json_schema", "json_schema": {"name": "note", "schema": SCHEMA}}
KINDS: dict[str, dict[str, Any]] = {  # the seed chooses the frame of the output
    "JSON schema": {"seed": 1, "response_format": FORMAT},
    "named tool": {"seed": 1, **TOOLS, "tool_choice": NAMED},
    "required tool": {"seed": 2, **TOOLS, "tool_choice": "required"},
}
AUTO = {"seed": 3, **TOOLS}


class Speeds:
    """Measures kinds of chats on one gateway, and keeps the CPU speeds in the order of the calls."""

    def __init__(self, server: Served, streams: int, tokens: int) -> None:
        self._client, self._pid = HttpClient(server.url), server.pid
        self._streams, self._tokens = streams, tokens
        self.by_cpu: dict[str, list[float]] = {}

    def side(self, kind: str, fields: dict[str, Any]) -> Callable[[int], Awaitable[float]]:
        messages = [{"role": "user", "content": "note it"}]
        body = {"model": MODEL_NAME, "messages": messages, "max_tokens": self._tokens, "ignore_eos": True, **fields}

        async def measure(round: int) -> float:
            cpu, started = cpu_seconds(self._pid), time.perf_counter()
            replies = await asyncio.gather(*(self._ask(body, number) for number in range(self._streams)))
            seconds = time.perf_counter() - started
            tokens = sum(reply.tokens for reply in replies)
            if round >= 0:  # earlier rounds warm up
                self.by_cpu.setdefault(kind, []).append(tokens / (cpu_seconds(self._pid) - cpu))
            return tokens / seconds

        return measure

    async def _ask(self, body: dict[str, Any], number: int) -> Reply:
        reply = await self._client.stream("/v1/chat/completions", {**body, "user": f"u{number}"})
        if reply.tokens != self._tokens:
            raise RequestFailed(f"a stream of {self._tokens} tokens had {reply.tokens}")
        return reply


def cpu_seconds(pid: int) -> float:
    """CPU time that the process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / float(os.sysconf("SC_CLK_TCK"))


async def _measure(server: Served, arguments: argparse.Namespace) -> list[Comparison]:
    speeds = Speeds(server, arguments.streams, arguments.tokens)
    kinds: dict[str, dict[str, Any]] = {"plain": {}, **KINDS}
    if arguments.parser:
        kinds[f"auto, {arguments.parser}"] = AUTO
    sides = [speeds.side(kind, fields) for kind, fields in kinds.items()]
    with progress("runs", turns(len(sides), arguments.rounds)) as bar:
        columns = dict(zip(kinds, await take_turns(sides, arguments.rounds, bar.update), strict=True))
    how = f"{arguments.streams} streams of {arguments.tokens} tokens"
    plain, plain_cpu = columns["plain"], tuple(speeds.by_cpu["plain"])
    found = []
    for kind in [kind for kind in kinds if kind != "plain"]:
        found.append(Comparison(kind, "tokens/s", columns[kind], plain, BAR, how))
        by_cpu = tuple(speeds.by_cpu[kind])
        found.append(Comparison(kind, "tokens per CPU second of the gateway", by_cpu, plain_cpu, BAR, how))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 if every kind reaches the bar, 1 otherwise."""
    parser = argparse.ArgumentParser(prog="bench-tools-stream", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--streams", type=int, default=STREAMS, help=f"at once (default: {STREAMS})")
    parser.add_argument("--tokens", type=int, default=TOKENS, help=f"of each stream (default: {TOKENS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"default: {ROUNDS}")
    parser.add_argument("--parser", default=PARSER, help=f"tool_call_parser; '' for none (default: {PARSER})")
    parser.add_argument("--out", type=Path, default=RESULTS)
    arguments = parser.parse_args(argv)
    settings = {"tool_call_parser": arguments.parser} if arguments.parser else {}
    with bench_folder() as folder, paced_gateway(folder, arguments.streams, TEMPLATE, **settings) as server:
        comparisons = asyncio.run(_measure(server, arguments))
    print(comparison_table(comparisons))
    path = save(
        arguments.out, "tools-stream", "bench.tools_stream", argv, {"comparisons": [c.as_json() for c in comparisons]}
    )
    print(f"ours: the named kind; reference: plain chats. All figures are in {path}")
    return 0 if all(comparison.reached for comparison in comparisons) else 1


if __name__ == "__main__":
    sys.exit(main())
