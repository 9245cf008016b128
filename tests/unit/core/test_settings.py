"""Settings come from YAML and flags, are complete before anything starts, and a mistake names its key."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from preft.core.errors import ConfigError
from preft.core.settings import Settings, host_and_port, load_settings


def test_the_model_alone_is_enough() -> None:
    settings = load_settings(overrides={"model": "/models/llama"})
    assert settings.model == Path("/models/llama")
    assert settings.model_name == "llama"
    assert (settings.prefill.replicas, settings.decode.replicas) == (1, 1)


def test_overrides_go_on_top_key_by_key(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("model: /m\nport: 1\ndecode: {replicas: 2, max_num_seqs: 3}\n")
    settings = load_settings(config, {"port": 9, "decode": {"replicas": 5}})
    assert (settings.port, settings.decode.replicas, settings.decode.max_num_seqs) == (9, 5, 3)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("# nothing yet\n")
    assert load_settings(config, {"model": "/m"}) == load_settings(overrides={"model": "/m"})


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        ({}, "model"),
        ({"model": "/m", "modle": "/m"}, "modle"),
        ({"model": "/m", "prefill": {"replicsa": 2}}, "prefill.replicsa"),
        ({"model": "/m", "decode": {"max_loras": 2}}, "decode.max_loras"),
        ({"model": "/m", "decode": 3}, "decode"),
        ({"model": "/m", "port": "high"}, "port"),
        ({"model": "/m", "port": 65536}, "port"),
        ({"model": "/m", "decode": {"replicas": 0}}, "decode.replicas"),
        ({"model": "/m", "decode": {"replicas": 3, "max_replicas": 2}}, "decode.max_replicas: 2 is less"),
        ({"model": "/m", "prefill": {"fill_nodes": True}}, "prefill.fill_nodes: it needs ray_address"),
        ({"model": "/m", "decode": {"staging_bytes": 10}}, "decode.staging_bytes"),
        ({"model": "/m", "router": {"request_timeout": 0}}, "router.request_timeout"),
        ({"model": "/m", "dtype": "int8"}, "dtype"),
        ({"model": "/m", "block_size": 17}, "block_size"),
        ({"model": "/m", "prefill": {"max_lora_rank": 12}}, "prefill.max_lora_rank"),
        ({"model": "/m", "store": {"host_bytes": 8}}, "store.host_bytes"),
        ({"model": "/m", "adapters": {"m": "/a"}}, "adapters"),
        ({"model": "/m", "adapters": {"alice": 3}}, "adapters.alice"),
        ({"model": "/m", "adapters": {"name@5": "/a"}}, "adapters"),
        ({"model": "/m", "adapters": {"a/../b": "/a"}}, "adapters"),
        ({"model": "/m", "adapters": {"\u00e9": "/a", "e\u0301": "/b"}}, "adapters"),
        ({"model": "/m", "tls": {"ca": "/ca.pem", "cert": "/cert.pem"}}, "tls.key"),
        ({"model": "/m", "tls": {"ca": "/a", "cert": "/b", "key": "/c", "name": "d"}}, "tls.name"),
        ({"model": "/m", "tls": "/ca.pem"}, "tls"),
        ({"model": "/\u00e9", "adapters": {"e\u0301": "/a"}}, "adapters"),
    ],
)
def test_a_mistake_names_its_key(overrides: dict[str, Any], key: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_settings(overrides=overrides)
    assert key in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "key",
    [
        "store.source_timeout",
        "store.catalog_timeout",
        "router.request_timeout",
        "router.transfer_timeout",
        "router.worker_timeout",
        "router.poll_interval",
        "router.restart_grace",
    ],
)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e12, 86_401, -1])
def test_a_time_that_no_timer_keeps_is_refused(key: str, value: float) -> None:
    group, name = key.split(".")
    with pytest.raises(ConfigError, match=f"^{key}: "):
        load_settings(overrides={"model": "/m", group: {name: value}})
    load_settings(overrides={"model": "/m", group: {name: 86_400}})


def test_ipv6_addresses_have_brackets() -> None:
    assert host_and_port("::1", 80) == "[::1]:80"
    assert host_and_port("127.0.0.1", 80) == "127.0.0.1:80"
    assert host_and_port("localhost", 80) == "localhost:80"


@pytest.mark.parametrize(
    "content",
    [
        *(b"model: [", b"- model", b"just words", b"3: 4\nmodel: /m", b"\xff\xfe\x00", b"model: !!python/none x"),
        *(
            b"port: !!int x",
            b"port: !!float",
            b"port: 0x",
            b"port: 2001-99-99",
            b"port: !!timestamp x",
            b"port: !!bool x",
        ),
        *(b"port: !!binary x", b"[" * 3000, b"a: {" * 3000, b"port: " + b"9" * 5000, b"? [a]\n: b", b"a: !!omap [b]"),
    ],
    ids=lambda content: repr(content[:20]),
)
def test_a_broken_file_is_a_config_error(tmp_path: Path, content: bytes) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        load_settings(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("key", ["model", "state_dir", "adapter_dir", "state"])
def test_no_path_holds_a_nul(key: str) -> None:
    with pytest.raises(ConfigError, match=f"^{key}: no path holds a NUL character"):
        load_settings(overrides={"model": "/m", key: "/a\0b"})


def test_a_home_of_nobody_is_a_name() -> None:
    assert load_settings(overrides={"model": "~no-such-user/m"}).model == Path("~no-such-user/m").absolute()


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="none\\.yaml"):
        load_settings(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=tmp_path.name):
        load_settings(tmp_path)


def test_paths_are_absolute_and_home_is_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    files = {"ca": "~/ca.pem", "cert": "certs/cert.pem", "key": "/run/key.pem"}
    adapters = {"alice": "~/a", "bob": "s3://b/ob"}
    settings = load_settings(overrides={"model": "m", "adapters": adapters, "tls": files})
    assert settings.model == tmp_path / "m"
    assert settings.adapters == {"alice": str(tmp_path / "a"), "bob": "s3://b/ob"}
    assert settings.state_dir == tmp_path / ".preft"
    assert settings.tls is not None
    paths = (settings.tls.ca, settings.tls.cert, settings.tls.key)
    assert paths == (tmp_path / "ca.pem", tmp_path / "certs" / "cert.pem", Path("/run/key.pem"))


def test_a_state_file_is_absolute_and_a_url_stays(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/ann")
    for given, expected in (
        ("state.sqlite", str(tmp_path / "state.sqlite")),
        ("~/s", "/home/ann/s"),
        ("/s", "/s"),
        ("redis://u:p@h:1/0", "redis://u:p@h:1/0"),
    ):
        state = load_settings(overrides={"model": "/m", "state": given}).state
        assert state is not None
        assert state.get_secret_value() == expected
    with pytest.raises(ConfigError, match=r"^state: "):
        load_settings(overrides={"model": "/m", "state": ""})


def test_settings_do_not_change() -> None:
    settings = Settings(model=Path("/m"))
    with pytest.raises(ValidationError, match="frozen"):
        settings.port = 1  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("model: /m\nprefil: {replicas: 1}", "prefil: there is no such setting"),
        ("model: /m\ndecode: {foo: 1}", "decode.foo: there is no such setting"),
        ("port: 80", "model: this setting must be given"),
        ("model: /m\nprefill:", "prefill: this is a group of settings: give a mapping, such as {replicas: 2}"),
        ("model: /m\nprefill: 2", "prefill: this is a group of settings: give a mapping, such as {replicas: 2}"),
        ("model: /m\nadapters: {m: /a}", "adapters: 'm' is the base model's name"),
    ],
)
def test_mistakes_are_said_in_words_of_the_file(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError) as said:
        load_settings(tmp_path / "c.yaml")
    assert str(said.value) == says


@pytest.mark.parametrize(
    ("text", "line", "key"),
    [
        ("model: /m\nport: 1\n# again\nport: 2", 4, "port"),
        ("model: /m\nport: 1\n'port': 1", 3, "port"),
        ("model: /m\nadapters:\n  a: /a\n  b: /b\n  a: /c\nseed: 1", 5, "a"),
        ("model: /m\nprefill: {replicas: 1, replicas: 2}", 2, "replicas"),
    ],
)
def test_a_repeated_key_is_named_with_its_line(tmp_path: Path, text: str, line: int, key: str) -> None:
    config = tmp_path / "c.yaml"
    config.write_text(text)
    with pytest.raises(ConfigError) as said:
        load_settings(config)
    assert str(said.value) == f"{config}: line {line} repeats the key {key!r} of the same mapping"


def test_a_key_may_occur_once_in_each_mapping(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        "model: /m\nprefill: &all {replicas: 2, max_num_seqs: 3}\ndecode: &more {<<: *all, replicas: 4}\n"
        "<<: {port: 1}\nport: 2\n<<: {seed: 5}\nstore: {}\nrouter: {}\n"
    )
    settings = load_settings(tmp_path / "c.yaml")
    assert (settings.prefill.replicas, settings.decode.replicas, settings.decode.max_num_seqs) == (2, 4, 3)
    assert (settings.port, settings.seed) == (2, 5)


def test_numbers_in_quotes_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text('model: /m\nport: "8123"')
    assert load_settings(tmp_path / "c.yaml").port == 8123


INSIDE = ["127.0.0.1", "127.0.0.2", "::1", "localhost"]
OUTSIDE = ["10.0.0.5", "192.168.1.1", "0.0.0.0", "::", "fd00::1", "gpu1.lan", ""]


@pytest.mark.parametrize("host", INSIDE + OUTSIDE)
@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("tls", [None, {"ca": "/ca.pem", "cert": "/cert.pem", "key": "/key.pem"}])
def test_ports_that_other_machines_reach_need_tls(host: str, insecure: bool, tls: dict[str, str] | None) -> None:
    settings = load_settings(overrides={"model": "/m", "insecure": insecure, "tls": tls})
    if host in INSIDE or insecure or tls:
        settings.check_internal_host(host)
    else:
        with pytest.raises(ConfigError, match=rf"^tls: other machines reach {host}, .*insecure: true"):
            settings.check_internal_host(host)


@pytest.mark.parametrize("host", INSIDE + OUTSIDE)
@pytest.mark.parametrize("insecure", [False, True])
@pytest.mark.parametrize("keys", [None, "/keys.yaml"])
def test_without_keys_only_this_machine_is_served(host: str, insecure: bool, keys: str | None) -> None:
    settings = load_settings(overrides={"model": "/m", "host": host, "insecure": insecure, "api_keys": keys})
    if host in INSIDE or insecure or keys:
        settings.check_public_host()
    else:
        with pytest.raises(ConfigError, match=rf"^api_keys: other machines reach {host}, .*insecure: true"):
            settings.check_public_host()
