"""The messages of the public gRPC services, made from their descriptors in `api.binpb` (`make proto` writes the file).

They live in a descriptor pool of their own. In protobuf's default pool, the server's package registers files with the
same messages: both packages, also of different versions, can be imported in one process.
"""

from __future__ import annotations

from importlib.resources import files
from typing import Any

from google.protobuf.descriptor_pb2 import FileDescriptorSet
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass

PACKAGE = "preft.v1"


def _pool() -> DescriptorPool:
    pool = DescriptorPool()
    for file in FileDescriptorSet.FromString(files(__package__).joinpath("api.binpb").read_bytes()).file:
        pool.Add(file)
    return pool


_POOL = _pool()


def message_class(name: str) -> Any:
    """The class of the message `preft.v1.NAME`. Raises KeyError."""
    return GetMessageClass(_POOL.FindMessageTypeByName(f"{PACKAGE}.{name}"))
