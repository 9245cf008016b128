"""The parts without input and output: event streams in any pieces, packed folders, and the rule of retries."""

from __future__ import annotations

import io
import json
import tarfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel

from preft.adapters.formats import digest, folder_texts
from preft.cli.packing import Package as ServersPackage
from preft_client import (
    BadReply,
    ConnectionFailed,
    DeadlineExceeded,
    Delta,
    EngineFailed,
    InvalidAdapter,
    PreftError,
    QueueFull,
    RateLimited,
    ShuttingDown,
    Unavailable,
    packing,
)
from preft_client.attempts import Attempts
from preft_client.forms import read_form
from preft_client.http_calls import HttpWire
from preft_client.parameters import asked_prompt
from preft_client.results import Facts, Joined


def sse(*bodies: Any) -> bytes:
    return b"".join(
        b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n" for body in bodies
    )


def chunk(text: str, ids: list[int], finish: str | None = None) -> dict[str, Any]:
    choice = {
        "index": 0,
        "text": text,
        "logprobs": None,
        "finish_reason": finish,
        "stop_reason": None,
        "token_ids": ids,
    }
    return {"system_fingerprint": "ab", "choices": [choice], "usage": None}


STREAM = b": a comment\n\n" + sse(
    chunk("añ", [1]),
    chunk("\n\ndata: x", [2, 3], "length"),
    {
        "system_fingerprint": "ab",
        "choices": [],
        "usage": {"prompt_tokens": 7, "prompt_tokens_details": {"cached_tokens": 4}},
    },
    b"[DONE]",
)


@pytest.mark.parametrize("size", [1, 2, 3, 7, 64, len(STREAM)])
def test_events_come_in_any_pieces(size: int) -> None:
    facts = Facts()
    decoder = HttpWire().generate(asked_prompt("m", "p", {}), facts).decoder()
    found = [delta for at in range(0, len(STREAM), size) for delta in decoder.feed(STREAM[at : at + size])]
    assert [*found, *decoder.end()] == [Delta("añ", (1,)), Delta("\n\ndata: x", (2, 3), 0, "length")]
    assert facts == Facts(7, 4, "ab")


def test_a_stream_without_its_end_is_broken() -> None:
    decoder = HttpWire().generate(asked_prompt("m", "p", {}), Facts()).decoder()
    decoder.feed(STREAM[:-15])
    with pytest.raises(ConnectionFailed):
        decoder.end()


def test_an_event_may_be_an_error() -> None:
    decoder = HttpWire().generate(asked_prompt("m", "p", {}), Facts()).decoder()
    with pytest.raises(EngineFailed, match="it broke"):
        decoder.feed(sse({"error": {"message": "it broke", "code": "engine_failed", "param": None, "type": "t"}}))


def test_choices_are_joined_by_their_index() -> None:
    joined = Joined(Facts(3, 1, "d"))
    for delta in (Delta("a", (1,), 1), Delta("x", (2,), 0), Delta("b", (3,), 1, "stop", 3), Delta("", (), 0, "length")):
        joined.add(delta)
    answer = joined.generation()
    assert [(choice.text, choice.token_ids, choice.finish_reason) for choice in answer.choices] == [
        ("x", (2,), "length"),
        ("ab", (1, 3), "stop"),
    ]
    assert (answer.text, answer.usage.completion_tokens, answer.usage.prompt_tokens) == ("x", 3, 3)
    assert Joined().generation().text == ""


def write_adapter(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).write_bytes(name.encode() * 700)
    return folder


@pytest.mark.parametrize(
    "names", [digest.LORA_FILES, digest.REFT_FILES, (*digest.ADAPTER_FILES, *folder_texts.TEXT_FILES)]
)
def test_a_folder_is_packed_as_by_the_command_line(tmp_path: Path, names: tuple[str, ...]) -> None:
    folder = write_adapter(tmp_path / "lora", *names, "optimizer.pt")
    package = packing.Package.of(folder)
    told: list[tuple[int, int | None]] = []
    packed = b"".join(package.parts(lambda done, total: told.append((done, total))))
    assert packed == b"".join(ServersPackage.of(folder))
    assert len(packed) == package.size == told[-1][0] == told[-1][1]
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        assert sorted(archive.getnames()) == sorted(names)
    assert folder_texts.TEXT_FILES == packing.TEXT_FILES


