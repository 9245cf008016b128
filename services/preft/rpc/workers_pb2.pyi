from preft.rpc import common_pb2 as _common_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class AdapterState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ADAPTER_STATE_UNSPECIFIED: _ClassVar[AdapterState]
    ADAPTER_STATE_LOADING: _ClassVar[AdapterState]
    ADAPTER_STATE_HOST: _ClassVar[AdapterState]
    ADAPTER_STATE_SLOT: _ClassVar[AdapterState]
ADAPTER_STATE_UNSPECIFIED: AdapterState
ADAPTER_STATE_LOADING: AdapterState
ADAPTER_STATE_HOST: AdapterState
ADAPTER_STATE_SLOT: AdapterState

class KvTarget(_message.Message):
    __slots__ = ("address", "handle")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    address: str
    handle: str
    def __init__(self, address: _Optional[str] = ..., handle: _Optional[str] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request_id", "prompt_token_ids", "sampling", "adapter", "n", "target", "resume", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    N_FIELD_NUMBER: _ClassVar[int]
    TARGET_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    adapter: _common_pb2.AdapterRef
    n: int
    target: KvTarget
    resume: bool
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., adapter: _Optional[_Union[_common_pb2.AdapterRef, _Mapping]] = ..., n: _Optional[int] = ..., target: _Optional[_Union[KvTarget, _Mapping]] = ..., resume: _Optional[bool] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class PrefillEvent(_message.Message):
    __slots__ = ("first_tokens", "kv_pushed", "prompt_logprobs")
    FIRST_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KV_PUSHED_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    first_tokens: FirstTokens
    kv_pushed: KvPushed
    prompt_logprobs: _common_pb2.PromptLogprobs
    def __init__(self, first_tokens: _Optional[_Union[FirstTokens, _Mapping]] = ..., kv_pushed: _Optional[_Union[KvPushed, _Mapping]] = ..., prompt_logprobs: _Optional[_Union[_common_pb2.PromptLogprobs, _Mapping]] = ...) -> None: ...

class FirstTokens(_message.Message):
    __slots__ = ("choices",)
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[_common_pb2.TokenDelta]
    def __init__(self, choices: _Optional[_Iterable[_Union[_common_pb2.TokenDelta, _Mapping]]] = ...) -> None: ...

class KvPushed(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class PrefetchReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("start", "cancel")
    START_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    start: DecodeRequest
    cancel: int
    def __init__(self, start: _Optional[_Union[DecodeRequest, _Mapping]] = ..., cancel: _Optional[int] = ...) -> None: ...

class DecodeEvents(_message.Message):
    __slots__ = ("events",)
    EVENTS_FIELD_NUMBER: _ClassVar[int]
    events: _containers.RepeatedCompositeFieldContainer[DecodeEvent]
    def __init__(self, events: _Optional[_Iterable[_Union[DecodeEvent, _Mapping]]] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("id", "delta", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    delta: _common_pb2.TokenDelta
    error: Error
    def __init__(self, id: _Optional[int] = ..., delta: _Optional[_Union[_common_pb2.TokenDelta, _Mapping]] = ..., error: _Optional[_Union[Error, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("code", "message", "param")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    PARAM_FIELD_NUMBER: _ClassVar[int]
    code: str
    message: str
    param: str
    def __init__(self, code: _Optional[str] = ..., message: _Optional[str] = ..., param: _Optional[str] = ...) -> None: ...

class DecodeRequest(_message.Message):
    __slots__ = ("request_id", "handle", "prompt_token_ids", "sampling", "adapter_digest", "kv_timeout", "adapter", "choices", "cache_salt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    KV_TIMEOUT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    handle: str
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: _common_pb2.Sampling
    adapter_digest: str
    kv_timeout: float
    adapter: _common_pb2.AdapterRef
    choices: _containers.RepeatedCompositeFieldContainer[DecodeChoice]
    cache_salt: str
    def __init__(self, request_id: _Optional[str] = ..., handle: _Optional[str] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[_common_pb2.Sampling, _Mapping]] = ..., adapter_digest: _Optional[str] = ..., kv_timeout: _Optional[float] = ..., adapter: _Optional[_Union[_common_pb2.AdapterRef, _Mapping]] = ..., choices: _Optional[_Iterable[_Union[DecodeChoice, _Mapping]]] = ..., cache_salt: _Optional[str] = ...) -> None: ...

class DecodeChoice(_message.Message):
    __slots__ = ("id", "index", "output_token_ids")
    ID_FIELD_NUMBER: _ClassVar[int]
    INDEX_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    index: int
    output_token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, id: _Optional[int] = ..., index: _Optional[int] = ..., output_token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class ReleaseRequest(_message.Message):
    __slots__ = ("handle",)
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    handle: str
    def __init__(self, handle: _Optional[str] = ...) -> None: ...

class ReleaseReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("interval", "content_address", "wanted", "unwanted", "slot_wait_ms")
    INTERVAL_FIELD_NUMBER: _ClassVar[int]
    CONTENT_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WANTED_FIELD_NUMBER: _ClassVar[int]
    UNWANTED_FIELD_NUMBER: _ClassVar[int]
    SLOT_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    interval: float
    content_address: str
    wanted: _containers.RepeatedScalarFieldContainer[str]
    unwanted: _containers.RepeatedScalarFieldContainer[str]
    slot_wait_ms: int
    def __init__(self, interval: _Optional[float] = ..., content_address: _Optional[str] = ..., wanted: _Optional[_Iterable[str]] = ..., unwanted: _Optional[_Iterable[str]] = ..., slot_wait_ms: _Optional[int] = ...) -> None: ...

class StatusUpdate(_message.Message):
    __slots__ = ("whole", "draining", "running", "kv_blocks_used", "staging_bytes_used", "staging_bytes_fit", "open_handles", "preemptions", "other_prompts", "other_sequences", "adapters", "tiers", "other_prompt_tokens", "stalled_seconds", "other_slot_wait_ms")
    WHOLE_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_USED_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_USED_FIELD_NUMBER: _ClassVar[int]
    STAGING_BYTES_FIT_FIELD_NUMBER: _ClassVar[int]
    OPEN_HANDLES_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    OTHER_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SEQUENCES_FIELD_NUMBER: _ClassVar[int]
    ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    OTHER_PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STALLED_SECONDS_FIELD_NUMBER: _ClassVar[int]
    OTHER_SLOT_WAIT_MS_FIELD_NUMBER: _ClassVar[int]
    whole: bool
    draining: bool
    running: int
    kv_blocks_used: int
    staging_bytes_used: int
    staging_bytes_fit: int
    open_handles: int
    preemptions: int
    other_prompts: int
    other_sequences: int
    adapters: _containers.RepeatedCompositeFieldContainer[AdapterStatus]
    tiers: TierTotals
    other_prompt_tokens: int
    stalled_seconds: int
    other_slot_wait_ms: int
    def __init__(self, whole: _Optional[bool] = ..., draining: _Optional[bool] = ..., running: _Optional[int] = ..., kv_blocks_used: _Optional[int] = ..., staging_bytes_used: _Optional[int] = ..., staging_bytes_fit: _Optional[int] = ..., open_handles: _Optional[int] = ..., preemptions: _Optional[int] = ..., other_prompts: _Optional[int] = ..., other_sequences: _Optional[int] = ..., adapters: _Optional[_Iterable[_Union[AdapterStatus, _Mapping]]] = ..., tiers: _Optional[_Union[TierTotals, _Mapping]] = ..., other_prompt_tokens: _Optional[int] = ..., stalled_seconds: _Optional[int] = ..., other_slot_wait_ms: _Optional[int] = ...) -> None: ...

class AdapterStatus(_message.Message):
    __slots__ = ("digest", "state", "other_prompts")
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    OTHER_PROMPTS_FIELD_NUMBER: _ClassVar[int]
    digest: bytes
    state: AdapterState
    other_prompts: int
    def __init__(self, digest: _Optional[bytes] = ..., state: _Optional[_Union[AdapterState, str]] = ..., other_prompts: _Optional[int] = ...) -> None: ...

class TierTotals(_message.Message):
    __slots__ = ("slots_used", "host_adapters", "host_bytes", "host_bytes_total", "disk_bytes", "host_evictions", "disk_evictions", "hits", "loads", "load_seconds")
    class HitsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LoadsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    class LoadSecondsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    SLOTS_USED_FIELD_NUMBER: _ClassVar[int]
    HOST_ADAPTERS_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_TOTAL_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_FIELD_NUMBER: _ClassVar[int]
    HOST_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    DISK_EVICTIONS_FIELD_NUMBER: _ClassVar[int]
    HITS_FIELD_NUMBER: _ClassVar[int]
    LOADS_FIELD_NUMBER: _ClassVar[int]
    LOAD_SECONDS_FIELD_NUMBER: _ClassVar[int]
    slots_used: int
    host_adapters: int
    host_bytes: int
    host_bytes_total: int
    disk_bytes: int
    host_evictions: int
    disk_evictions: int
    hits: _containers.ScalarMap[str, int]
    loads: _containers.ScalarMap[str, int]
    load_seconds: _containers.ScalarMap[str, float]
    def __init__(self, slots_used: _Optional[int] = ..., host_adapters: _Optional[int] = ..., host_bytes: _Optional[int] = ..., host_bytes_total: _Optional[int] = ..., disk_bytes: _Optional[int] = ..., host_evictions: _Optional[int] = ..., disk_evictions: _Optional[int] = ..., hits: _Optional[_Mapping[str, int]] = ..., loads: _Optional[_Mapping[str, int]] = ..., load_seconds: _Optional[_Mapping[str, float]] = ...) -> None: ...
