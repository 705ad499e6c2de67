"""How a device fares: temperature, memory, and the pace of the newest predictions."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from edgekit.devices.counts import Counts
from edgekit.messages import DelegateHealth, HealthMessage, Percentiles, SpoolHealth

if TYPE_CHECKING:
    from edgekit.devices.pipeline import Pipeline
    from edgekit.devices.results import Marks

# Predictions that are remembered, and for how long they count as recent.
_MOST, _RECENT_S = 1024, 10.0
# Of the time from a frame to its prediction: waiting to be taken up, and so on; and what came after it.
STAGES = ("wait", "preprocess", "inference", "decode", "publish")


class Recent:
    """When the newest predictions were made, and how long they took. One thread adds, any may ask."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        # Arrays, which another thread may copy at any time.
        self._at_s, self._s = np.zeros(_MOST), np.zeros((_MOST, len(STAGES) + 1))
        self._count = 0

    def add(self, marks: Marks) -> None:
        """A prediction was made."""
        place = self._count % _MOST
        self._s[place] = (*marks.stages_s(), 0.0, marks.decoded_s - marks.captured_s)
        self._at_s[place] = marks.decoded_s
        self._count += 1

    def published(self, took_s: float) -> None:
        """It has been given to the publisher, which took so long."""
        self._s[(self._count - 1) % _MOST, -2] = took_s

    def fps(self) -> float:
        """Predictions a second, in the last ten seconds."""
        now_s, at_s = time.monotonic(), self._at_s[: self._count].copy()
        recent = at_s[at_s > now_s - _RECENT_S]
        span_s = now_s - float(recent.min()) if len(recent) == _MOST else min(now_s - self._began_s, _RECENT_S)
        return round(len(recent) / max(span_s, 1e-3), 2)

    def total_s(self) -> npt.NDArray[np.float64]:
        """From the frame to the finished prediction, (predictions,)."""
        return self._s[: self._count, -1].copy()

    def stages_ms(self) -> dict[str, Percentiles]:
        seconds = self._s[: self._count, : len(STAGES)].copy()
        return {stage: percentiles_ms(seconds[:, place]) for place, stage in enumerate(STAGES)}


def percentiles_ms(seconds: npt.NDArray[np.float64]) -> Percentiles:
    if not len(seconds):
        return Percentiles(None, None, None)
    return Percentiles(*(1e3 * np.percentile(seconds, [50, 95, 99])).round(3).tolist())


def rss_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None


def device_health(
    pipelines: Mapping[str, Pipeline], past: Counts, spool: SpoolHealth, cpu_temp_c: float | None, began_s: float
) -> HealthMessage:
    """Of each stream, and of all. ``past``: of streams that are no more. ``began_s`` is when the run began, on the
    monotonic clock."""
    streams = {name: pipeline.health() for name, pipeline in pipelines.items()}
    each = list(streams.values())
    dropped = Counter(past.dropped_by_cause)
    for one in each:
        dropped.update(one.dropped)
    delegates = [one.delegate for one in each]
    taken = [one.operators_delegated for one in delegates]
    return HealthMessage(
        schema="edgekit.health/1",
        captured=past.captured + sum(one.captured for one in each),
        inferred=past.inferred + sum(one.inferred for one in each),
        dropped=dict(dropped),
        failed=past.failed + sum(one.failed for one in each),
        in_flight=past.in_flight + sum(one.in_flight for one in each),
        fps=round(sum(one.fps for one in each), 2),
        latency_ms=percentiles_ms(np.concatenate([pipeline.recent.total_s() for pipeline in pipelines.values()])),
        spool=spool,
        delegate=DelegateHealth(
            requested=_joined(one.requested for one in delegates),
            active=_joined(one.active for one in delegates),
            operators_delegated=None if None in taken else sum(filter(None, taken)),
            operators=sum(one.operators or 0 for one in delegates),
        ),
        streams=streams,
        cpu_temp_c=cpu_temp_c,
        rss_bytes=rss_bytes(),
        uptime_s=round(time.monotonic() - began_s, 1),
    )


def _joined(names: Iterable[str]) -> str:
    return ",".join(dict.fromkeys(names))
