"""Every error has a face at both boundaries."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import pytest

from preft.core import errors
from preft.core.errors import ERROR_MAP, ConfigError, InvalidRequest, PreftError, QueueFull, mapping_of


def subclasses(cls: type[PreftError]) -> Iterator[type[PreftError]]:
    yield cls
    for child in cls.__subclasses__():
        yield from subclasses(child)


DECLARED = sorted(
    (cls for cls in subclasses(PreftError) if cls.__module__ == errors.__name__), key=lambda c: c.__name__
)


@pytest.mark.parametrize("cls", [cls for cls in DECLARED if cls is not ConfigError])
def test_every_error_has_its_own_entry(cls: type[PreftError]) -> None:
    assert cls in ERROR_MAP
    assert mapping_of(cls("sentence")) is ERROR_MAP[cls]


def test_the_drawn_tree_is_the_real_one() -> None:
    drawn = [line for line in (errors.__doc__ or "").splitlines() if "──" in line]
    shown = {line.split("── ")[1].split()[0]: line.split("── ")[1].split()[1] for line in drawn}
    assert set(shown) == {cls.__name__ for cls in DECLARED} - {"PreftError"}
    for cls in DECLARED:
        if cls not in (PreftError, ConfigError):
            assert shown[cls.__name__] == str(ERROR_MAP[cls].status)


def test_codes_tell_errors_apart() -> None:
    codes = [mapping.code for mapping in ERROR_MAP.values()]
    assert len(set(codes)) == len(codes)


@pytest.mark.parametrize("mapping", ERROR_MAP.values(), ids=lambda mapping: mapping.code)
def test_statuses_exist(mapping: errors.ErrorMapping) -> None:
    assert 400 <= mapping.status < 600
    assert mapping.grpc in grpc.StatusCode.__members__


def test_an_error_without_entry_reports_as_its_parent() -> None:
    class PromptTooLong(InvalidRequest):
        pass

    assert mapping_of(PromptTooLong("too long")) is ERROR_MAP[InvalidRequest]
    assert mapping_of(ConfigError("wrong")) is ERROR_MAP[PreftError]


def test_the_message_is_the_sentence_and_details_travel_along() -> None:
    assert str(QueueFull("full", 3.0)) == "full"
    assert QueueFull("full", 3.0).retry_after == 3.0
    assert InvalidRequest("bad", "n").param == "n"


def test_what_can_t_be_printed_is_escaped() -> None:
    error = PreftError("tensor a\nb\x1b[31m of \u202eadapter \udcff is \u00e9")
    assert str(error) == r"tensor a\nb\x1b[31m of \u202eadapter \udcff is \u00e9".replace(r"\u00e9", "\u00e9")
    assert str(error).isprintable()
