"""docs/configuration.md has every setting with its default and its flag, and nothing else."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from preft.cli.settings_flags import FLAGS, option
from preft.core.settings import Settings

PAGE = Path(__file__).parents[3] / "docs" / "configuration.md"
ROW = re.compile(r"^\| (`[^|]+`) \| ([^|]+) \| ([^|]*)\| [^|]+ \|$", re.MULTILINE)


def documented() -> dict[str, tuple[str, str]]:
    """Dotted setting -> (default, flag), as the tables say. A row with two settings may have two flags."""
    rows = {}
    for names, default, flag in ROW.findall(PAGE.read_text()):
        keys, flags = re.findall(r"`([^`]+)`", names), re.findall(r"`(--[^`]+)`", flag)
        for position, key in enumerate(keys):
            assert key not in rows, f"{key} has two rows"
            rows[key] = (default.strip(), flags[position] if flags else "")
    return rows


def real(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Dotted setting -> default; PydanticUndefined for required ones."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from real(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name, field.get_default(call_default_factory=True)


def test_every_setting_is_there_and_no_other() -> None:
    assert set(documented()) == {key for key, _ in real(Settings)}


def test_defaults_are_the_real_ones() -> None:
    page = documented()
    for key, default in real(Settings):
        said = page[key][0]
        if default is PydanticUndefined:
            assert said == "required", key
        elif default is not None:  # None: the page says in words what it stands for
            assert said.strip("`").lower() == str(default).lower(), key


def test_flags_are_the_real_ones() -> None:
    flags = {flag.setting: option(name) for name, flag in FLAGS.items()}
    flags["adapters"] = "--adapter NAME=SOURCE"
    assert {key: flag for key, (_, flag) in documented().items() if flag} == flags
