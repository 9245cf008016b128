"""Service level objectives: limits that a good answer keeps."""

from __future__ import annotations

from dataclasses import dataclass

from preft_loadgen.errors import InvalidArgument
from preft_loadgen.measure.record import Record

UNITS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "": 1.0}


@dataclass(frozen=True, slots=True)
class Slo:
    """Limits in seconds; None: no limit. `itl` is a request's mean inter-token latency, `tpot` the same by tokens."""

    ttft: float | None = None
    itl: float | None = None
    tpot: float | None = None
    e2e: float | None = None

    def kept(self, record: Record) -> bool:
        """Whether the request was answered within all limits."""
        if not record.answered:
            return False
        tokens = sum(record.counts)
        mean = sum(record.gaps) / tokens if tokens else 0.0
        seen = ((self.ttft, record.ttft), (self.itl, mean), (self.tpot, record.tpot or 0.0), (self.e2e, record.seconds))
        return all(limit is None or value <= limit for limit, value in seen)

    def __str__(self) -> str:
        limits = {name: getattr(self, name) for name in ("ttft", "itl", "tpot", "e2e")}
        return ",".join(f"{name}={value:g}" for name, value in limits.items() if value is not None)


def parse_slo(text: str) -> Slo:
    """From `ttft=500ms,itl=0.05`: seconds without a unit. Raises InvalidArgument."""
    limits: dict[str, float] = {}
    for part in text.split(","):
        name, _, value = part.strip().partition("=")
        number = value.rstrip("mus")
        try:
            limit = float(number) * UNITS[value[len(number) :]]
        except (ValueError, KeyError):
            limit = -1.0
        if name not in Slo.__slots__ or name in limits or not 0 < limit < float("inf"):
            raise InvalidArgument(f"an SLO looks like ttft=500ms,itl=50ms (also: tpot, e2e), not {text!r}")
        limits[name] = limit
    return Slo(**limits)
