"""The adapter catalog as one API key sees it: its tenant's adapters and the shared ones, as far as it may use them.

Everything else doesn't exist for the key: no answer depends on it. A tenant's adapter hides a shared one that got its
name later. An operator's key sees the adapters of all tenants, under their full names.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace as changed
from itertools import islice, takewhile
from operator import attrgetter
from pathlib import Path

from preft.core.cluster import Adapter
from preft.core.errors import AdapterExists, ModelNotFound, NotAllowed
from preft.core.names import full_name, normal_name, split_name
from preft.core.ports import AdapterCatalog, Progress
from preft.gateway.access.keys import ApiKey


class TenantCatalog:
    """An AdapterCatalog. Its entries have their names without the tenant, unless an operator sees them."""

    def __init__(self, inner: AdapterCatalog, key: ApiKey) -> None:
        self._inner = inner
        self._key = key
        self._seen: Sequence[Adapter] | None = None  # the inner list of which `_visible` was made
        self._visible: Sequence[Adapter] = ()

    def get(self, name: str) -> Adapter | None:
        """The tenant's adapter of this name, or else the shared one."""
        name = normal_name(name)
        is_visible = self._key.may_use(name) and (self._key.is_operator or not name.startswith("@"))
        if not is_visible:
            return self._inner.get("")  # raises, whatever the name, if the catalog is out of date
        if self._key.tenant and (own := self._inner.get(full_name(self._key.tenant, name))) is not None:
            return changed(own, name=name)
        return self._inner.get(name)

    def list(self) -> Sequence[Adapter]:
        """All of them, by name. Costs no time for the adapters of other tenants."""
        entries = self._inner.list()
        if entries is not self._seen:
            self._seen, self._visible = entries, tuple(self._of(entries))
        return self._visible

    def _of(self, entries: Sequence[Adapter]) -> Sequence[Adapter]:
        """The visible ones of `entries`, which are in the order of their full names."""
        if self._key.is_operator:
            return [entry for entry in entries if self._key.may_use(entry.name)]
        places = [bisect_left(entries, name, key=attrgetter("name")) for name in ("@", "A")]  # those of all tenants
        by_name = {entry.name: entry for entry in (*entries[: places[0]], *entries[places[1] :])}
        if self._key.tenant:
            beginning = full_name(self._key.tenant, "")
            start = bisect_left(entries, beginning, key=attrgetter("name"))
            for entry in takewhile(lambda one: one.name.startswith(beginning), islice(entries, start, None)):
                name = entry.name.removeprefix(beginning)
                by_name[name] = changed(entry, name=name)
        return [adapter for name, adapter in sorted(by_name.items()) if self._key.may_use(name)]

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        tenant_bytes: int | None = None,
    ) -> Adapter:
        """Adds an adapter of the tenant. Raises NotAllowed for a name that the key may not use.

        Raises AdapterExists for the name of a shared adapter: until all gateways have heard of the tenant's new one,
        some would answer with the shared one.
        """
        full, most = self._new_name(name), self._least(tenant_bytes)
        return self._seen_by_tenant(
            await self._inner.add(full, source, replace=replace, progress=progress, tenant_bytes=most)
        )

    async def add_archive(
        self, name: str, archive: Path, *, replace: bool = False, tenant_bytes: int | None = None
    ) -> Adapter:
        full, most = self._new_name(name), self._least(tenant_bytes)
        return self._seen_by_tenant(await self._inner.add_archive(full, archive, replace=replace, tenant_bytes=most))

    async def pin(self, name: str, pinned: bool) -> Adapter:
        """Raises NotAllowed for a shared adapter."""
        return self._seen_by_tenant(await self._inner.pin(self._own_name(name), pinned))

    async def remove(self, name: str) -> Adapter:
        """Raises NotAllowed for a shared adapter."""
        return self._seen_by_tenant(await self._inner.remove(self._own_name(name)))

    def _new_name(self, name: str) -> str:
        if not self._key.may_use(normal_name(name)):
            raise NotAllowed(f"the API key {self._key.name!r} may not use adapters of this name")
        full = full_name(self._key.tenant, name)
        if self._key.tenant and self._inner.get(full) is None and self.get(name) is not None:
            raise AdapterExists(f"a shared adapter is named {name!r}: choose another name")
        return full

    def _own_name(self, name: str) -> str:
        """The full name of the tenant's adapter. Raises ModelNotFound and NotAllowed."""
        found = self.get(name)
        if found is None:
            raise ModelNotFound(f"no adapter is named {name!r}")
        full = full_name(self._key.tenant, found.name)
        if self._key.tenant and self._inner.get(full) is None:
            raise NotAllowed(f"the adapter {name!r} is shared: only a key without a tenant may change it")
        return full

    def _least(self, tenant_bytes: int | None) -> int | None:
        return min((limit for limit in (tenant_bytes, self._key.adapter_bytes) if limit is not None), default=None)

    def _seen_by_tenant(self, adapter: Adapter) -> Adapter:
        return adapter if self._key.is_operator else changed(adapter, name=split_name(adapter.name)[1])
