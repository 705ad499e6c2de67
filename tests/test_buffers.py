"""The memory of frames is used again, but not while someone looks at it."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from edgekit.devices.health import rss_bytes
from edgekit.devices.sources.buffers import Buffers
from edgekit.devices.sources.images import open_source


def test_memory_of_frames_is_used_again(video: Path) -> None:
    with open_source(str(video)) as source:
        addresses = {frame.image_bgr.ctypes.data for frame in source if frame.image_bgr is not None}
    assert source.captured == 90 and len(addresses) < 10


def test_memory_that_was_needed_for_a_moment_only_is_not_kept() -> None:
    buffers, size = Buffers(), (4000, 4000, 3)
    held = [buffers.lend(np.zeros(size, np.uint8))]
    for _ in range(4):
        image = buffers.take()
        assert image is not None and image.shape == size
        image[:] = 1
        held.append(buffers.lend(image))
    most_bytes = rss_bytes()
    if most_bytes is None:
        pytest.skip("this system does not tell")
    held.clear()
    now_bytes = rss_bytes()
    assert now_bytes and most_bytes - now_bytes > 80e6, "of five images of 48 MB two are kept"


def test_frame_that_is_kept_is_not_overwritten(video: Path) -> None:
    """Nor is one of which only a part is kept."""
    with open_source(str(video)) as source:
        parts = [frame.image_bgr[::2, 1:] for frame in source if frame.image_bgr is not None]
    capture = cv2.VideoCapture(str(video))
    for part in parts:
        assert (part == capture.read()[1][::2, 1:]).all()