def test_folders_that_hold_no_adapter(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "nothing", write_adapter(tmp_path / "half", digest.CONFIG_FILE)):
        with pytest.raises(InvalidAdapter, match="missing"):
            packing.Package.of(folder)
    whole = write_adapter(tmp_path / "whole", *digest.LORA_FILES)
    package = packing.Package.of(whole)
    (whole / digest.WEIGHTS_FILE).write_bytes(b"")
    with pytest.raises(InvalidAdapter, match="shorter"):
        list(package.parts())


def plan(error: PreftError, *, targets: int = 1, retries: int = 2, repeatable: bool = True) -> list[tuple[int, float]]:
    """The targets after the first one, and the waits before them, until `error` is raised."""
    attempts, steps = Attempts(targets, 0, retries, 1000, repeatable=repeatable), []
    with suppress(type(error)):
        while True:
            wait = attempts.failed(error)
            steps.append((attempts.target, wait))
    return steps


def test_all_gateways_are_asked_before_a_wait() -> None:
    steps = plan(Unavailable("x"), targets=3, retries=1)
    assert [target for target, _ in steps] == [1, 2, 0, 1, 2]
    assert [wait == 0 for _, wait in steps] == [True, True, False, True, True]


@pytest.mark.parametrize(
    ("error", "repeatable", "count"),
    [
        (ConnectionFailed("x", sent=False), False, 2),
        (ConnectionFailed("x"), False, 0),
        (ConnectionFailed("x"), True, 2),
        (QueueFull("x"), False, 2),
        (RateLimited("x", retry_after=1), False, 2),
        (RateLimited("x"), True, 0),
        (ShuttingDown("x"), False, 0),
        (ShuttingDown("x"), True, 2),
        (EngineFailed("x"), True, 0),
        (DeadlineExceeded("x"), True, 0),
        (BadReply("x"), True, 0),
    ],
)
def test_what_is_repeated(error: PreftError, repeatable: bool, count: int) -> None:
    assert len(plan(error, repeatable=repeatable)) == count


def test_waits_grow_and_are_never_shorter_than_the_server_says() -> None:
    waits = [wait for _, wait in plan(Unavailable("x"), retries=10)]
    assert waits[0] <= 0.25
    assert max(waits) <= 8
    assert waits[8] >= 4
    assert all(wait == 30 for _, wait in plan(QueueFull("x", retry_after=30)))
    assert plan(QueueFull("x", retry_after=2000)) == []  # beyond the call's limit


def test_a_limit_of_the_key_is_the_same_at_every_gateway() -> None:
    assert plan(RateLimited("x", retry_after=20), targets=3, retries=1) == [(0, 20.0)]


def test_no_attempt_begins_after_the_end() -> None:
    attempts = Attempts(1, 0, 5, 0.01, repeatable=True)
    time.sleep(0.02)
    with pytest.raises(DeadlineExceeded, match=r"0\.01 seconds"):
        attempts.seconds_left()


def test_forms() -> None:
    class City(BaseModel):
        name: str

    def answer(text: str, finish: Any) -> Any:
        joined = Joined()
        joined.add(Delta(text, (1,), 0, finish))
        return joined.generation()

    assert read_form(City, answer('{"name": "Lisbon"}', "stop")).value == City(name="Lisbon")
    with pytest.raises(BadReply, match="max_tokens"):
        read_form(City, answer('{"name": "Lis', "length"))
    with pytest.raises(BadReply, match="City"):
        read_form(City, answer('{"name": 5}', "stop"))
