"""The secret that all processes of a cluster share: the codes of callers, and the proofs of KV receivers.

The secret itself never travels. A call carries a code made of the secret and the called worker's address. A stranger
on a dead worker's port gets only this code, and other workers refuse it. With certificates (`tls`), each connection is
encrypted, and both sides show a certificate first. Without them, a code that was read on the network works again for
its address.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc
import grpc.aio

from preft.core.settings import host_and_port
from preft.rpc.tls import NAME, Certificates, Pem

CALL_KEY = "preft-cluster-call"
CALLER_KEY = "preft-caller"  # the calling process, for counts of use by caller
PROOF_KEY = "preft-cluster-proof"
HEALTH = "/grpc.health.v1.Health/"  # for probes without the secret; the reply only says whether a service runs


class ClusterSecret:
    """One cluster's secret, and this process's certificates, if it has any. Neither `repr` nor an error shows it."""

    __slots__ = ("_key", "certificates")

    def __init__(self, secret: str, certificates: Certificates | None = None) -> None:
        self._key = hashlib.sha256(secret.encode()).digest()
        self.certificates = certificates

    def call_code(self, address: str) -> str:
        return self._code("call", address)

    def proof(self, handle: str) -> str:
        """The receiver's proof, sent before the first byte of KV is pushed to it under `handle`."""
        return self._code("receive", handle)

    def _code(self, use: str, what: str) -> str:
        return hmac.new(self._key, f"{use} {what}".encode(), hashlib.sha256).hexdigest()


class OnlyTheCluster(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without this worker's call code, except health checks. Call `listen` before the server's start."""

    def __init__(self, secret: ClusterSecret) -> None:
        self._secret = secret
        self._code: str | None = None

    def listen(self, server: grpc.aio.Server, host: str, port: int = 0, advertise_host: str | None = None) -> str:
        """Opens a port of `host`, and returns the address that callers use: `host:port` as registered.

        `port` 0 is any free one. `advertise_host` replaces `host` in the address. Raises RuntimeError if the port can't
        be opened.
        """
        place, certificates = host_and_port(host, port), self._secret.certificates
        if certificates is None:
            port = server.add_insecure_port(place)
        else:
            port = server.add_secure_port(place, certificates.server_credentials())
        address = host_and_port(advertise_host or host, port)
        self._code = self._secret.call_code(address)
        return address

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: grpc.HandlerCallDetails
    ) -> Any:
        if handler_call_details.method.startswith(HEALTH) or self._is_known(handler_call_details.invocation_metadata):
            return await continuation(handler_call_details)
        return _REFUSAL

    def _is_known(self, metadata: Sequence[tuple[str, str | bytes]] | None) -> bool:
        shown = dict(metadata or ()).get(CALL_KEY)
        return self._code is not None and isinstance(shown, str) and equal_codes(shown, self._code)


class ClusterChannel:
    """A channel to the worker at `address` that adds the call code to each call.

    After a change of the certificates, new calls open a new connection. Running calls stay on theirs, which ends with
    the last of them; `close` doesn't cancel these.
    With grpc.aio, a client interceptor would put a queue and a task around each stream.
    """

    def __init__(
        self, address: str, secret: ClusterSecret, options: Sequence[tuple[str, Any]] = (), *, caller: str = ""
    ) -> None:
        """`caller` names this process to the worker, which counts its use of the worker."""
        # Without "dns:" gRPC would read a host named unix as an address scheme.
        self._target = f"dns:///{address}"
        self._options = list(options)
        self._certificates = secret.certificates
        self._metadata = ((CALL_KEY, secret.call_code(address)), (CALLER_KEY, caller))
        self._channel, self._pem = self._open()

    def unary_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._carrying("unary_unary", *method, **options)

    def unary_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._carrying("unary_stream", *method, **options)

    def stream_unary(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._carrying("stream_unary", *method, **options)

    def stream_stream(self, *method: Any, **options: Any) -> Callable[..., Any]:
        return self._carrying("stream_stream", *method, **options)

    async def close(self, grace: float | None = None) -> None:
        await self._channel.close(grace)

    async def __aenter__(self) -> ClusterChannel:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    def _open(self) -> tuple[grpc.aio.Channel, Pem | None]:
        if self._certificates is None:
            return grpc.aio.insecure_channel(self._target, options=self._options), None
        pem = self._certificates.current()
        options = [*self._options, ("grpc.ssl_target_name_override", NAME)]
        return grpc.aio.secure_channel(self._target, pem.for_channel(), options), pem

    def _renew(self) -> None:
        """Replaces a channel of an older certificate: it couldn't connect again once that has expired."""
        if self._certificates is not None and self._certificates.current() is not self._pem:
            self._channel, self._pem = self._open()

    def _carrying(self, kind: str, *method: Any, **options: Any) -> Callable[..., Any]:
        pem, callable_ = self._pem, getattr(self._channel, kind)(*method, **options)

        def call(*request: Any, metadata: Sequence[tuple[str, str | bytes]] = (), **given: Any) -> Any:
            nonlocal pem, callable_
            self._renew()
            if pem is not self._pem:
                pem, callable_ = self._pem, getattr(self._channel, kind)(*method, **options)
            return callable_(*request, metadata=(*metadata, *self._metadata), **given)

        return call


def equal_codes(one: str, other: str) -> bool:
    """Compares in constant time."""
    return hmac.compare_digest(one.encode(), other.encode())


async def _refuse(_: Any, context: grpc.aio.ServicerContext) -> None:
    await context.abort(grpc.StatusCode.UNAUTHENTICATED, "the caller has another cluster_secret than this worker")


_REFUSAL = grpc.stream_stream_rpc_method_handler(_refuse)  # this kind of handler ends without reading a message
