"""Every setting has an environment variable, with the file below it and the flags above it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from preft.core.environment import OTHERS, check_names, config_file, read_environment
from preft.core.errors import ConfigError
from preft.core.settings import Key, Settings, load_settings, variable_of

ROOT = Path(__file__).parents[3]


def settings_in(environ: dict[str, str], overrides: dict[str, Any] | None = None) -> Settings:
    return load_settings(None, overrides, read_environment({"PREFT_MODEL": "/m", **environ}))


def keys(model: type[BaseModel] = Settings, group: Key = ()) -> Iterator[Key]:
    for name, field in model.model_fields.items():
        for kind in get_args(field.annotation) or (field.annotation,):
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                yield from keys(kind, (*group, name))
                break
        else:
            yield *group, name


def test_values_of_every_kind() -> None:
    settings = settings_in(
        {
            "PREFT_PORT": "9000",
            "PREFT_HOST": "::",
            "PREFT_SERVED_MODEL_NAME": "123",
            "PREFT_STATE_DIR": "/a b: c #d",
            "PREFT_DTYPE": "float16",
            "PREFT_BLOCK_SIZE": "64",
            "PREFT_SEED": "7",
            "PREFT_COLOCATED": "true",
            "PREFT_CLUSTER_SECRET": "[0123456789: abcdef",
            "PREFT_STATE": "redis://u:p@h/0",
            "PREFT_ALLOWED_HOSTS": '["a","b"]',
            "PREFT_ADAPTER_SOURCES": "[s3://bucket, hf://]",
            "PREFT_ADAPTERS": "{Ann: /a, 'org/bob': hf://x}",
            "PREFT_SHUTDOWN_TIMEOUT": "2m",
            "PREFT_PREFILL__REPLICAS": "2",
            "PREFT_PREFILL__MAX_LORA_RANK": "8",
            "PREFT_PREFILL__ENFORCE_EAGER": "false",
            "PREFT_PREFILL__KV_CACHE_BYTES": "4GiB",
            "PREFT_DECODE__NUM_GPUS": "0.5",
            "PREFT_ROUTER__SHARES": '{"batch": 0.2}',
            "PREFT_WORKER__ADVERTISE_HOST": "10.0.0.5",
            "UNRELATED": "1",
        }
    )
    assert (settings.port, settings.host, settings.model_name, settings.seed) == (9000, "::", "123", 7)
    assert (str(settings.state_dir), settings.dtype, settings.block_size) == ("/a b: c #d", "float16", 64)
    assert settings.cluster_secret is not None
    assert settings.cluster_secret.get_secret_value() == "[0123456789: abcdef"
    assert settings.state is not None
    assert settings.state.get_secret_value() == "redis://u:p@h/0"
    assert (settings.allowed_hosts, settings.adapter_sources) == (["a", "b"], ("s3://bucket", "hf://"))
    assert settings.adapters == {"Ann": "/a", "org/bob": "hf://x"}
    assert (settings.colocated, settings.shutdown_timeout) == (True, 120.0)
    assert (settings.prefill.replicas, settings.prefill.max_lora_rank) == (2, 8)
    assert (settings.prefill.enforce_eager, settings.prefill.kv_cache_bytes) == (False, 4 << 30)
    assert (settings.decode.num_gpus, settings.router.shares) == (0.5, {"batch": 0.2})
    assert settings.worker.advertise_host == "10.0.0.5"


@pytest.mark.parametrize("key", list(keys()), ids=".".join)
def test_every_setting_has_a_variable(key: Key) -> None:
    found = read_environment({variable_of(key): "[8]"})
    assert list(found) == [key]


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("model: /file\nport: 1\nseed: 1\nrouter: {retries: 1, max_queue: 1, patience: 1}\n")
    environ = {"PREFT_PORT": "2", "PREFT_ROUTER__RETRIES": "2", "PREFT_ROUTER__MAX_QUEUE": "2"}
    settings = load_settings(config, {"port": 3, "router": {"retries": 3}}, read_environment(environ))
    assert (settings.model, settings.port, settings.seed) == (Path("/file"), 3, 1)
    assert (settings.router.retries, settings.router.max_queue, settings.router.patience) == (3, 2, 1)


def test_null_is_none_and_nothing_is_nothing(tmp_path: Path) -> None:
    config = tmp_path / "cluster.yaml"
    config.write_text("model: /m\ngrpc_port: 9\nserved_model_name: x\nadapter_dir: /a\nhost: h\n")
    given = {"PREFT_GRPC_PORT": "null", "PREFT_SERVED_MODEL_NAME": "null", "PREFT_ADAPTER_DIR": "", "PREFT_HOST": ""}
    settings = load_settings(config, None, read_environment(given))
    assert (settings.grpc_port, settings.served_model_name) == (None, None)
    assert (settings.adapter_dir, settings.host) == (Path("/a"), "h")


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("PREFT_ROUTER__MAXQUEUE", "PREFT_ROUTER__MAX_QUEUE"),
        ("PREFT_ROUTER_MAX_QUEUE", "PREFT_ROUTER__MAX_QUEUE"),
        ("PREFT_router__max_queue", "PREFT_ROUTER__MAX_QUEUE"),
        ("PREFT_MODLE", "PREFT_MODEL"),
        ("PREFT_ADAPTERS__ANN", "PREFT_ADAPTERS"),
        ("PREFT_CONFIGS", "PREFT_CONFIG"),
        ("PREFT_SERVICE_HOSTS", None),
        ("PREFT_", None),
        ("PREFT_XYZZY", None),
    ],
)
def test_an_unknown_variable_is_named(name: str, near: str | None) -> None:
    with pytest.raises(ConfigError, match=f"^{name}: there is no such setting") as said:
        check_names({"HOME": "/", "PREFT_SEED": "1", name: ""})
    assert str(said.value).endswith(f"did you mean {near}?" if near else "see docs/configuration.md for the settings")


def test_variables_that_kubernetes_makes_of_services_mean_nothing() -> None:
    """Services named preft, preft-grpc and preft-gateway, as the containers of their namespace get them."""
    made = {}
    for name in ("PREFT", "PREFT_GRPC", "PREFT_GATEWAY"):
        tcp = {"": "tcp://10.0.0.1:8000", "_PROTO": "tcp", "_PORT": "8000", "_ADDR": "10.0.0.1"}
        made |= {f"{name}_PORT_8000_TCP{end}": text for end, text in tcp.items()}
        made |= {
            f"{name}_SERVICE_HOST": "10.0.0.1",
            f"{name}_SERVICE_PORT": "8000",
            f"{name}_SERVICE_PORT_HTTP": "8000",
        }
        made |= {f"{name}_PORT": "tcp://10.0.0.1:8000"}
    check_names(made)
    assert settings_in(made) == settings_in({})
    with pytest.raises(ConfigError, match=r"^PREFT_GATEWAY_PORT: there is no such setting"):
        check_names({"PREFT_GATEWAY_PORT": "8000"})


@pytest.mark.parametrize(
    ("variable", "text", "says"),
    [
        ("PREFT_PORT", "high", "port: Input should be a valid integer"),
        ("PREFT_DTYPE", "int8", "dtype: Input should be 'auto', "),
        ("PREFT_ALLOWED_HOSTS", "a,b", "allowed_hosts: this is a list: write it as [first, second] "),
        ("PREFT_ALLOWED_HOSTS", "[a, http://b]", "allowed_hosts: 'http://b' is not a host"),
        ("PREFT_ADAPTER_SOURCES", "/a", "adapter_sources: this is a list: write it as [first, second] "),
        ("PREFT_ROUTER__SHARES", "3", "router.shares: this is a mapping: write it as {name: value} "),
        ("PREFT_ROUTER__SHARES", "{a: 0}", "router.shares.a: Input should be greater than 0"),
        ("PREFT_DECODE__STAGING_BYTES", "4 XB", "decode.staging_bytes: '4 XB' is not a size: "),
        ("PREFT_PEER_HOST", "0.0.0.0", "peer_host: other processes can't reach 0.0.0.0"),
    ],
)
def test_a_mistake_names_the_setting_and_the_variable(variable: str, text: str, says: str) -> None:
    with pytest.raises(ConfigError) as said:
        settings_in({variable: text, "PREFT_SEED": "1"})
    assert str(said.value).startswith(says)
    assert str(said.value).endswith(f" (the environment variable {variable} sets it)")


@pytest.mark.parametrize("text", ["*", "[a", "{a: 1, a: 2}"])
def test_a_text_that_is_no_yaml_names_the_variable(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^PREFT_ROUTER__SHARES: "):
        settings_in({"PREFT_ROUTER__SHARES": text})


def test_a_mistake_in_a_flag_is_not_the_environment_s() -> None:
    with pytest.raises(ConfigError, match=r"^port: Input should be less than or equal to 65535$"):
        settings_in({"PREFT_PORT": "8000"}, {"port": 65536})
    with pytest.raises(ConfigError, match=r"^router: this is a group of settings: [^(]*$"):
        settings_in({"PREFT_ROUTER__RETRIES": "1"}, {"router": 3})


def test_the_settings_file() -> None:
    assert config_file({"PREFT_CONFIG": "/etc/preft.yaml"}) == Path("/etc/preft.yaml")
    assert config_file({"PREFT_CONFIG": ""}) is None
    assert config_file({}) is None


def test_a_worker_of_another_machine_gets_what_the_server_had(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own environment, which may be another one, changes nothing."""
    own = settings_in({"PREFT_PREFILL__REPLICAS": "2", "PREFT_STORE__HOST_BYTES": "2GiB", "PREFT_STATE_DIR": "~/x"})
    sent = own.model_dump_json()
    for name, text in {
        "PREFT_PREFILL__REPLICAS": "7",
        "PREFT_SEED": "7",
        "PREFT_NOTHING": "7",
        "HOME": "/else",
    }.items():
        monkeypatch.setenv(name, text)
    assert Settings.model_validate_json(sent) == own


def test_all_other_variables_are_known() -> None:
    """Those that the code names are in the one list, and the page lists them."""
    named = set()
    for folder in ("services", "kernels", "loadgen", "scripts", "bench"):
        for path in (ROOT / folder).rglob("*.py"):
            named |= set(re.findall(r"\bPREFT_[A-Z][A-Z_]+", path.read_text()))
    settings = {variable_of(key) for key in keys()}
    assert named - settings - {"PREFT_ROUTER__MAX_QUEUE", "PREFT_SERVICE_"} == OTHERS
    page = (ROOT / "docs" / "configuration.md").read_text()
    assert [name for name in OTHERS if f"| `{name}` |" not in page] == []
    check_names(dict.fromkeys(OTHERS, "x"))
