"""Sizes and durations as people write them: `4GiB`, `512MB`, `30s`, `5m`. Numbers without a unit are bytes and seconds.

pydantic's ByteSize would read `1,5GiB` as 1 byte and `4GiB garbage` as 4 GiB.
"""

from __future__ import annotations

import re
from fractions import Fraction

_NUMBER_AND_UNIT = re.compile(r"\s*([0-9]{1,30}(?:\.[0-9]{1,30})?)\s*([A-Za-z]*)\s*")
_BINARY = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
_SIZES = {**_BINARY, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_TIMES = {"ms": Fraction(1, 1000), "s": Fraction(1), "m": Fraction(60), "h": Fraction(3600)}
_SIZES_IN_LOWER_CASE = {"": 1, **{name.lower(): size for name, size in _SIZES.items()}}


def read_bytes(value: object) -> object:
    """The bytes in a text such as `1.5GiB`, rounded down; other types pass. Case doesn't matter. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = _NUMBER_AND_UNIT.fullmatch(value)
    unit = _SIZES_IN_LOWER_CASE.get(found[2].lower()) if found else None
    if found is None or unit is None or (unit == 1 and "." in found[1]):
        raise ValueError(
            f"{value!r} is not a size: write a number of bytes, or a number with a unit, such as 4GiB "
            f"(units: {', '.join(_SIZES)})"
        )
    return int(Fraction(found[1]) * unit)


def read_seconds(value: object) -> object:
    """The seconds in a text such as `5m`; other types pass. Raises ValueError."""
    if not isinstance(value, str):
        return value
    found = _NUMBER_AND_UNIT.fullmatch(value)
    unit = _TIMES.get(found[2] or "s") if found else None
    if found is None or unit is None:
        raise ValueError(
            f"{value!r} is not a duration: write a number of seconds, or a number with a unit, such as 30s "
            f"(units: {', '.join(_TIMES)})"
        )
    return float(Fraction(found[1]) * unit)
