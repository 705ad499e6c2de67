"""The operators shipped against what does the same without them, in turns, on one thread.

    python benchmarks/custom_ops.py [--seconds S]

The log-mel levels of 29.12 s of sound, as the music tagger has them: the operator in an interpreter, against the numpy
front end. Each runtime of this Python is measured.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import numpy as np

from edgekit import runtimes
from edgekit.audio import LogMelFrontEnd
from edgekit.converters import raw_sound
from edgekit.custom_ops import CustomOpResolver
from edgekit.manifest import AudioInput, LogMel

FRONT_END = LogMel(
    fft_samples=512, frame_hop_samples=256, num_mel_bins=96, low_hz=0, high_hz=6000, power=2, floor=1e-10, range_db=80
)
SOUND = AudioInput(sample_rate_hz=12_000, window_samples=349_440, hop_samples=6144, front_end=FRONT_END)


def music() -> np.ndarray:
    """Tones that come and go, and glide, over noise."""
    random, time_s = np.random.default_rng(0), np.arange(SOUND.window_samples) / SOUND.sample_rate_hz
    notes = sum(np.sin(2 * np.pi * hz * time_s) * (np.sin(time_s * rate) > 0) for hz, rate in ((220, 3), (1375, 7)))
    glide = np.sin(2 * np.pi * 90 * time_s**2)
    return (0.2 * np.asarray(notes) + 0.1 * glide + random.normal(0, 1e-3, len(time_s))).astype(np.float32)


def interpret(module: Any, content: bytes) -> Any:
    delegate = CustomOpResolver().delegate(module)
    interpreter = module.Interpreter(model_content=content, num_threads=1, experimental_delegates=[delegate])
    interpreter.allocate_tensors()
    return interpreter


def take_turns(ways: dict[str, Callable[[], Any]], seconds: float) -> dict[str, float]:
    """Median time of each, in ms."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    started_s = time.perf_counter()
    while time.perf_counter() - started_s < seconds:
        for name, way in ways.items():
            before_s = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - before_s)
    return {name: 1e3 * float(np.median(taken)) for name, taken in times.items()}


def print_log_mel(seconds: float) -> None:
    sound, front_end = music(), LogMelFrontEnd(FRONT_END, SOUND.sample_rate_hz)
    ways: dict[str, Callable[[], Any]] = {"numpy": lambda: front_end(sound)}
    differences_db = {}
    for runtime in runtimes.installed():
        interpreter = interpret(runtimes.load(runtime)[1], raw_sound.front_end(SOUND))
        given, made = interpreter.get_input_details()[0]["index"], interpreter.get_output_details()[0]["index"]

        def call(interpreter: Any = interpreter, given: int = given, made: int = made) -> np.ndarray:
            interpreter.set_tensor(given, sound[None])
            interpreter.invoke()
            return np.asarray(interpreter.get_tensor(made))[0, ..., 0]

        differences_db[runtime] = float(np.abs(call() - front_end(sound)).max())
        ways[f"{runtime}, the sound copied in and the levels out"] = call
        ways[f"{runtime}, the call alone"] = interpreter.invoke
    times_ms = take_turns(ways, seconds)
    print("| log-mel of 29.12 s | ms | against numpy |\n|---|---|---|")
    for name, taken_ms in times_ms.items():
        print(f"| {name} | {taken_ms:.3f} | 1/{times_ms['numpy'] / taken_ms:.1f} |")
    for runtime, difference_db in differences_db.items():
        print(f"\nLargest difference in {runtime}: {difference_db:.1g} dB")


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the operators shipped against what does the same.")
    parser.add_argument("--seconds", type=float, default=4.0, help="how long to measure")
    print_log_mel(parser.parse_args().seconds)


if __name__ == "__main__":
    main()
