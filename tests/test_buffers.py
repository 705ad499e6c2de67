"""The memory of frames is used again, but not while someone looks at it."""

from __future__ import annotations

from pathlib import Path

import cv2

from edgekit.devices.sources.images import open_source


def test_memory_of_frames_is_used_again(video: Path) -> None:
    with open_source(str(video)) as source:
        addresses = {frame.image_bgr.ctypes.data for frame in source if frame.image_bgr is not None}
    assert source.captured == 90 and len(addresses) < 10


def test_frame_that_is_kept_is_not_overwritten(video: Path) -> None:
    """Nor is one of which only a part is kept."""
    with open_source(str(video)) as source:
        parts = [frame.image_bgr[::2, 1:] for frame in source if frame.image_bgr is not None]
    capture = cv2.VideoCapture(str(video))
    for part in parts:
        assert (part == capture.read()[1][::2, 1:]).all()
