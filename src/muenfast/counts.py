"""What the counters of a disk's directions say: rates between two looks, and percentiles of latencies.

A direction is a dictionary as in the output of `muenfast stat --json` (docs/operations.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

DIRECTIONS = ("read", "write", "discard", "flush")


def percentile(latency: Mapping[str, Any], share: float) -> float | None:
    """Microseconds within which that share (0 to 1) of the requests was answered, None where none was measured.

    Within a class, which reaches from half its end to its end, requests are taken for evenly spread; of the last, which
    has no end, the beginning counts.
    """
    counts: Sequence[int] = latency["counts"]
    wanted = share * sum(counts)
    for k, count in enumerate(counts):
        if count and wanted <= count:
            end = latency["least_ns"] << k
            begin = end // 2 if k else 0
            return begin / 1e3 if k == len(counts) - 1 else (begin + (end - begin) * wanted / count) / 1e3
        wanted -= count
    return None


def since(direction: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    """What was counted after `before`, in the same form; all of it where that is None or of another life."""
    if before is None or before["requests"] > direction["requests"]:
        return dict(direction)
    found: dict[str, Any] = {name: direction[name] - before[name] for name in ("requests", "bytes", "merged")
                             if name in direction}
    found["errors"] = {name: count - before["errors"].get(name, 0) for name, count in direction["errors"].items()}
    found["latency"] = direction["latency"] | {"counts": [
        now - then for now, then in zip(direction["latency"]["counts"], before["latency"]["counts"], strict=True)]}
    return dict(direction) | found


def rates(direction: Mapping[str, Any], seconds: float) -> dict[str, Any]:
    """Of what was counted in so many seconds: numbers per second, requests under way now, and percentiles in
    microseconds."""
    found: dict[str, Any] = {f"{name}_per_second": round(direction[name] / seconds, 3)
                             for name in ("requests", "bytes", "merged") if name in direction}
    found["errors_per_second"] = round(sum(direction["errors"].values()) / seconds, 3)
    found["errors"] = {name: count for name, count in direction["errors"].items() if count}
    found["depth"] = direction["depth"]
    for name, share in (("p50_us", 0.5), ("p99_us", 0.99)):
        value = percentile(direction["latency"], share)
        found[name] = None if value is None else round(value, 3)
    return found
