"""The adapter catalog as one API key sees it: its tenant's adapters and the shared ones, as far as it may use them.

Everything else doesn't exist for the key: no answer depends on it. A tenant's adapter hides a shared one of its name.
An operator's key sees the adapters of all tenants, under their full names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace as changed
from pathlib import Path

from preft.core.cluster import Adapter
from preft.core.errors import ModelNotFound, NotAllowed
from preft.core.names import full_name, normal_name, split_name
from preft.core.ports import AdapterCatalog, Progress
from preft.gateway.access.keys import ApiKey


class TenantCatalog:
    """An AdapterCatalog. Its entries have their names without the tenant, unless an operator sees them."""

    def __init__(self, inner: AdapterCatalog, key: ApiKey) -> None:
        self._inner = inner
        self._key = key
        self._seen: Sequence[Adapter] | None = None  # the inner list of which `_own` was made
        self._own: Sequence[Adapter] = ()

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
        """All of them, by name."""
        entries = self._inner.list()
        if entries is not self._seen:
            visible: dict[str, Adapter] = {}
            for entry in entries:  # shared ones and tenants' ones in any order
                tenant, name = ("", entry.name) if self._key.is_operator else split_name(entry.name)
                if tenant in ("", self._key.tenant) and self._key.may_use(name) and (tenant or name not in visible):
                    visible[name] = changed(entry, name=name) if tenant else entry
            self._seen, self._own = entries, tuple(adapter for _, adapter in sorted(visible.items()))
        return self._own

    async def add(
        self,
        name: str,
        source: str,
        *,
        replace: bool = False,
        progress: Progress | None = None,
        tenant_bytes: int | None = None,
    ) -> Adapter:
        """Adds an adapter of the tenant. Raises NotAllowed for a name that the key may not use."""
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
        return full_name(self._key.tenant, name)

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
