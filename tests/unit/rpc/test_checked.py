"""What a field of another process's message may say."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest

from preft.core.errors import InvalidRequest
from preft.core.request import AdapterRef
from preft.rpc import checked

DIGEST = "d0" * 32
FINE: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    (checked.digest_of, (DIGEST,)),
    (checked.digest_of, ("",)),
    (checked.handle_of, ("0" * 32,)),
    (checked.address_of, ("127.0.0.1:1",)),
    (checked.address_of, ("[::1]:65535",)),
    (checked.address_of, ("decode-0.workers.svc:50051",)),
    (checked.text_of, ("Müller's größte 名前\u00a0!", "name")),
    (checked.count_of, (3, "n", 1, 3)),
    (checked.number_of, (0.0, "temperature", 0)),
    (checked.seconds_of, (86_400.0, "kv_timeout")),
]
WRONG: list[tuple[Callable[..., Any], tuple[Any, ...]]] = [
    *[(checked.digest_of, (text,)) for text in (DIGEST.upper(), f"{DIGEST}\n", "/etc", "..", "d" * 63, "٣" * 64)],
    *[(checked.handle_of, (text,)) for text in ("", "a/b", "..", "a" * 65, "a\n", "ä")],
    *[(checked.address_of, (text,)) for text in ("", "host", "host:", "host:0", "host:65536", "host:٣", ":1", "-:1")],
    *[(checked.address_of, (text,)) for text in ("unix:/tmp/s", "dns:///h:1", "a b:1", "h:1?x", "[::g]:1", "[]:1")],
    *[(checked.text_of, (text, "name")) for text in ("a\nb", "\0", "a" * 257, "\x1b[2J", "\u2028")],
    *[(checked.count_of, (number, "n", 1, 3)) for number in (0, 4, -1)],
    *[(checked.number_of, (number, "temperature", 0)) for number in (-1.0, math.inf, math.nan, -math.inf)],
    *[(checked.seconds_of, (number, "kv_timeout")) for number in (-1.0, 86_401.0, math.nan)],
]


@pytest.mark.parametrize(("check", "given"), FINE)
def test_what_makes_sense_comes_through(check: Callable[..., Any], given: tuple[Any, ...]) -> None:
    assert check(*given) == given[0]


@pytest.mark.parametrize(("check", "given"), WRONG)
def test_what_makes_none_is_refused(check: Callable[..., Any], given: tuple[Any, ...]) -> None:
    with pytest.raises(InvalidRequest) as raised:
        check(*given)
    assert raised.value.param


@pytest.mark.parametrize("digest", ["", "..", "/etc", DIGEST.upper(), f"{DIGEST}\n", f"{DIGEST}/.."])
def test_no_adapter_has_another_digest(digest: str) -> None:
    with pytest.raises(InvalidRequest):
        AdapterRef("ada", digest, "/adapters/ada")
