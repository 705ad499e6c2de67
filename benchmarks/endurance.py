"""``edgekit run`` on a camera for a long time: what it holds, and whether it accounts for every frame.

    python benchmarks/endurance.py PICTURE MODEL.tflite [--minutes 30] [--streams 1] [--csv FILE]

The camera is a process that gives the picture, moving, as MJPEG over HTTP, 30 frames a second. Every two minutes it is
lost: killed, or, every other time, still without a word (SIGSTOP). The broker is a Mosquitto of its own, restarted
every minute; a subscriber with a session accounts for all predictions. With ``--streams 2`` a configuration has the
run take the camera twice. Every five seconds memory, threads and open files go into a CSV file. In the end the run is
told to stop (SIGTERM). Exit status 1 if anything is not as it should be. Needs mosquitto.
"""

from __future__ import annotations

import argparse
import csv
import http.server
import logging
import multiprocessing
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import cv2
import numpy as np
from runtime import family, memory_mb, moving_pictures

from edgekit import Subscriber
from edgekit.devices.soak.mosquitto import Mosquitto
from edgekit.messages import HealthMessage, StreamHealth

DEVICE, FPS = "endurance", 30
SAMPLE_S, START_S, EXIT_S = 5.0, 60.0, 5.0
# The broker, or the camera, is away for so long; in the last moments both are there.
AWAY_S, QUIET_S = 5.0, 15.0
# Memory may grow by so much.
SLOPE_MB_PER_H = 1.0


