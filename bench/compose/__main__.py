"""`make test-compose`: docker-compose.yml in real containers, every demo question, and faults under load.

Exit status 0 only if no answer is wrong, and no request failed but the killed gateway's own connections.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from bench.chaos.load import AnswerFailed, Load, make_cases
from bench.compose.engine import Engine
from bench.compose.faults import FAULTS, Fault
from bench.compose.locks import Locks, make_locks
from bench.compose.stack import MONITORS, Stack, compose_file
from demo import ask_all, questions, score, verdict
from preft.core.errors import PreftError
from preft_loadgen.errors import LoadgenError
from preft_loadgen.table import table
from preft_loadgen.transport.http import HttpClient
from preft_loadgen.transport.server import served_models

CLIENTS = 8
STEADY_SECONDS = 5.0  # of load before a fault, and after it
IDLE_SECONDS = 30.0  # for everything to be given back, once no request runs
SCRAPED_SECONDS = 120.0
VOCABULARY = 952
KEYS = ("sent", "failed", "cut", "wrong", "duplicated", "missing")


async def ask_demo(stack: Stack, url: str, known: dict[tuple[str, str], str]) -> str | None:
    """Asks every demo question; returns the first failure. `known` gets the answers, and all gateways must agree."""
    client = stack.client(url, timeout=300.0)
    base, adapters = await served_models(client)
    asked = questions(base, adapters)
    pairs = list(zip(asked, await ask_all(client, asked), strict=True))
    scores = [score(adapter, pairs) for adapter in adapters]
    right, facts = sum(one.right for one in scores), sum(one.facts for one in scores)
    differ = sum(known.setdefault((one.model, one.text), answer) != answer for one, answer in pairs)
    print(f"{url}: {len(pairs)} answers, {right} of {facts} facts right, {differ} differ from an earlier answer")
    return verdict(scores, len(adapters)) or (f"{differ} answers differ from those before" if differ else None)


async def run_fault(stack: Stack, load: Load, fault: Fault) -> dict[str, Any]:
    """Counts of one fault, the seconds from its begin until all workers are ready, and what isn't given back."""
    load.start(CLIENTS)
    await asyncio.sleep(STEADY_SECONDS)
    began = time.monotonic()
    try:
        await fault.act(stack, load)
        await stack.wait_whole(load.urls[0])
        recovery = time.monotonic() - began
        await asyncio.sleep(STEADY_SECONDS)
    finally:
        counts = await load.stop()
    end = time.monotonic() + IDLE_SECONDS
    while (left := await stack.leftovers(load.urls[0])) and time.monotonic() < end:
        await asyncio.sleep(0.5)
    return {**counts.as_json(), "recovery_s": round(recovery, 1), "left": left}


def problem_of(fault: Fault, figures: dict[str, Any]) -> str | None:
    """What went wrong, in one sentence."""
    bad = [f"{figures[key]} {key}" for key in KEYS[1:] if figures[key] and not (key == "cut" and fault.may_cut)]
    if figures["left"]:
        bad.append(f"not given back: {figures['left']}")
    return f"{fault.name}: {', '.join(bad)} {figures['errors'][:2]}" if bad else None


def figures_table(results: dict[str, dict[str, Any]]) -> str:
    """One line per fault."""
    head = ["", *KEYS, "recovery s"]
    rows = [[name, *(str(one[key]) for key in KEYS), f"{one['recovery_s']:.1f}"] for name, one in results.items()]
    return table([head, *rows], right=range(1, len(head)))


async def check_scraped(stack: Stack) -> str | None:
    """Waits until Prometheus has the metrics of all gateways."""
    client = HttpClient(stack.url(stack.containers("prometheus")[0], 9090))
    want = len(stack.gateways()) + 1  # and that of `preft serve`
    end = time.monotonic() + SCRAPED_SECONDS
    up = 0
    while time.monotonic() < end:
        answer = await client.get_json("/api/v1/query?query=up")
        up = sum(one["value"][1] == "1" for one in answer["data"]["result"])
        if up == want:
            print(f"Prometheus has the metrics of {up} gateways")
            return None
        await asyncio.sleep(1.0)
    return f"Prometheus has the metrics of {up} gateways, not of {want}"


async def prove(stack: Stack, faults: Sequence[Fault]) -> list[str]:
    """Asks and breaks the running containers; returns all problems."""
    known: dict[tuple[str, str], str] = {}
    urls = stack.gateways()
    for url in urls:
        print(f"{url} sees all workers after {await stack.wait_whole(url):.0f} s", flush=True)
    problems = [await ask_demo(stack, url, known) for url in urls]
    if "prometheus" in stack.services:
        problems.append(await check_scraped(stack))
    base, adapters = await served_models(stack.client(urls[0]))
    load = Load(urls, make_cases([base, *adapters], VOCABULARY, 0), key=stack.locks.key)
    await load.learn()
    results: dict[str, dict[str, Any]] = {}
    for fault in faults:
        results[fault.name] = figures = await run_fault(stack, load, fault)
        problems.append(problem_of(fault, figures))
        print(f"{fault.name}: {figures}", flush=True)
    problems += [await ask_demo(stack, url, known) for url in stack.gateways()]
    print(f"\n{figures_table(results)}\n")
    return [one for one in problems if one is not None]


def run(args: argparse.Namespace, faults: Sequence[Fault], locks: Locks) -> list[str]:
    """Builds the images, brings the containers up, and breaks them; returns all problems."""
    services = compose_file()["services"]
    engine = Engine.find(args.engine)
    print("building the images (minutes, at the first time)", flush=True)
    # Prometheus' file names no key: with keys, it would get no metrics.
    third = {name: services[name]["image"] for name in ("redis", *(() if args.locked else MONITORS))}
    missing = engine.make_images(third)
    if missing:
        print(f"left out, because there is no image: {', '.join(missing)}", flush=True)
    stack = Stack(engine, [*missing, *(MONITORS if args.locked else ())], locks)
    try:
        stack.down()
        stack.up()
        problems = asyncio.run(prove(stack, faults))
        if problems:
            print(stack.logs())
        return problems
    except (PreftError, LoadgenError, AnswerFailed):
        print(stack.logs())
        raise
    finally:
        if not args.keep:
            stack.down()


def main() -> int:
    parser = argparse.ArgumentParser(prog="make test-compose", description=__doc__)
    parser.add_argument("--engine", choices=("docker", "podman"), help="default: Docker if it answers, else podman")
    parser.add_argument("--only", action="append", metavar="TEXT", help="faults whose names hold it; repeatable")
    parser.add_argument("--locked", action="store_true", help="mTLS between the processes, and API keys")
    parser.add_argument("--keep", action="store_true", help="leave the containers as they are")
    args = parser.parse_args()
    faults = [fault for fault in FAULTS if not args.only or any(text in fault.name for text in args.only)]
    with TemporaryDirectory(ignore_cleanup_errors=True) as folder:  # the containers own a part of it
        try:
            problems = run(args, faults, make_locks(Path(folder)) if args.locked else Locks())
        except (PreftError, LoadgenError, AnswerFailed) as error:
            problems = [str(error)]
    for problem in problems:
        print(f"test-compose: {problem}", file=sys.stderr)
    print("FAILED" if problems else "passed: no answer was wrong, and no request failed")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
