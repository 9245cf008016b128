"""All settings of a cluster: one frozen object, read once from a YAML file, environment and flags, and strict.

Owns the settings' names, values and order of precedence. Flags and environment variables are read elsewhere.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)

from preft.core.cluster import Role
from preft.core.errors import ConfigError, InvalidAdapter
from preft.core.names import adapter_name, normal_name
from preft.core.secret_files import with_secrets, without_other_form
from preft.core.units import read_bytes, read_seconds
from preft.core.web import is_unspecified, read_host, read_origin

GiB = 1 << 30
MiB = 1 << 20
DAY = 86_400.0  # seconds
SCHEMES = ("s3", "gs", "http", "https", "hf")  # of adapters outside local folders

Bytes = Annotated[int, BeforeValidator(read_bytes), Field(ge=1, le=1 << 60)]
"""A size in bytes. No operating system handles files beyond the limit."""

Seconds = Annotated[float, BeforeValidator(read_seconds), Field(gt=0, le=DAY)]
"""A duration in seconds. The limit of one day exists because timers overflow with far longer durations."""

SecondsOrZero = Annotated[float, BeforeValidator(read_seconds), Field(ge=0, le=DAY)]

Key = tuple[str, ...]
"""A setting's path of names, such as ("router", "max_queue")."""


def _reachable(host: str) -> str:
    name = str(read_host(host))
    if "*" in name or is_unspecified(host):
        raise ValueError(f"other processes can't reach {host}: name an address of this machine, or its DNS name")
    return name


ReachableHost = Annotated[str, AfterValidator(_reachable)]
"""An address or a DNS name under which other processes reach this one."""


class _Strict(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, hide_input_in_errors=True
    )


class EngineSettings(_Strict):
    """vLLM's settings for a worker of any role. Lengths in tokens."""

    replicas: Annotated[int, Field(ge=1, le=1024)] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1024)] | None = None  # None: always `replicas`
    fill_nodes: bool = False  # as many workers as Ray's nodes have `resources` for, and at least `replicas`
    max_num_seqs: Annotated[int, Field(ge=1)] = 64
    max_num_batched_tokens: Annotated[int, Field(ge=1)] = 2048
    kv_cache_bytes: Annotated[Bytes, Field(ge=1 * MiB)] | None = None  # None: 1 GiB on CPU, vLLM's own choice on GPU
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1)] = 0.9
    enable_prefix_caching: bool = True
    enforce_eager: bool | None = None  # None: eager on CPU, compiled on GPU
    staging_bytes: Annotated[Bytes, Field(ge=1 * MiB)] | None = None  # host memory for KV under way; None: by model
    num_cpus: Annotated[float, Field(ge=0)] = 0  # reserved in Ray per worker
    num_gpus: Annotated[float, Field(ge=0)] | None = None  # reserved too; None: 1 with vLLM's GPU build, else 0
    resources: dict[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)  # custom ones, reserved too
    engine_timeout: Annotated[Seconds, Field(ge=1)] = 120.0  # an engine without an answer for so long is replaced


class PrefillSettings(EngineSettings):
    """Prefill workers: the engine's settings and the adapter slots."""

    max_loras: Annotated[int, Field(ge=1)] = 8  # engine slots: distinct adapters in one batch
    max_lora_rank: Literal[1, 8, 16, 32, 64, 128, 256, 320, 512] = 64


class DecodeSettings(EngineSettings):
    """Decode workers: the engine's settings. Decode workers have no adapters."""


class StoreSettings(_Strict):
    """Storage of adapters."""

    disk_bytes: Annotated[Bytes, Field(ge=1 * MiB)] = 64 * GiB  # copies on disk, per machine
    host_bytes: Annotated[Bytes, Field(ge=1 * MiB)] = 4 * GiB  # in host memory, per prefill worker
    max_adapter_bytes: Bytes = 2 * GiB  # a larger one is refused
    source_timeout: Seconds = 30.0  # a source that sends nothing for this long has failed
    source_min_rate: Bytes = 64 << 10  # per second; a slower remote source has failed
    catalog_timeout: Seconds = 60.0  # without a catalog refresh for this long, requests for adapters get 503


