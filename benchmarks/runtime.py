"""What ``edgekit run`` costs beside the model: against a bare loop of ``invoke``, and against MediaPipe.

    python benchmarks/runtime.py PICTURE_OR_VIDEO MODEL.tflite ... [--threads 1] [--rounds 7] [--seconds 3]

A picture becomes a video of 1280 x 720 in which it moves. Needs mosquitto; ``EDGEKIT_MEDIAPIPE_PYTHON`` names a Python
with MediaPipe. All are processes that are stopped (SIGSTOP) while it is another's turn: the bare loop fills no tensor
and reads none, ``edgekit run`` publishes to a Mosquitto on loopback and a subscriber counts what comes, MediaPipe's
ImageClassifier (video mode) gets the frames of the same video from OpenCV, or the same frames from memory. Memory is
that of the processes in the end, when both have predicted about as often. Exit status 1 if a number is not reached.
"""

from __future__ import annotations

import argparse
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

from edgekit import Subscriber, runtimes
from edgekit.devices.soak.mosquitto import Mosquitto
from edgekit.preprocess import IMAGE_SUFFIXES

FRAMES = 300
SIZE_WH = (1280, 720)
# After the start, and after each time that it goes on: what is measured begins with this.
SETTLE_S = 0.5
START_S = 60.0
# To reach.
RATE, ADDED_MS, MEMORY_MB = 0.9, 1.0, 40.0

# Each answers a line with a number of seconds by one with how often it has invoked in so long, and how long that was.
_TURNS = """
import sys, time
def turns(predict):
    print("ready", flush=True)
    for line in sys.stdin:
        count, began_s = 0, time.perf_counter()
        while (now_s := time.perf_counter()) - began_s < float(line):
            predict()
            count += 1
        print(count, now_s - began_s, flush=True)
"""
_BARE = """
import importlib, numpy
interpreter = importlib.import_module(sys.argv[1]).Interpreter(sys.argv[2], num_threads=int(sys.argv[3]))
interpreter.allocate_tensors()
turns(interpreter.invoke)
"""
_MEDIAPIPE = """
import cv2, itertools, mediapipe
from mediapipe.tasks.python import BaseOptions, vision
capture, number, kept = cv2.VideoCapture(sys.argv[3]), 0, []
def decoded():
    ok, image_bgr = capture.read()
    if not ok:
        capture.open(sys.argv[3])
        ok, image_bgr = capture.read()
    return image_bgr
if sys.argv[1] == "memory":
    kept = itertools.cycle([decoded() for _ in range(30)])
def predict():
    global number
    number += 1
    image_rgb = cv2.cvtColor(next(kept) if kept else decoded(), cv2.COLOR_BGR2RGB)
    image = mediapipe.Image(image_format=mediapipe.ImageFormat.SRGB, data=image_rgb)
    return classifier.classify_for_video(image, 33 * number).classifications
options = vision.ImageClassifierOptions(
    base_options=BaseOptions(model_asset_path=sys.argv[2]), running_mode=vision.RunningMode.VIDEO, max_results=3
)
with vision.ImageClassifier.create_from_options(options) as classifier:
    turns(predict)
"""
# `edgekit run` in a process where each frame's way is timed: from when the source gave it to when the next one was
# asked for, without the inference that the prediction tells of. What reads ahead preprocesses, too.
_TIMED = """
import os, sys, threading, time
import edgekit
from edgekit.devices.sources import VideoSource
asked_s, got_s, inference_ms, stop = [], [], [], threading.Event()
frames = VideoSource.__iter__
def timed(source):
    iterator = frames(source)
    while True:
        asked_s.append(time.perf_counter())
        frame = next(iterator, None)
        if frame is None:
            return
        got_s.append(time.perf_counter())
        yield frame
VideoSource.__iter__ = timed
def count(message):
    inference_ms.append(message.latency_ms.inference)
    if len(inference_ms) == 100 + int(sys.argv[5]):
        stop.set()
edgekit.run(
    sys.argv[1], sys.argv[2], broker=sys.argv[3], threads=int(sys.argv[4]), device_id="timed", delegate="cpu",
    spool=sys.argv[6], loop=True, stop=stop, on_prediction=count,
)
for got, asked, ms in list(zip(got_s, asked_s[1:], inference_ms))[100:]:
    print(1e3 * (asked - got) - ms)
"""


