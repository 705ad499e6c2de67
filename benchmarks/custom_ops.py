"""The operators shipped against what does the same without them, in turns, on one thread.

    python benchmarks/custom_ops.py [FOLDER] [--seconds S]

The log-mel levels of 29.12 s of sound, as the music tagger has them: the operator in each runtime here (docs/measure.md
tells how to have tflite-runtime beside LiteRT), against the numpy front end. FOLDER keeps the models.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from edgekit import runtimes
from edgekit.audio import LogMelFrontEnd
from edgekit.converters import raw_sound
from edgekit.manifest import AudioInput, LogMel
from edgekit.sandbox import Sandbox

FRONT_END = LogMel(
    fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000, power=2, floor=1e-10, range_db=80
)
SOUND = AudioInput(sample_rate_hz=12_000, window_samples=349_440, hop_samples=6144, front_end=FRONT_END)
# Calls in a row of each way before it is another's turn, after one that finds the caches filled by others.
CALLS = 20


def music() -> np.ndarray:
    """Tones that come and go, and glide, over noise."""
    random, time_s = np.random.default_rng(0), np.arange(SOUND.window_samples) / SOUND.sample_rate_hz
    notes = sum(np.sin(2 * np.pi * hz * time_s) * (np.sin(time_s * rate) > 0) for hz, rate in ((220, 3), (1375, 7)))
    glide = np.sin(2 * np.pi * 90 * time_s**2)
    return (0.2 * np.asarray(notes) + 0.1 * glide + random.normal(0, 1e-3, len(time_s))).astype(np.float32)


def timed(work: Callable[[], Any]) -> Callable[[int], np.ndarray]:
    """As :meth:`Sandbox.invoke`."""

    def call(count: int) -> np.ndarray:
        times = np.empty(count)
        for number in range(count):
            started_s = time.perf_counter()
            work()
            times[number] = 1e3 * (time.perf_counter() - started_s)
        return times

    return call


def take_turns(ways: dict[str, Callable[[int], np.ndarray]], seconds: float) -> dict[str, float]:
    """Median time of a call of each, ms."""
    times: dict[str, list[np.ndarray]] = {name: [] for name in ways}
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for name, call in ways.items():
            times[name].append(call(1 + CALLS)[1:])
    return {name: float(np.median(taken)) for name, taken in times.items()}


def print_log_mel(folder: Path, seconds: float) -> None:
    sound, front_end = music(), LogMelFrontEnd(FRONT_END, SOUND.sample_rate_hz)
    expected = front_end(sound)
    path, given, made = folder / "log_mel.tflite", folder / "sound.npy", folder / "levels.npy"
    path.write_bytes(raw_sound.front_end(SOUND))
    np.save(given, sound[None])
    differences_db = {}
    ways: dict[str, Callable[[int], np.ndarray]] = {"numpy": timed(lambda: front_end(sound))}
    with ExitStack() as stack:
        for name, runtime in runtimes.find().items():
            sandbox = stack.enter_context(Sandbox(runtime, path))
            sandbox.replay(given, made)  # the sound stays in the input tensor
            differences_db[name] = float(np.abs(np.load(made).reshape(expected.shape) - expected).max())
            ways[name] = sandbox.invoke
        times_ms = take_turns(ways, seconds)
    print("| log-mel of 29.12 s | time | largest difference |\n|---|---|---|")
    for name, difference_db in differences_db.items():
        print(f"| EdgekitLogMel, {name} | 1/{times_ms['numpy'] / times_ms[name]:.1f} | {difference_db:.1g} dB |")
    print(f"| the numpy front end | 1, {times_ms['numpy']:.2f} ms | |")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the operators shipped against what does the same.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("build/benchmarks"))
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print_log_mel(options.folder, options.seconds)


if __name__ == "__main__":
    main()
