"""The sender of a request: what it sees, and what it may do. Without API keys, everybody is an operator."""

from __future__ import annotations

from dataclasses import dataclass

from preft.core.errors import NotAllowed
from preft.core.ports import AdapterCatalog
from preft.gateway.access.keys import ApiKey


@dataclass(frozen=True, slots=True)
class Caller:
    """`catalog` has the adapters that exist for this caller. `key` None: the server has no API keys."""

    catalog: AdapterCatalog
    key: ApiKey | None = None

    @property
    def tenant(self) -> str:
        return "" if self.key is None else self.key.tenant

    @property
    def is_operator(self) -> bool:
        return self.key is None or self.key.is_operator

    def share(self, user: str) -> str:
        """The name under which the caller's requests share the workers with others: the tenant's, or else `user`."""
        return user if self.key is None else self.key.tenant

    def check_admin(self) -> AdapterCatalog:
        """The catalog, to be changed. Raises NotAllowed."""
        if self.key is not None and not self.key.admin:
            raise NotAllowed(f"the API key {self.key.name!r} may not change adapters: that needs `admin: true`")
        return self.catalog

    def check_operator(self) -> None:
        """Raises NotAllowed if the caller may not see the figures of the whole cluster."""
        if not self.is_operator and self.key is not None:
            raise NotAllowed(
                f"the API key {self.key.name!r} may not see the cluster: that needs `admin: true` and no tenant"
            )
