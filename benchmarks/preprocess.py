"""From a 720p camera frame to the int8 input tensor of 224 x 224, against the bare ``cv2.resize``.

python benchmarks/preprocess.py [--seconds S]
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import cv2
import numpy as np

from edgekit.manifest import ImageInput
from edgekit.preprocess import ImagePreprocessor

SIZE_WH = (224, 224)


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures preprocessing against a bare resize.")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure")
    seconds: float = parser.parse_args().seconds
    cv2.setNumThreads(1)
    frame = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), np.uint8)
    pixels = ImagePreprocessor(ImageInput(size_wh=SIZE_WH, mean=(127.5,), std=(127.5,)), "int8", 1 / 127.5, -1)
    table = ImagePreprocessor(ImageInput(size_wh=SIZE_WH, mean=(120.0,), std=(60.0,)), "int8", 0.02, 3)
    ways: dict[str, Callable[[], Any]] = {
        "cv2.resize": lambda: cv2.resize(frame, SIZE_WH),
        "to int8, RGB frame, the pixels' own scale (edgekit's int8 bundles)": lambda: pixels(frame),
        "the same, BGR frame (a camera's)": lambda: pixels(frame, "bgr"),
        "to int8, RGB frame, another scale (a table)": lambda: table(frame),
    }
    times: dict[str, list[float]] = {name: [] for name in ways}
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for name, way in ways.items():
            before_s = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - before_s)
    bare = float(np.median(times["cv2.resize"]))
    print("| what | ms | against cv2.resize |\n|---|---|---|")
    for name, taken in times.items():
        median = float(np.median(taken))
        print(f"| {name} | {1e3 * median:.3f} | {median / bare:.2f} x |")


if __name__ == "__main__":
    main()
