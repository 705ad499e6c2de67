"""What ``edgekit run`` costs beside the model: against a bare loop of ``invoke``, and against MediaPipe.

    python benchmarks/runtime.py PICTURE_OR_VIDEO MODEL.tflite ... [--threads 1] [--rounds 7] [--seconds 3]

A picture becomes a video of 1280 x 720 in which it moves. Needs mosquitto; ``EDGEKIT_MEDIAPIPE_PYTHON`` names a Python
with MediaPipe. ``edgekit run`` publishes to a Mosquitto on loopback, and a subscriber counts what comes. It and what it
is compared with (``turns.py``) are processes that wait while it is another's turn. MediaPipe is given the frames of the
video by the same OpenCV calls, or the same frames from memory. Memory is what the processes hold in the end, when all
have predicted for as long. Exit status 1 if a number is not reached.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any

import cv2
import numpy as np

import edgekit
from edgekit import Subscriber, runtimes
from edgekit.devices.soak.mosquitto import Mosquitto
from edgekit.devices.sources.frames import Frame
from edgekit.devices.sources.images import VideoSource
from edgekit.messages import PredictionMessage
from edgekit.preprocess import IMAGE_SUFFIXES

FRAMES = 300
SIZE_WH = (1280, 720)
# After the start, and after each time that it goes on: what is measured begins with this.
SETTLE_S = 0.5
START_S = 60.0
WARM_UP_FRAMES = 100
# To reach.
RATE, ADDED_MS, MEMORY_MB = 0.9, 1.0, 40.0


def timed(model: str, video: str, broker: str, threads: int, frames: int, spool: str, pipe: Connection) -> None:
    """Runs, and sends the milliseconds that each frame took beside its inference: from when the source gave it to when
    the next one was asked for."""
    asked_s: list[float] = []
    got_s: list[float] = []
    inference_ms: list[float] = []
    stop, every_frame = threading.Event(), VideoSource.__iter__

    def iterate(source: VideoSource) -> Iterator[Frame]:
        given = every_frame(source)
        while True:
            asked_s.append(time.perf_counter())
            frame = next(given, None)
            if frame is None:
                return
            got_s.append(time.perf_counter())
            yield frame

    def count(message: PredictionMessage) -> None:
        inference_ms.append(message.latency_ms.inference)
        if len(inference_ms) == WARM_UP_FRAMES + frames:
            stop.set()

    VideoSource.__iter__ = iterate  # type: ignore[assignment, method-assign]
    edgekit.run(
        model, video, broker=broker, threads=threads, device_id="timed", delegate="cpu", spool=spool, loop=True,
        stop=stop, on_prediction=count,
    )  # fmt: skip
    each = [1e3 * (asked - got) - ms for got, asked, ms in zip(got_s, asked_s[1:], inference_ms, strict=False)]
    pipe.send(each[WARM_UP_FRAMES:])


class Turns:
    """A process that predicts as fast as it can while it is its turn."""

    def __init__(self, what: str, *arguments: object, python: str = sys.executable) -> None:
        self.process = subprocess.Popen(
            [python, Path(__file__).with_name("turns.py"), what, *map(str, arguments)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
        )  # fmt: skip
        self.ended, self.count = self._answer() != "ready\n", 0

    def _answer(self) -> str:
        assert self.process.stdout
        return self.process.stdout.readline()

    def rate(self, seconds: float) -> float:
        """Predictions a second."""
        assert self.process.stdin
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        count, took_s = self._answer().split()
        self.count += int(count)
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
        self._drain()

    def _drain(self) -> None:
        with suppress(TimeoutError):
            while True:
                self._next(0.1)

    def _next(self, timeout_s: float) -> tuple[int, float]:
        message = self._subscriber.next(timeout_s).prediction
        assert message
        self.count = message.seq
        return message.seq, time.perf_counter()

    def rate(self, seconds: float) -> float:
        """Predictions a second that arrive, from one of them to another."""
        self.process.send_signal(signal.SIGCONT)
        began_s = time.perf_counter()
        while (first := self._next(START_S))[1] - began_s < SETTLE_S:
            pass
        while (last := self._next(START_S))[1] - first[1] < seconds:
            pass
        self.process.send_signal(signal.SIGSTOP)
        self._drain()
        return (last[0] - first[0]) / (last[1] - first[1])

    def __enter__(self) -> EdgekitRun:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.process.terminate()
        self.process.send_signal(signal.SIGCONT)
        self._subscriber.close()
        told = self.process.communicate(timeout=20)[1]
        if "edgekit: error:" in told:
            sys.exit(f"edgekit run told of errors:\n{told}")


def family(pid: int) -> list[int]:
    """The process and all that came of it."""
    children: list[int] = []
    with suppress(OSError):  # it has just ended
        for thread in Path(f"/proc/{pid}/task").iterdir():
            children += map(int, (thread / "children").read_text().split())
    return [pid, *(one for child in children for one in family(child))]


def cpu_ms(pid: int) -> dict[str, float]:
    """What each thread of the process has worked so far."""
    return {
        thread.name: int((thread / "schedstat").read_text().split()[0]) / 1e6
        for thread in Path(f"/proc/{pid}/task").iterdir()
    }


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


def added_ms(model: Path, video: Path, broker: str, options: argparse.Namespace, folder: Path) -> np.ndarray[Any, Any]:
    """What :func:`timed` sends, from a process of its own."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    arguments = (str(model), str(video), broker, options.threads, options.frames, str(folder / "timed"), theirs)
    process = context.Process(target=timed, args=arguments, daemon=True)
    process.start()
    theirs.close()  # so that one that ends is heard of
    each = np.array(ours.recv())
    process.join()
    return each


def ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, str]:
    """The median, and as a text with the lowest and highest."""
    each = sorted(one / other for one, other in zip(ours, theirs, strict=True))
    median = statistics.median(each)
    return median, f"{median:.2f} ({each[0]:.2f} to {each[-1]:.2f})"


@dataclass
class Measured:
    """Of one process: predictions a second in each turn, CPU time of its busiest thread for each, and memory."""

    rates: list[float]
    busiest_ms: float
    rss_mb: float
    pss_mb: float


def take_turns(loops: dict[str, Turns | EdgekitRun], rounds: int, seconds: float) -> dict[str, Measured]:
    rates: dict[str, list[float]] = {name: [] for name in loops}
    before = {name: (loop.count, cpu_ms(loop.process.pid)) for name, loop in loops.items()}
    for number in range(rounds):
        # each as often before another as after it
        for name in list(loops) if number % 2 else reversed(loops):
            rates[name].append(loops[name].rate(seconds))
    measured = {}
    for name, loop in loops.items():
        count, threads_ms = before[name]
        worked_ms = max(ms - threads_ms.get(thread, 0.0) for thread, ms in cpu_ms(loop.process.pid).items())
        measured[name] = Measured(rates[name], worked_ms / (loop.count - count), *memory_mb(loop.process.pid))
    return measured


def measure(model: Path, video: Path, options: argparse.Namespace, broker: str, folder: Path) -> bool:
    """Prints what was found; whether all numbers are reached."""
    module = runtimes.RUNTIMES[next(iter(runtimes.installed()))][0]
    with ExitStack() as stack:
        loops: dict[str, Turns | EdgekitRun] = {
            "edgekit run": stack.enter_context(EdgekitRun(model, video, broker, options.threads, folder)),
            "bare invoke": stack.enter_context(Turns("bare", module, model, options.threads)),
            "plain loop": stack.enter_context(Turns("plain", module, model, options.threads, video)),
        }
        for what in ("mediapipe", "mediapipe-memory") if "EDGEKIT_MEDIAPIPE_PYTHON" in os.environ else ():
            peer = Turns(what, model, video, python=os.environ["EDGEKIT_MEDIAPIPE_PYTHON"])
            loops[what] = stack.enter_context(peer)
            if peer.ended:
                sys.exit(f"MediaPipe does not take {model.name}; unset EDGEKIT_MEDIAPIPE_PYTHON to leave it out")
        measured = take_turns(loops, options.rounds, options.seconds)
    added = added_ms(model, video, broker, options, folder)
    ours = measured["edgekit run"]
    print(f"{model.name}, {options.threads} threads, {options.rounds} turns of {options.seconds:g} s each")
    print(f"{'frames/s':>27} {'ours against it':>23} {'busiest thread':>16} {'RSS':>9} {'PSS':>9} ours has")
    good = True
    for name, one in measured.items():
        ratio, text = ratios(ours.rates, one.rates)
        good &= ratio >= (RATE if name == "bare invoke" else 1.0)
        beyond_mb = ours.rss_mb - one.rss_mb
        good &= name != "plain loop" or beyond_mb < MEMORY_MB
        print(
            f"{name:18} {statistics.median(one.rates):8.1f} {text:>23} {one.busiest_ms:13.2f} ms "
            f"{one.rss_mb:6.1f} MB {one.pss_mb:6.1f} MB {beyond_mb:+9.1f} MB"
        )
    p50, p99 = np.percentile(added, [50, 99])
    print(f"a frame beside invoke: p50 {p50:.3f} ms, p99 {p99:.3f} ms, at most {added.max():.2f} ms", flush=True)
    return good and bool(p99 < ADDED_MS)


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
