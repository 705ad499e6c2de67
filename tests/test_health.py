from __future__ import annotations

import numpy as np
import pytest

from edgekit.devices.health import Recent, percentiles_ms, rss_bytes
from edgekit.devices.results import Marks
from edgekit.messages import Percentiles, encode


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
        recent.add(Marks(*(now_s - 1e-3 * np.array([ms, 0.75 * ms, 0.5 * ms, 0.25 * ms, 0.0]))))
        recent.published(2e-3)
    assert recent.fps() == pytest.approx(per_s, rel=0.02)
    encode((recent.fps(), recent.stages_ms()))  # as health does, and JSON knows no numbers of NumPy
    percentiles = percentiles_ms(recent.total_s())
    assert percentiles.p50 == pytest.approx(50, abs=3) and percentiles.p99 == pytest.approx(99, abs=2)
    stages = {stage: of_stage.p50 for stage, of_stage in recent.stages_ms().items()}
    quarter = pytest.approx(12.5, abs=1)
    assert stages == {"wait": quarter, "preprocess": quarter, "inference": quarter, "decode": quarter, "publish": 2.0}
    now_s += 60
    assert recent.fps() == 0