class RouterSettings(_Strict):
    """Admission limits, in requests, and time-outs."""

    max_queue: Annotated[int, Field(ge=1)] = 1024  # requests waiting for a worker; more get 429
    max_inflight_prefills: Annotated[int, Field(ge=1)] = 64  # per prefill worker
    request_timeout: Seconds = 600.0
    transfer_timeout: Seconds = 30.0  # from first token to KV in place
    retries: Annotated[int, Field(ge=0, le=10)] = 2  # further attempts after a worker or transfer failed
    shares: dict[str, Annotated[float, Field(gt=0, le=1e6)]] = Field(default_factory=dict)  # by `user`; else 1
    patience: Seconds = 1.0  # a request that has waited longer isn't overtaken by later ones
    poll_interval: Seconds = 1.0  # how often the state store is read, if it announces no change
    worker_timeout: Seconds = 10.0  # a worker that tells nothing for this long gets no requests
    restart_grace: SecondsOrZero = 120.0  # how long requests wait if no worker is left


class WorkerSettings(_Strict):
    """The addresses of a `preft worker`. The workers of `preft serve` don't use them."""

    host: str = "127.0.0.1"  # to listen on
    port: Annotated[int, Field(ge=0, le=65535)] = 0  # 0 means any free port
    advertise_host: ReachableHost | None = None  # for the cluster's other processes; None: `host`


class ScalingSettings(_Strict):
    """When `preft serve` starts and ends workers of a role that has `max_replicas`. See `router.pressure`."""

    target: Annotated[float, Field(gt=0, le=1)] = 0.8  # pressure that the number of workers aims at
    queue_seconds: Seconds = 1.0  # a wait in the queue of this length is a pressure of 1
    up_seconds: Seconds = 10.0  # for so long the pressure must ask for more workers
    down_seconds: Seconds = 300.0  # ... and for fewer, before one ends


class TlsSettings(_Strict):
    """Files in PEM form, by which the cluster's processes know each other: see `preft.rpc.tls`."""

    ca: Path
    cert: Path
    key: Path

    @field_validator("ca", "cert", "key")
    @classmethod
    def _absolute(cls, value: Path) -> Path:
        return absolute(value)


