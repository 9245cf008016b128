"""The state stores of a cluster's processes, as the settings name them: where registrations are, and where the catalog.

Each process opens its own. Without the setting `state`, both are SQLite files in `state_dir`, and each base model has
its own catalog file. With the setting, both are in the store that it names, under the base model's identity.
"""

from __future__ import annotations

from pathlib import Path

from preft.cluster.model import model_identity
from preft.core.limits import LimitCounter
from preft.core.ports import StateStore
from preft.core.settings import Settings
from preft.state import open_limit_counter, open_store

REGISTRATIONS = "state.sqlite"  # in state_dir
CATALOG = "catalog.sqlite"  # in the model's folder


def open_registrations(settings: Settings) -> StateStore:
    """The store of the workers' registrations. Call inside the event loop. Raises ConfigError."""
    if settings.state is None:
        return open_store(settings.state_dir / REGISTRATIONS)
    return open_store(settings.state.get_secret_value(), _cluster(settings))


def open_catalog_store(settings: Settings) -> StateStore:
    """The store of the base model's adapter catalog. Call inside the event loop. Raises ConfigError."""
    if settings.state is not None:
        return open_store(settings.state.get_secret_value(), _cluster(settings))
    folder = model_folder(settings)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    return open_store(folder / CATALOG, _cluster(settings))


def open_limits(settings: Settings) -> LimitCounter:
    """The counter of API keys' limits. Call inside the event loop. Raises ConfigError."""
    return open_limit_counter(
        settings.state.get_secret_value() if settings.state is not None else None, _cluster(settings)
    )


def model_folder(settings: Settings) -> Path:
    """The folder in `state_dir` of what belongs to the base model alone."""
    return settings.state_dir / "models" / _cluster(settings)


def _cluster(settings: Settings) -> str:
    return model_identity(settings.model)[:16]
