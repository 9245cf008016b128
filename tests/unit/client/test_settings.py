"""Addresses, keys and certificates: checked at once, and shown to the server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from preft_client import TLS, AsyncClient, Client, ConfigError, ConnectionFailed
from support.certificates import Authority
from support.sdk_clients import a_client
from support.sdk_gateway import IDS, ScriptedGateway, gateway_in_thread

NAME = "127.0.0.1"


@pytest.mark.parametrize(
    "url",
    ["", "localhost:8000", "ftp://host", "http://", "http://host?x=1", "http://user:pw@host", "grpc://host", "http://h:x",
     "grpc://host:1/path", [], ["http://a", "grpc://b:1"], 5, [None]],
)  # fmt: skip
def test_addresses_that_are_none(url: Any) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises((ConfigError, TypeError), match=r"url|iterable"):
            kind(url if url != "" else [""])


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"api_key": "with space"}, "api_key"),
        ({"api_key": "line\nbreak"}, "api_key"),
        ({"api_key": "schlüssel"}, "api_key"),
        ({"api_key": ""}, "api_key"),
        ({"timeout": 0}, "timeout"),
        ({"timeout": float("nan")}, "timeout"),
        ({"timeout": None}, "timeout"),
        ({"connect_timeout": -1}, "connect_timeout"),
        ({"retries": -1}, "retries"),
        ({"tls": TLS(ca="x")}, "tls"),
    ],
)
def test_wrong_settings_name_themselves(settings: dict[str, Any], named: str) -> None:
    for kind in (Client, AsyncClient):
        with pytest.raises(ConfigError, match=named):
            kind("http://host", **settings)


def test_certificates_that_cannot_be_used(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    for url in ("https://host", "grpcs://host:1"):
        for tls in (TLS(ca=tmp_path / "no"), TLS(ca=nonsense), TLS(cert=nonsense), TLS(cert=nonsense, key=nonsense)):
            with pytest.raises(ConfigError, match="tls"):
                Client(url, tls=tls)


@pytest.mark.parametrize("given", ["argument", "environment"])
def test_the_key_is_shown(
    way: tuple[str, str], gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch, given: str
) -> None:
    seen: list[Any] = []
    key = None
    if given == "environment":
        monkeypatch.setenv("PREFT_API_KEY", "secret-1")
    else:
        key = "secret-1"
    if way[0] == "grpc":
        seen = _watch_metadata(gateway, monkeypatch)
    with a_client(way[1], gateway.urls[way[0]], api_key=key) as client:
        client.generate("hi", model="base")
        client.adapters.page()
    assert (gateway.authorizations or seen) == ["Bearer secret-1"] * 2


def _watch_metadata(gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The keys that the gateway's gRPC services see."""
    from preft.gateway.grpc import adapters, inference

    seen: list[Any] = []
    for module in (adapters, inference):
        reported = module.errors_reported

        def watched(context: Any, reported: Any = reported) -> Any:
            seen.extend(value for key, value in context.invocation_metadata() if key == "authorization")
            return reported(context)

        monkeypatch.setattr(module, "errors_reported", watched)
    return seen


def test_without_a_key_none_is_shown(way: tuple[str, str], gateway: ScriptedGateway) -> None:
    with a_client(way[1], gateway.urls[way[0]]) as client:
        client.generate("hi", model="base")
    assert gateway.authorizations == []


def test_the_address_of_the_environment(
    way: tuple[str, str], gateway: ScriptedGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PREFT_URL", gateway.urls[way[0]])
    with a_client(way[1], None) as client:
        assert client.generate("hi", model="base").token_ids == IDS[:5]


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def secure(
    authority: Authority, tokenizer_folder: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[ScriptedGateway]:
    """Behind TLS, with a certificate for localhost; clients need one too."""
    tls = authority.issue(tmp_path_factory.mktemp("server"), name="localhost")
    with gateway_in_thread(tokenizer_folder, tls) as gateway:
        yield gateway


def secure_url(secure: ScriptedGateway, transport: str) -> str:
    return secure.urls[transport].replace("127.0.0.1", "localhost")


def test_tls_with_certificates_of_both_sides(
    way: tuple[str, str], secure: ScriptedGateway, authority: Authority, tmp_path: Path
) -> None:
    files = authority.issue(tmp_path)
    with a_client(way[1], secure_url(secure, way[0]), tls=TLS(**files)) as client:
        assert client.generate("hi", model="base").token_ids == IDS[:5]


@pytest.mark.parametrize("wrong", ["no-ca", "another-ca", "no-certificate", "a-stranger's", "another-name", "plain"])
def test_bad_tls_is_one_clear_error(
    way: tuple[str, str], secure: ScriptedGateway, authority: Authority, tmp_path: Path, wrong: str
) -> None:
    files: dict[str, str] | None = authority.issue(tmp_path / "ours")
    stranger = Authority("a stranger").issue(tmp_path / "strangers")
    url = secure_url(secure, way[0])
    assert files is not None
    match wrong:
        case "no-ca":
            files = None
        case "another-ca":
            files = {**files, "ca": stranger["ca"]}
        case "no-certificate":
            files = {"ca": files["ca"]}
        case "a-stranger's":
            files = {**stranger, "ca": files["ca"]}
        case "another-name":
            url = secure.urls[way[0]]  # an IP address, which isn't in the certificate
        case "plain":
            url, files = url.replace("s://", "://"), None
    tls = TLS(**files) if files is not None else None
    with (
        a_client(way[1], url, tls=tls, retries=1, timeout=60) as client,
        pytest.raises(ConnectionFailed, match=r"localhost|127\.0\.0\.1"),
    ):
        client.generate("hi", model="base")
