"""The newest frame, small enough for a message."""

from __future__ import annotations

import cv2

from edgekit.devices.sources.frames import Frame
from edgekit.errors import EdgekitError
from edgekit.messages import PredictionMessage, SnapshotImage, timestamp

# Of the longer side.
MAX_PIXELS = 640
JPEG_QUALITY = 80


def snapshot(frame: Frame, prediction: PredictionMessage | None) -> SnapshotImage:
    """``frame``, which has an image, as a JPEG of at most ``MAX_PIXELS``.

    Raises:
        EdgekitError: it cannot be encoded.
    """
    image = frame.image_bgr
    assert image is not None
    height, width = image.shape[:2]
    shrink = MAX_PIXELS / max(height, width)
    if shrink < 1:
        size_wh = max(round(width * shrink), 1), max(round(height * shrink), 1)
        image = cv2.resize(image, size_wh, interpolation=cv2.INTER_AREA)  # type: ignore[assignment]
    ok, jpeg = cv2.imencode(".jpg", image, [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY])
    if not ok:
        raise EdgekitError("snapshot: the frame cannot be encoded", mend="ask again")
    return SnapshotImage(
        content_type="image/jpeg",
        size_wh=(image.shape[1], image.shape[0]),
        captured_at=timestamp(frame.captured_at),
        data=jpeg.tobytes(),
        prediction=prediction,
    )
