"""The examples for those who receive; the others are run by scripts/demo and the tests that train on digits."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.no_runtime

EXAMPLES = Path(__file__).parents[1] / "examples"
TOPIC = "edgekit/pi/door/prediction"
HEALTH = {
    "schema": "edgekit.health/1", "captured": 3, "inferred": 2, "dropped": {"behind": 1}, "failed": 0, "in_flight": 0,
    "fps": 4.5, "latency_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
    "spool": {"messages": 7, "bytes": 900, "oldest_s": 2.5, "shed": {"age": 4}},
    "delegate": {"requested": "auto", "active": "cpu", "operators_delegated": None, "operators": None},
    "streams": {}, "cpu_temp_c": None, "rss_bytes": 1, "uptime_s": 2.0,
}  # fmt: skip
EVENT = {
    "schema": "edgekit.event/1", "event_id": "a-1", "event": "begin", "boot_id": "b", "device": "pi", "stream": "door",
    "at": "2026-11-22T03:04:05.678Z", "class_id": 3, "label": "macaw", "score": 0.91, "replayed": False,
}  # fmt: skip


@pytest.fixture
def example(broker: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts an example and returns once it receives."""
    started: list[subprocess.Popen[str]] = []

    def start(name: str, *arguments: str | Path) -> subprocess.Popen[str]:
        command = [sys.executable, EXAMPLES / name, *arguments, "--broker", broker.url]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
        assert started[-1].stderr and started[-1].stderr.readline() == "receiving\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def rows(database: Path) -> list[tuple[Any, ...]]:
    with sqlite3.connect(database) as connection:
        return connection.execute("SELECT seq, label, score FROM prediction ORDER BY seq").fetchall()


def test_into_sqlite_has_each_prediction_once_whoever_is_killed(
    example: Any, broker: Any, predictions: Any, tmp_path: Path
) -> None:
    database = tmp_path / "predictions.sqlite"
    first = example("into_sqlite.py", database)
    broker.publish(TOPIC, *predictions(*range(1, 201)))
    deadline = time.monotonic() + 20
    while len(rows(database)) < 20 and time.monotonic() < deadline:
        time.sleep(0.01)
    first.kill()
    first.wait()
    broker.publish(TOPIC, *predictions(201, 202, predictions=[]), *predictions(5, replayed=True))
    second = example("into_sqlite.py", database)
    while len(rows(database)) < 202 and time.monotonic() < deadline:
        time.sleep(0.01)
    second.send_signal(signal.SIGTERM)
    _, log = second.communicate(timeout=20)
    assert rows(database) == [*((seq, "macaw", 0.91) for seq in range(1, 201)), (201, None, None), (202, None, None)]
    assert "nothing missing: " in log and second.returncode == 0


def test_into_sqlite_has_a_row_for_each_event(example: Any, broker: Any, tmp_path: Path, until: Any) -> None:
    database = tmp_path / "predictions.sqlite"
    writing = example("into_sqlite.py", database)
    end = {**EVENT, "event": "end", "at": "2026-11-22T03:04:07.178Z"}
    other, of_the_next_boot = {**EVENT, "event_id": "a-2"}, {**end, "event_id": "c-1", "boot_id": "c"}
    broker.publish("edgekit/pi/door/event", EVENT, end, {**EVENT, "replayed": True}, other, of_the_next_boot)
    began_at, ended_at = EVENT["at"], end["at"]
    expected = [("a-1", "b", began_at, ended_at), ("a-2", "b", began_at, None), ("c-1", "c", None, ended_at)]

    def events() -> list[tuple[Any, ...]]:
        with sqlite3.connect(database) as connection:
            return connection.execute("SELECT event_id, boot_id, began_at, ended_at FROM event").fetchall()

    until(lambda: len(events()) == 3)
    writing.send_signal(signal.SIGTERM)
    writing.communicate(timeout=20)
    assert events() == expected and writing.returncode == 0


def test_into_influx_writes_line_protocol(example: Any, broker: Any, predictions: Any) -> None:
    writing = example("into_influx.py")
    named = [{"class_id": 0, "label": "a cat, or=\n\\", "score": 0.5}, {"class_id": 1, "label": "dog", "score": 0.25}]
    broker.publish(TOPIC, *predictions(1, predictions=named))
    broker.publish("edgekit/pi/health", HEALTH)
    lines = [writing.stdout.readline() for _ in range(3)]
    writing.send_signal(signal.SIGTERM)
    _, log = writing.communicate(timeout=20)
    tags, at = "edgekit,device=pi,stream=door", "1795316645678000000"
    assert lines == [
        f"{tags},label=a\\ cat\\,\\ or\\=\\  score=0.5,rank=1i,total_ms=3.4 {at}\n",
        f"{tags},label=dog score=0.25,rank=2i,total_ms=3.4 {at}\n",
        "edgekit_health,device=pi fps=4.5,inferred=2i,dropped=1i,failed=0i,p99_ms=3.0,spooled=7i,shed=4i\n",
    ]
    assert "nothing missing" in log and writing.returncode == 0


def test_node_red_flow_is_wired() -> None:
    nodes = json.loads((EXAMPLES / "node_red_flow.json").read_text())
    by_id = {node["id"]: node for node in nodes}
    assert len(by_id) == len(nodes)
    reached = {target for node in nodes for wire in node.get("wires", []) for target in wire}
    assert reached == {node["id"] for node in nodes if node.get("inputs") != 0 and "wires" in node}
    for node in nodes:
        assert node.get("z", "edgekit-tab") in by_id
        if node["type"] == "mqtt in":
            assert by_id[node["broker"]]["type"] == "mqtt-broker"


@pytest.mark.skipif(not shutil.which("node-red"), reason="no Node-RED here")
def test_node_red_flow_shows_what_is_certain(broker: Any, predictions: Any, free_port: Any, tmp_path: Path) -> None:
    flow = json.loads((EXAMPLES / "node_red_flow.json").read_text())
    for node in flow:
        if node["type"] == "mqtt-broker":
            node.update(broker="127.0.0.1", port=str(broker.port))
        elif node["type"] == "debug":
            node.update(console=True)
    (tmp_path / "flow.json").write_text(json.dumps(flow))
    (tmp_path / "settings.js").write_text("module.exports = {}\n")
    running = subprocess.Popen(
        ["node-red", "--userDir", tmp_path, "--port", str(free_port()), tmp_path / "flow.json"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "HOME": str(tmp_path)},
    )
    try:
        assert running.stdout
        log = ""
        for line in running.stdout:
            log += line
            if "Connected to broker" in line:
                broker.publish(TOPIC, *predictions(1, 4, 4))
                unsure = [{"class_id": 3, "label": "macaw", "score": 0.4}]
                broker.publish(TOPIC, *predictions(5, predictions=unsure), *predictions(6))
            if "seq: 6" in line:
                break
        assert "2 predictions of pi/door missing before b-1" in log
        assert re.findall(r"\bseq: (\d+)", log) == ["1", "4", "6"]
    finally:
        running.terminate()
        running.wait(20)