class Settings(_Strict):
    """One cluster. `model` is a local folder with config.json, weights and tokenizer.json."""

    model: Path
    served_model_name: str | None = None  # default: the last part of `model`
    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000  # 0 means any free port
    api_keys: Path | None = None  # the file of API keys; None: no request needs one
    usage_log: Path | None = None  # a line of JSON per finished request is appended to it
    allowed_hosts: list[str] = Field(default_factory=list)  # names in Host, beside loopback's and `host`
    allowed_origins: list[str] = Field(default_factory=list)  # origins of pages that may use the server
    tool_call_parser: str | None = None  # vLLM's parser of tool calls; None: tool_choice 'auto' is refused
    reasoning_parser: str | None = None  # vLLM's parser of reasoning; None: reasoning is content
    grpc_port: Annotated[int, Field(ge=0, le=65535)] | None = None  # None: no public gRPC service
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = None  # None: float32 on CPU, auto on GPU
    max_model_len: Annotated[int, Field(ge=1)] | None = None  # None: the model's own
    block_size: Literal[16, 32, 64, 128] | None = None  # tokens per KV block; None: 32 on CPU (its smallest), 16 on GPU
    seed: int = 0
    shutdown_timeout: SecondsOrZero = 20.0  # for running requests, after a stop signal
    state_dir: Path = Path("~/.preft")
    # `state` and `cluster_secret` are never written out with the other settings. None: files in `state_dir`.
    state: SecretStr | None = Field(default=None, exclude=True, repr=False)  # file, or a URL that may hold a password
    state_file: Path | None = Field(default=None, exclude=True)  # the file that holds `state`
    cluster_secret: Annotated[SecretStr, Field(min_length=16)] | None = Field(default=None, exclude=True, repr=False)
    cluster_secret_file: Path | None = Field(default=None, exclude=True)  # the file that holds `cluster_secret`
    tls: TlsSettings | None = None  # None: calls between the cluster's processes aren't encrypted
    insecure: bool = False  # without `tls` and `api_keys`, servers may listen where other machines reach them
    peer_host: ReachableHost | None = None  # a gateway's, for workers; None: the one from which it reaches `state`
    ray_address: str | None = None  # None: `preft serve` starts Ray on this machine
    adapters: dict[str, str] = Field(default_factory=dict)  # name: folder or URI
    adapter_dir: Path | None = None  # a folder of adapters, watched
    adapter_sources: tuple[str, ...] | None = None  # allowed beginnings of sources in requests; None: depends on `host`
    store: StoreSettings = Field(default_factory=StoreSettings)
    prefill: PrefillSettings = Field(default_factory=PrefillSettings)
    decode: DecodeSettings = Field(default_factory=DecodeSettings)
    router: RouterSettings = Field(default_factory=RouterSettings)
    scaling: ScalingSettings = Field(default_factory=ScalingSettings)
    worker: WorkerSettings = Field(default_factory=WorkerSettings)
    colocated: bool = False  # one kind of worker for prefill and decode, with the settings of `prefill`

    @model_validator(mode="before")
    @classmethod
    def _read_secrets(cls, given: Any) -> Any:
        return with_secrets(given) if isinstance(given, dict) else given

    @field_validator("model", "state_dir", "adapter_dir", "state_file", "cluster_secret_file", "api_keys", "usage_log")
    @classmethod
    def _absolute(cls, value: Path | None) -> Path | None:
        return value and absolute(value)

    @field_validator("state")
    @classmethod
    def _absolute_file(cls, value: SecretStr | None) -> SecretStr | None:
        if value is None or "://" in value.get_secret_value():
            return value
        if not value:
            raise ValueError("give a file path or a URL")
        return SecretStr(_from_root(value.get_secret_value()))

    @field_validator("allowed_hosts")
    @classmethod
    def _hosts(cls, value: list[str]) -> list[str]:
        return [str(read_host(host)) for host in value]

    @field_validator("allowed_origins")
    @classmethod
    def _origins(cls, value: list[str]) -> list[str]:
        return list(map(read_origin, value))

    @field_validator("adapters")
    @classmethod
    def _names_and_folders(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            names = {name: adapter_name(name) for name in value}
        except InvalidAdapter as error:
            raise ValueError(str(error)) from None
        if len(set(names.values())) < len(names):
            raise ValueError("two names differ only in how Unicode writes the same letters")
        return {names[name]: source if "://" in source else _from_root(source) for name, source in value.items()}

    @field_validator("adapter_sources")
    @classmethod
    def _absolute_sources(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        for source in value or ():
            scheme, separator, place = source.partition("://")
            if separator and (scheme not in SCHEMES or "/.." in place):
                raise ValueError(f"{source!r} is neither a folder nor starts with {', '.join(SCHEMES)} and ://")
        return value and tuple(source if "://" in source else _from_root(source) for source in value)

    @model_validator(mode="after")
    def _replicas_are_in_order(self) -> Settings:
        for role in self.roles:
            own, key = self.engine(role), "decode" if role is Role.DECODE else "prefill"
            if own.fill_nodes and (self.ray_address is None or not own.resources or own.max_replicas is not None):
                raise ValueError(f"{key}.fill_nodes: it needs ray_address and {key}.resources, and no max_replicas")
            if own.max_replicas is not None and own.max_replicas < own.replicas:
                raise ValueError(f"{key}.max_replicas: {own.max_replicas} is less than replicas, {own.replicas}")
        return self

    @model_validator(mode="after")
    def _names_are_distinct(self) -> Settings:
        if normal_name(self.model_name) in self.adapters:
            raise ValueError(f"adapters: {self.model_name!r} is the base model's name")
        return self

    @property
    def roles(self) -> tuple[Role, ...]:
        return (Role.COLOCATED,) if self.colocated else (Role.PREFILL, Role.DECODE)

    def engine(self, role: Role) -> EngineSettings:
        return self.decode if role is Role.DECODE else self.prefill

    @property
    def model_name(self) -> str:
        """The base model's name in the API."""
        return self.served_model_name or self.model.name

    def check_internal_host(self, host: str) -> None:
        """Raises ConfigError if a port for the cluster's processes on `host` would let strangers read along."""
        if self.tls is None and not self.insecure and not is_loopback(host):
            raise ConfigError(
                f"tls: other machines reach {host}, and calls between the cluster's processes aren't encrypted: "
                "set tls, or insecure: true if no stranger is in the network"
            )

    def check_public_host(self) -> None:
        """Raises ConfigError if everybody who reaches `host` could use the server, without an API key."""
        if self.api_keys is None and not self.insecure and not is_loopback(self.host):
            raise ConfigError(
                f"api_keys: other machines reach {self.host}, and no request needs an API key: set api_keys, or "
                "insecure: true if everybody in the network may use the server and change its adapters"
            )


def absolute(path: Path) -> Path:
    """The path from the root, with ~ replaced. Links stay. Raises ValueError if no file can have the path."""
    return Path(_from_root(str(path)))


def _from_root(path: str) -> str:
    if "\0" in path:
        raise ValueError("no path holds a NUL character")
    return os.path.abspath(os.path.expanduser(path))


def host_and_port(host: str, port: int) -> str:
    """`host:port`, with an IPv6 address in brackets."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether a server that listens on `host` is reachable from this machine alone."""
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def variable_of(key: Key) -> str:
    """The environment variable of a setting."""
    return f"PREFT_{'__'.join(key).upper()}"


def load_settings(
    config: Path | None = None,
    overrides: dict[str, Any] | None = None,
    environment: Mapping[Key, Any] | None = None,
) -> Settings:
    """Settings from a YAML file, with those of the environment on top, and `overrides` (nested, from flags) on these.

    Raises ConfigError with a key's dotted name if the key is unknown or missing, or its value is malformed, and with
    its line if the key is repeated.
    """
    environment, overrides = environment or {}, overrides or {}
    merged: dict[str, Any] = {}
    for layer in ({} if config is None else _in_file(config), _nested(environment), overrides):
        merged = _merge(without_other_form(merged, layer), layer)
    try:
        return Settings.model_validate(merged)
    except ValidationError as error:
        first = error.errors(include_input=False)[0]
        key = tuple(map(str, first["loc"]))
        problem = _PROBLEMS.get(first["type"], first["msg"].removeprefix("Value error, "))
        variables = [variable_of(name) for name in environment if key[: len(name)] == name]
        if variables and not _has(overrides, key):
            problem += f" (the environment variable {variables[0]} sets it)"
        raise ConfigError(": ".join(filter(None, [".".join(key), problem]))) from error


def _in_file(config: Path) -> dict[str, Any]:
    from preft.core.yaml_text import read_mapping

    return read_mapping(config)


def _nested(settings: Mapping[Key, Any]) -> dict[str, Any]:
    nested: dict[str, Any] = {}
    for (*groups, name), value in settings.items():
        place = nested
        for group in groups:
            place = place.setdefault(group, {})
        place[name] = value
    return nested


def _has(settings: dict[str, Any], key: Key) -> bool:
    """Whether the nested `settings` have a value at `key`, or where the path to `key` ends."""
    place: Any = settings
    for name in key:
        if not isinstance(place, dict):
            return True
        if name not in place:
            return False
        place = place[name]
    return True


_PROBLEMS = {  # pydantic's kind of error -> words for the user of a settings file
    "extra_forbidden": "there is no such setting",
    "missing": "this setting must be given",
    "model_type": "this is a group of settings: give a mapping, such as {replicas: 2}",
    "too_short": "a secret has 16 characters or more",
    "list_type": "this is a list: write it as [first, second]",
    "tuple_type": "this is a list: write it as [first, second]",
    "dict_type": "this is a mapping: write it as {name: value}",
    "model_attributes_type": "this is a group of settings: give a mapping, such as {replicas: 2}",
}


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        if isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged
