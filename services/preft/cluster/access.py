"""A gateway's API keys, limits and records of usage, as the settings name them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from prometheus_client import CollectorRegistry

from preft.cluster.stores import open_limits
from preft.core.background import Background
from preft.core.ports import AdapterCatalog
from preft.core.settings import Settings
from preft.gateway.access.access import Access
from preft.gateway.access.accounts import Accounts
from preft.gateway.access.key_file import LOOK_SECONDS, KeyFile
from preft.gateway.access.usage import Recorder, UsageLog, UsageMetrics


@dataclass(frozen=True, slots=True)
class OpenedAccess:
    """For GatewayDeps: None is what the settings don't name."""

    access: Access | None = None
    accounts: Accounts | None = None


@asynccontextmanager
async def open_access(
    settings: Settings, catalog: AdapterCatalog, registry: CollectorRegistry
) -> AsyncIterator[OpenedAccess]:
    """Follows the file of keys within the context; the end settles all accounts and writes all records.

    Raises ConfigError for a file that can't be used.
    """
    if settings.api_keys is None and settings.usage_log is None:
        yield OpenedAccess()
        return
    async with AsyncExitStack() as stack:
        access, recorders = None, list[Recorder]()
        if settings.api_keys is not None:
            file = KeyFile(settings.api_keys)
            access = Access(lambda: file.keys, catalog)
            recorders.append(UsageMetrics(registry))
            background = Background()
            stack.push_async_callback(background.close)
            background.every(LOOK_SECONDS, file.look, "the API keys are not followed")
        if settings.usage_log is not None:
            log = UsageLog(settings.usage_log)
            stack.callback(log.close)
            recorders.append(log)
        counter = open_limits(settings)
        stack.push_async_callback(counter.close)
        accounts = Accounts(counter, recorders)
        stack.push_async_callback(accounts.close)
        yield OpenedAccess(access, accounts)
