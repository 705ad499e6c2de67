"""The share of a core that ``edgekit run`` takes on a live microphone, the process that records included.

    python benchmarks/microphone.py BUNDLE [--source mic] [--seconds S] [--server]

It is measured after the first prediction, published nowhere. ``--server`` starts PulseAudio in user space, with a null
sink for a microphone, where there is no sound card; its own work is not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path

from edgekit import runtimes

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))


def cpu_s(process: int) -> float:
    """User and system time of a process and its children so far."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    own = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
    children = Path(f"/proc/{process}/task/{process}/children")
    threads = Path(f"/proc/{process}/task").iterdir()
    listed = " ".join((thread / "children").read_text() for thread in threads) if children.exists() else ""
    return own + sum(map(cpu_s, map(int, listed.split())))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measures the CPU time of a live microphone.")
    parser.add_argument("bundle")
    parser.add_argument("--source", default="mic")
    parser.add_argument("--seconds", type=float, default=30.0, help="how long to measure")
    parser.add_argument("--server", action="store_true", help="start a sound server in user space")
    options = parser.parse_args()
    bundle = Path(options.bundle).resolve()
    with ExitStack() as stack:
        environment = dict(os.environ)
        if options.server:
            from sound_server import SoundServer

            server = SoundServer(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            stack.callback(server.close)
            environment = server.environment
            server.play_tone(440, seconds=options.seconds + 90)
        run = subprocess.Popen(
            [sys.executable, "-m", "edgekit", "run", bundle, "--source", options.source, "--broker", "none", "--json"],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        stack.callback(run.kill)
        assert run.stdout
        if not run.stdout.readline():  # it warms up
            sys.exit("edgekit run gave no prediction; run it by hand to see why")
        before_s, started_s = cpu_s(run.pid), time.monotonic()
        latencies: list[float] = []
        while time.monotonic() - started_s < options.seconds:
            latencies.append(json.loads(run.stdout.readline())["latency_ms"]["total"])
        share = (cpu_s(run.pid) - before_s) / (time.monotonic() - started_s)
        run.terminate()
        run.communicate()
    runtime = next(iter(runtimes.installed()))
    print(
        f"{bundle.name} in {runtime}: {share:.2%} of a core for a result every {options.seconds / len(latencies):.2f} s"
    )
    print(f"from the end of a window to its prediction: median {sorted(latencies)[len(latencies) // 2]:.1f} ms")


if __name__ == "__main__":
    main()
