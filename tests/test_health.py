from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgekit.devices.health import Recent, cpu_temp_c, percentiles_ms, rss_bytes
from edgekit.messages import Percentiles


def zone(zones: Path, number: int, kind: str, temp: str) -> None:
    folder = zones / f"thermal_zone{number}"
    folder.mkdir()
    (folder / "type").write_text(f"{kind}\n")
    (folder / "temp").write_text(f"{temp}\n")


@pytest.mark.parametrize("kind", ["cpu-thermal", "CPU-therm", "x86_pkg_temp", "soc-thermal"])
def test_cpu_temp_is_that_of_the_hottest_zone_of_the_processor(tmp_path: Path, kind: str) -> None:
    zone(tmp_path, 0, "acpitz", "27800")
    zone(tmp_path, 1, kind, "51540")
    zone(tmp_path, 2, "cpu1-thermal", "48000")
    zone(tmp_path, 3, "gpu-thermal", "90000")
    assert cpu_temp_c(tmp_path) == 51.5


def test_cpu_temp_where_the_system_does_not_tell(tmp_path: Path) -> None:
    assert cpu_temp_c(tmp_path / "none") is None
    zone(tmp_path, 0, "cpu-thermal", "")
    assert cpu_temp_c(tmp_path) is None


def test_rss_grows_with_what_is_held() -> None:
    before = rss_bytes()
    if before is None:
        pytest.skip("this system does not tell")
    held = bytearray(b"x" * 50_000_000)
    after = rss_bytes()
    assert after and 40e6 < after - before < 80e6 and held


def test_recent_of_nothing_has_no_percentiles() -> None:
    recent = Recent()
    assert recent.fps() == 0 and percentiles_ms(recent.total_s()) == Percentiles(None, None, None)


@pytest.mark.parametrize("per_s", [10, 50, 1000])
def test_recent_tells_the_pace_of_ten_seconds(monkeypatch: pytest.MonkeyPatch, per_s: int) -> None:
    """Also where these are more predictions than it remembers, and of a device that stands still."""
    now_s = 1000.0
    monkeypatch.setattr("edgekit.devices.health.time.monotonic", lambda: now_s)
    recent = Recent()
    for number in range(20 * per_s):
        now_s += 1 / per_s
        ms = number % 100
        recent.add(*(now_s - 1e-3 * np.array([ms, 0.75 * ms, 0.5 * ms, 0.25 * ms, 0.0])))
        recent.published(2e-3)
    assert recent.fps() == pytest.approx(per_s, rel=0.02)
    percentiles = percentiles_ms(recent.total_s())
    assert percentiles.p50 == pytest.approx(50, abs=3) and percentiles.p99 == pytest.approx(99, abs=2)
    stages = {stage: of_stage.p50 for stage, of_stage in recent.stages_ms().items()}
    quarter = pytest.approx(12.5, abs=1)
    assert stages == {"wait": quarter, "preprocess": quarter, "inference": quarter, "decode": quarter, "publish": 2.0}
    now_s += 60
    assert recent.fps() == 0