class Turns:
    """A process that predicts as fast as it can while it is its turn."""

    def __init__(self, script: str, *arguments: object, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, "-c", _TURNS + script, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.ended = self._answer() != "ready\n"

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def rate(self, seconds: float) -> float:
        """Predictions a second."""
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        count, took_s = self._answer().split()
        return int(count) / float(took_s)

    def __enter__(self) -> Turns:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.kill()
        self.process.communicate()


class EdgekitRun:
    """``edgekit run`` on a video, over and over; what it publishes is counted by a subscriber."""

    def __init__(self, model: Path, video: Path, broker: str, threads: int, folder: Path) -> None:
        self._subscriber = Subscriber(broker, device="bench")
        command = [
            sys.executable, "-m", "edgekit", "run", model, "--source", video, "--loop", "--broker", broker,
            "--device-id", "bench", "--threads", f"{threads}", "--delegate", "cpu", "--spool", folder / "spool",
        ]  # fmt: skip
        self.process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
        try:
            self._next(START_S)
        except TimeoutError:
            self.process.kill()
            sys.exit(f"edgekit run gives no predictions:\n{self.process.communicate()[1]}")
        self.process.send_signal(signal.SIGSTOP)

    def _next(self, timeout_s: float) -> tuple[int, float]:
        message = self._subscriber.next(timeout_s).prediction
        assert message
        return message.seq, time.perf_counter()

    def rate(self, seconds: float) -> float:
        """Predictions a second that arrive, from one of them to another."""
        with suppress(TimeoutError):
            while True:
                self._next(0.1)
        self.process.send_signal(signal.SIGCONT)
        began_s = time.perf_counter()
        while (first := self._next(START_S))[1] - began_s < SETTLE_S:
            pass
        while (last := self._next(START_S))[1] - first[1] < seconds:
            pass
        self.process.send_signal(signal.SIGSTOP)
        return (last[0] - first[0]) / (last[1] - first[1])

    def __enter__(self) -> EdgekitRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        self._subscriber.close()
        self.process.communicate(timeout=20)


def family(pid: int) -> list[int]:
    """The process and all that came of it."""
    children = []
    with suppress(OSError):  # it has just ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(one for child in children for one in family(child))]


def memory_mb(pid: int) -> tuple[float, float]:
    """What a process and its children hold: resident (RSS), and with what they share with others divided (PSS)."""
    totals = [0.0, 0.0]
    for one in family(pid):
        with suppress(OSError):
            for line in Path(f"/proc/{one}/smaps_rollup").read_text().splitlines():
                name, _, rest = line.partition(":")
                if name in ("Rss", "Pss"):
                    totals[name == "Pss"] += int(rest.split()[0]) / 1024
    return totals[0], totals[1]


def moving_pictures(picture: Path) -> Iterator[np.ndarray[Any, Any]]:
    """The picture in BGR, a little larger than a frame, as seen by a camera that moves and comes back."""
    width, height = SIZE_WH
    large = cv2.resize(cv2.imread(str(picture)), (width * 6 // 5, height * 6 // 5))
    for angle in np.linspace(0, 2 * np.pi, FRAMES, endpoint=False):
        left, top = int(width / 10 * (1 + np.cos(angle))), int(height / 10 * (1 + np.sin(3 * angle)))
        yield np.ascontiguousarray(large[top : top + height, left : left + width])


def moving_video(picture: Path, path: Path) -> Path:
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), 30, SIZE_WH)
    for image in moving_pictures(picture):
        writer.write(image)
    writer.release()
    return path


def added_ms(model: Path, video: Path, broker: str, threads: int, frames: int, folder: Path) -> np.ndarray[Any, Any]:
    """Milliseconds that each frame takes beside invoke, until the next one is asked for."""
    arguments = (model, video, broker, threads, frames, folder / "timed")
    timed = subprocess.run(
        [sys.executable, "-c", _TIMED, *map(str, arguments)], capture_output=True, text=True, timeout=600
    )
    if timed.returncode:
        sys.exit(f"edgekit.run failed:\n{timed.stderr}")
    return np.array(timed.stdout.split(), float)


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """The median, and as a text with the lowest and highest."""
    each = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    median = statistics.median(each)
    return median, f"{median:.2f} ({each[0]:.2f} to {each[-1]:.2f})"


def measure(model: Path, video: Path, options: argparse.Namespace, broker: str, folder: Path) -> bool:
    """Prints what was found; whether all numbers are reached."""
    module = runtimes.RUNTIMES[next(iter(runtimes.installed()))][0]
    mediapipe = os.environ.get("EDGEKIT_MEDIAPIPE_PYTHON")
    with ExitStack() as stack:
        loops: dict[str, Turns | EdgekitRun] = {}
        loops["bare invoke"] = stack.enter_context(Turns(_BARE, module, model, options.threads))
        loops["edgekit run"] = stack.enter_context(EdgekitRun(model, video, broker, options.threads, folder))
        for name, where in {"MediaPipe": "video", "MediaPipe, frames in memory": "memory"}.items():
            if mediapipe:
                peer = stack.enter_context(Turns(_MEDIAPIPE, where, model, video, python=mediapipe))
                if peer.ended:
                    print(f"{model.name}: MediaPipe does not take it")
                    break
                loops[name] = peer
        rates: dict[str, list[float]] = {name: [] for name in loops}
        for number in range(options.rounds):
            # in turns, and each as often before another as after it
            for name in list(loops) if number % 2 else reversed(loops):
                rates[name].append(loops[name].rate(options.seconds))
        used = {name: memory_mb(loops[name].process.pid) for name in ("bare invoke", "edgekit run")}
    beyond = [ours - bare for ours, bare in zip(used["edgekit run"], used["bare invoke"], strict=True)]
    added = added_ms(model, video, broker, options.threads, options.frames, folder)
    print(f"{model.name}, {options.threads} threads, {options.rounds} turns of {options.seconds:g} s each")
    good = True
    for name, theirs in rates.items():
        print(f"  {name:30} {statistics.median(theirs):7.1f} frames a second", end="")
        if name != "edgekit run":
            ratio, text = ratios(rates["edgekit run"], theirs)
            good &= ratio >= (RATE if name == "bare invoke" else 1.0)
            print(f"   edgekit run against it {text}", end="")
        print()
    p50, p99 = np.percentile(added, [50, 99])
    print(f"  beside invoke, a frame          p50 {p50:.3f} ms, p99 {p99:.3f} ms, at most {added.max():.2f} ms")
    for name, (rss, pss) in used.items():
        print(f"  memory of {name:20} RSS {rss:6.1f} MB, PSS {pss:6.1f} MB")
    print(f"  beyond the bare process        RSS {beyond[0]:6.1f} MB, PSS {beyond[1]:6.1f} MB", flush=True)
    return good and bool(p99 < ADDED_MS) and max(beyond) < MEMORY_MB


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures what edgekit run costs beside the model.")
    parser.add_argument("source", type=Path, help="a picture, or a video")
    parser.add_argument("models", type=Path, nargs="+")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=3.0, help="of a turn")
    parser.add_argument("--frames", type=int, default=1000, help="whose way is timed")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, Mosquitto(Path(name), lasting=False) as mosquitto:
        folder, broker = Path(name), f"mqtt://127.0.0.1:{mosquitto.port}"
        given: Path = options.source.resolve()
        video = moving_video(given, folder / "moving.avi") if given.suffix in IMAGE_SUFFIXES else given
        reached = [measure(model.resolve(), video, options, broker, folder) for model in options.models]
    sys.exit(0 if all(reached) else 1)


if __name__ == "__main__":
    main()
