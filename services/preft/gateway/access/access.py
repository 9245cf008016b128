"""From a request's `Authorization` to its caller."""

from __future__ import annotations

from collections.abc import Callable

from preft.core.errors import Unauthenticated
from preft.core.ports import AdapterCatalog
from preft.gateway.access.caller import Caller
from preft.gateway.access.keys import Keys
from preft.gateway.access.tenant_catalog import TenantCatalog

SCHEME = "bearer"


class Access:
    """The callers of one gateway, by their keys."""

    def __init__(self, keys: Callable[[], Keys], catalog: AdapterCatalog) -> None:
        """`keys` returns the keys of this moment: the same object until they change."""
        self._keys = keys
        self._catalog = catalog
        self._seen: Keys | None = None
        self._callers: dict[str, Caller] = {}  # by the key's name; kept for their catalogs' lists

    def caller(self, authorization: str | None) -> Caller:
        """The sender of a request with this header, or with this metadata in gRPC. Raises Unauthenticated."""
        keys = self._keys()
        if keys is not self._seen:
            self._seen, self._callers = keys, {}
        scheme, _, secret = (authorization or "").strip().partition(" ")
        if scheme.lower() != SCHEME or not secret.strip():
            raise Unauthenticated(
                "You didn't provide an API key. Send it as a header or as metadata: `Authorization: Bearer YOUR_KEY`."
            )
        key = keys.find(secret.strip())
        if key is None:
            raise Unauthenticated("Incorrect API key provided. The server's operator knows its keys.")
        if key.name not in self._callers:
            self._callers[key.name] = Caller(TenantCatalog(self._catalog, key), key)
        return self._callers[key.name]