def serve(port: int, jpegs: list[bytes]) -> None:
    """A camera as many sell them; all who ask get the same pictures."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
            self.end_headers()
            due_s = time.monotonic()
            with suppress(OSError):  # who asked has gone
                while True:
                    jpeg = jpegs[int(due_s * FPS) % len(jpegs)]
                    self.wfile.write(b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg))
                    self.wfile.write(jpeg + b"\r\n")
                    due_s = max(due_s + 1 / FPS, time.monotonic())  # what it is late for it leaves out
                    time.sleep(max(0.0, due_s - time.monotonic()))

        def log_message(self, *_: object) -> None:
            pass

    class Server(http.server.ThreadingHTTPServer):
        allow_reuse_address = daemon_threads = True

    Server(("127.0.0.1", port), Handler).serve_forever()


class Camera:
    """The process that serves, on a port that it keeps."""

    def __init__(self, picture: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = int(probe.getsockname()[1])
        self.url = f"http://127.0.0.1:{port}/stream.mjpg"
        self._arguments = port, [cv2.imencode(".jpg", image)[1].tobytes() for image in moving_pictures(picture)]
        self.killed = self.stilled = 0
        self._start()

    def _start(self) -> None:
        self._process = multiprocessing.get_context("spawn").Process(target=serve, args=self._arguments, daemon=True)
        self._process.start()

    def lose(self) -> None:
        if self.killed > self.stilled:
            self.stilled += 1
            os.kill(self._process.pid or 0, signal.SIGSTOP)
        else:
            self.killed += 1
            self.close()

    def give_back(self) -> None:
        if self._process.is_alive():
            os.kill(self._process.pid or 0, signal.SIGCONT)
        else:
            self._start()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


@dataclass(frozen=True)
class Sample:
    """What the run and its children held at one time."""

    at_s: float
    rss_mb: float
    pss_mb: float
    processes: int
    threads: int
    files: int
    received: int

    @classmethod
    def take(cls, at_s: float, pid: int, received: int) -> Sample:
        pids = family(pid)
        threads, files = (
            sum(len(list(Path(f"/proc/{one}/{what}").iterdir())) for one in pids) for what in ("task", "fd")
        )
        rss_mb, pss_mb = memory_mb(pid)
        return cls(round(at_s, 1), round(rss_mb, 3), round(pss_mb, 3), len(pids), threads, files, received)


class Run:
    """``edgekit run``, what it publishes, and what is told of it."""

    def __init__(self, options: argparse.Namespace, camera: str, port: int, folder: Path) -> None:
        broker = f"mqtt://127.0.0.1:{port}"
        self.subscriber = Subscriber(
            broker,
            device=DEVICE,
            kinds=("prediction", "health", "status"),
            client_id="endurance-subscriber",
            session_expiry_s=86400,
        )
        self.left: list[int] = []
        self.healths: list[HealthMessage] = []
        self.statuses: list[object] = []
        model, spool = options.model.resolve(), folder / "spool"
        command: list[object] = [sys.executable, "-m", "edgekit", "run"]
        if options.streams == 1:
            command += [model, "--source", camera, "--broker", broker, "--device-id", DEVICE, "--spool", spool]
        else:
            streams = (
                f'[[stream]]\nname = "s{number}"\nbundle = "{model}"\nsource = "{camera}"\n'
                for number in range(options.streams)
            )
            config = folder / "edgekit.toml"
            config.write_text(
                f'device_id = "{DEVICE}"\nbroker = "{broker}"\nspool = "{spool}"\n\n' + "\n".join(streams)
            )
            command += ["--config", config]
        self.log = folder / "run.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(list(map(str, command)), stderr=log)

    def receive(self, seconds: float) -> bool:
        """For so long; whether anything came."""
        end_s, came = time.monotonic() + seconds, False
        with suppress(TimeoutError):
            while (left_s := end_s - time.monotonic()) > 0:
                message = self.subscriber.next(left_s)
                came = True
                if message.health:
                    self.healths.append(message.health)
                elif message.kind == "status":
                    self.statuses.append(message.payload)
        return came

    @property
    def received(self) -> int:
        return self.subscriber.accounting.predictions

    def stop(self) -> float:
        """Tells it to end; how many seconds it took. Then receives what is left."""
        pids, began_s = family(self.process.pid), time.monotonic()
        self.process.terminate()
        while self.process.poll() is None and time.monotonic() - began_s < 6 * EXIT_S:
            self.receive(0.02)
        took_s = time.monotonic() - began_s
        self.left = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
        self.process.kill()
        while self.receive(1.0):
            pass
        return took_s

    def told(self) -> dict[str, int]:
        """The counts that it names when it ends, of all streams."""
        lines = re.findall(r"(\d+) captured, (\d+) inferred, (\d+) dropped, (\d+) failed", self.log.read_text())
        names = ("captured", "inferred", "dropped", "failed")
        return dict(zip(names, map(int, lines[-1] if lines else "0000"), strict=True))

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.subscriber.close()


def befalls(options: argparse.Namespace, broker: Mosquitto, camera: Camera) -> list[tuple[float, Callable[[], None]]]:
    """What happens when, in seconds."""
    steps: list[tuple[float, Callable[[], None]]] = []
    for every_s, first_s, begin, end in (
        (options.broker_every, 0.5, broker.stop, broker.start),
        (options.camera_every, 0.75, camera.lose, camera.give_back),
    ):
        for at_s in np.arange(first_s * every_s, 60 * options.minutes - AWAY_S - QUIET_S, every_s):
            steps += [(float(at_s), begin), (float(at_s) + AWAY_S, end)]
    return sorted(steps, key=lambda step: step[0])


def exact(health: HealthMessage | StreamHealth) -> bool:
    return health.captured == health.inferred + sum(health.dropped.values()) + health.failed + health.in_flight


def endure(run: Run, steps: list[tuple[float, Callable[[], None]]], options: argparse.Namespace) -> list[Sample]:
    """Samples while it runs, and has happen what is to happen. Its first prediction is when time begins."""
    deadline_s = time.monotonic() + START_S
    while not run.received:
        run.receive(0.1)
        if run.process.poll() is not None or time.monotonic() > deadline_s:
            sys.exit(f"edgekit run gives no predictions:\n{run.log.read_text()}")
    samples: list[Sample] = []
    due, began_s = [*steps], time.monotonic()
    with options.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Sample)])
        writer.writeheader()
        while (now_s := time.monotonic() - began_s) < 60 * options.minutes and run.process.poll() is None:
            while due and due[0][0] <= now_s:
                due.pop(0)[1]()
            if not samples or now_s >= samples[-1].at_s + SAMPLE_S:
                samples.append(Sample.take(now_s, run.process.pid, run.received))
                writer.writerow(asdict(samples[-1]))
                file.flush()
            run.receive(0.2)
    return samples


def mb_per_hour(samples: list[Sample], name: str, cycle_s: float) -> float:
    """Least squares through the median of each cycle: while the camera is away there is less."""
    cycles: dict[int, list[Sample]] = {}
    for sample in samples:
        cycles.setdefault(int(sample.at_s / cycle_s), []).append(sample)
    points = [
        (
            statistics.median(sample.at_s for sample in cycle),
            statistics.median(getattr(sample, name) for sample in cycle),
        )
        for cycle in cycles.values()
    ]
    seconds, mb = zip(*points, strict=True)
    return float(np.polyfit(np.array(seconds) / 3600, mb, 1)[0]) if len(points) > 1 else np.nan


def grown(values: list[int]) -> int:
    """From the first half to the second, by their highest: what comes and goes is no growth."""
    half = (len(values) + 1) // 2
    return max(values[half:], default=0) - max(values[:half])


def report(run: Run, camera: Camera, samples: list[Sample], exit_s: float, options: argparse.Namespace) -> bool:
    """Prints the table; whether all is as it should be."""
    warm = [sample for sample in samples if sample.at_s >= 60 * options.warm_up] or samples
    rss_per_h, pss_per_h = (mb_per_hour(warm, name, options.camera_every) for name in ("rss_mb", "pss_mb"))
    more = {name: grown([getattr(sample, name) for sample in warm]) for name in ("processes", "threads", "files")}
    told, accounting, healths = run.told(), run.subscriber.accounting, run.healths
    left = told["captured"] - told["inferred"] - told["dropped"] - told["failed"]
    inexact = [health for health in healths if not (exact(health) and all(map(exact, health.streams.values())))]
    gaps = sum(stream.gaps for stream in healths[-1].streams.values()) if healths else 0
    code = run.process.returncode
    rows = [
        ("predictions received, told", f"{run.received:,}, {told['inferred']:,}", run.received == told["inferred"] > 0),
        ("missing", f"{accounting.missing}", accounting.missing == 0),
        ("twice, not marked as such", f"{accounting.duplicates_unflagged}", accounting.duplicates_unflagged == 0),
        ("health that does not add up", f"{len(inexact)} of {len(healths)}", bool(healths) and not inexact),
        ("frames at the end", ", ".join(f"{count:,} {name}" for name, count in told.items()), left == 0),
        ("camera killed, still, gaps", f"{camera.killed}, {camera.stilled}, {gaps}", gaps >= camera.killed),
        ("memory, RSS, from to MB", f"{warm[0].rss_mb:.1f}, {warm[-1].rss_mb:.1f}", True),
        ("memory, RSS, MB an hour", f"{rss_per_h:+.2f}", rss_per_h < SLOPE_MB_PER_H),
        ("memory, PSS (of others too)", f"{pss_per_h:+.2f}", True),
        *((f"more {name} than before", f"{number:+g}", number <= 0) for name, number in more.items()),
        ("ended after SIGTERM, s", f"{exit_s:.1f}, exit status {code}", exit_s < EXIT_S and code == 0),
        ("processes left", f"{len(run.left)}", not run.left),
        ("status", " ".join(map(str, run.statuses[-2:])), run.statuses[-1:] == ["offline"]),
    ]
    print(f"{options.model.name}, {options.streams} x {FPS} a second, {samples[-1].at_s / 60:.1f} minutes")
    for what, found, good in rows:
        print(f"  {'pass' if good else 'FAIL'}  {what:28} {found}")
    return all(good for _, _, good in rows)


def main() -> None:
    parser = argparse.ArgumentParser(description="Has edgekit run on a camera for long.")
    parser.add_argument("picture", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--warm-up", type=float, default=5.0, help="minutes, after which nothing may grow")
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--broker-every", type=float, default=60.0, metavar="SECONDS")
    parser.add_argument("--camera-every", type=float, default=120.0, metavar="SECONDS")
    parser.add_argument("--csv", type=Path, default=Path("endurance.csv"))
    options = parser.parse_args()
    logging.disable(logging.CRITICAL)  # the subscriber tells of each restart
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        camera = Camera(options.picture)
        stack.callback(camera.close)
        broker = stack.enter_context(Mosquitto(folder))
        run = Run(options, camera.url, broker.port, folder)
        stack.callback(run.close)
        broker.save()  # that there is a subscriber
        samples = endure(run, befalls(options, broker, camera), options)
        exit_s = run.stop()
        good = report(run, camera, samples, exit_s, options)
        if not good:
            sys.stderr.write(run.log.read_text())
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
