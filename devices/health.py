"""How a device fares: temperature, memory, and the pace of the newest predictions."""

from __future__ import annotations

import os
import re
import time
from pathlib import Path

import numpy as np

from edgekit.messages import Percentiles

# Predictions that are remembered, and for how long they count as recent.
_MOST, _RECENT_S = 1024, 10.0
# Types of thermal zones that are of the processor: cpu-thermal (Raspberry Pi, Jetson), x86_pkg_temp, soc-thermal.
_OF_CPU = re.compile(r"cpu|pkg|soc", re.IGNORECASE)


class Recent:
    """When the newest predictions were made, and how long they took. One thread adds, any may ask."""

    def __init__(self) -> None:
        self._began_s = time.monotonic()
        # Arrays, which another thread may copy at any time.
        self._at_s, self._ms = np.zeros(_MOST), np.zeros(_MOST)
        self._count = 0

    def add(self, total_ms: float) -> None:
        """A prediction was made now, and took so long."""
        place = self._count % _MOST
        self._at_s[place], self._ms[place] = time.monotonic(), total_ms
        self._count += 1

    def fps(self) -> float:
        """Predictions a second, in the last ten seconds."""
        now_s, at_s = time.monotonic(), self._at_s[: self._count].copy()
        recent = at_s[at_s > now_s - _RECENT_S]
        span_s = now_s - recent.min() if len(recent) == _MOST else min(now_s - self._began_s, _RECENT_S)
        return round(len(recent) / max(span_s, 1e-3), 2)

    def percentiles_ms(self) -> Percentiles:
        ms = self._ms[: self._count].copy()
        return Percentiles(*np.percentile(ms, [50, 95, 99]).round(3).tolist()) if len(ms) else Percentiles(*[None] * 3)

    def uptime_s(self) -> float:
        return round(time.monotonic() - self._began_s, 1)


def cpu_temp_c(zones: Path = Path("/sys/class/thermal")) -> float | None:
    """The processor's temperature, the highest where there are several; None where the system does not tell."""
    found = []
    for zone in zones.glob("thermal_zone*"):
        try:
            if _OF_CPU.search((zone / "type").read_text()):
                found.append(int((zone / "temp").read_text()) / 1000)
        except (OSError, ValueError):  # a sensor that is asleep
            continue
    return round(max(found), 1) if found else None


def rss_bytes() -> int | None:
    """Memory that this process holds; None where the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return None
