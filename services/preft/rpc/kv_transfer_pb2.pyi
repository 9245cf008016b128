from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Optional as _Optional

DESCRIPTOR: _descriptor.FileDescriptor

class KvFrame(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class KvHeader(_message.Message):
    __slots__ = ("handle", "fingerprint", "adapter_digest", "num_tokens", "num_bytes", "checksum", "uses", "prompt_hash")
    HANDLE_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_DIGEST_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    USES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_HASH_FIELD_NUMBER: _ClassVar[int]
    handle: str
    fingerprint: str
    adapter_digest: str
    num_tokens: int
    num_bytes: int
    checksum: int
    uses: int
    prompt_hash: bytes
    def __init__(self, handle: _Optional[str] = ..., fingerprint: _Optional[str] = ..., adapter_digest: _Optional[str] = ..., num_tokens: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., uses: _Optional[int] = ..., prompt_hash: _Optional[bytes] = ...) -> None: ...

class PushReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
