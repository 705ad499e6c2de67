from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

pytestmark = pytest.mark.no_runtime

TOPIC = "edgekit/pi/door/prediction"
EVENT = {
    "schema": "edgekit.event/1", "event_id": "a-1", "event": "begin", "boot_id": "b", "device": "pi", "stream": "door",
    "at": "2026-11-22T03:04:05.678Z", "class_id": 3, "label": "macaw", "score": 0.91, "replayed": False,
}  # fmt: skip
END = {**EVENT, "event": "end", "at": "2026-11-22T03:04:07.178Z", "score": 0.38, "replayed": True}


@pytest.fixture
def listen(broker: Any, until_listening: Any) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts ``edgekit listen`` and returns once it does."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str, **options: Any) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "edgekit", "listen", "--broker", broker.url, "--timeout", "20", *arguments]
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **options}
        started.append(subprocess.Popen(command, **options))
        until_listening(started[-1])
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_lines_are_for_people(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--count", "4")
    broker.publish("edgekit/pi/status", "online")
    broker.publish(TOPIC, *predictions(5), *predictions(5, 8, replayed=True), *predictions(9, predictions=[]))
    output, log = listening.communicate(timeout=30)
    start = "2026-11-22T03:04:05.678Z  pi/door  "
    assert output.splitlines() == [
        "edgekit/pi/status  online",
        f"{start}#5  macaw 0.91",
        f"{start}#5  macaw 0.91  [replayed]  [duplicate]",
        f"{start}#8  macaw 0.91  [replayed]  [2 missing]",
        f"{start}#9  -",
    ]
    assert log.splitlines()[-1] == (
        "2 missing (pi/door 'b' 6-7): 3 predictions of 1 stream, 1 duplicate (all replayed), 0 reordered"
    )
    assert listening.returncode == 0


def test_lines_tell_events(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--count", "1")
    left = {**EVENT, "event_id": "a-2"}
    no_time = {**EVENT, "event_id": "a-3", "event": "end", "at": "2026-99-99T99:99:99.999Z"}
    broker.publish("edgekit/pi/door/event", EVENT, END, END, left, {**no_time, "event": "begin", "class_id": 4})
    broker.publish("edgekit/pi/door/event", {**no_time, "class_id": 4})
    broker.publish(TOPIC, *predictions(1, boot_id="c"))
    output, log = listening.communicate(timeout=30)
    began, ended = "2026-11-22T03:04:05.678Z  pi/door  ", "2026-11-22T03:04:07.178Z  pi/door  "
    assert output.splitlines() == [
        f"{began}begin  macaw 0.91",
        f"{ended}end  macaw 0.38 after 1.5 s  [replayed]",
        f"{ended}end  macaw 0.38  [replayed]  [duplicate]",
        f"{began}begin  macaw 0.91",
        "2026-99-99T99:99:99.999Z  pi/door  begin  macaw 0.91",
        "2026-99-99T99:99:99.999Z  pi/door  end  macaw 0.91",
        f"{began}#1  macaw 0.91  [left open: macaw since 2026-11-22T03:04:05.678Z]",
    ]
    assert listening.returncode == 0 and "1 prediction of 1 stream" in log


def test_json_tells_events(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--count", "1", "--json")
    broker.publish("edgekit/pi/door/event", EVENT, END, END, {**EVENT, "event_id": "a-2"})
    broker.publish(TOPIC, *predictions(1, boot_id="c"))
    lines = [json.loads(line) for line in listening.communicate(timeout=30)[0].splitlines()]
    assert lines[0] == {"topic": "edgekit/pi/door/event", "payload": EVENT}
    odd = [{name: value for name, value in line.items() if name not in ("topic", "payload")} for line in lines]
    assert odd == [{}, {"held_s": 1.5}, {"duplicate": True}, {}, {"left_open": ["a-2"]}]


def test_line_steers_no_terminal(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--count", "1")
    broker.publish("edgekit/pi/door/event", {**EVENT, "label": "\x1b[2J"})
    broker.publish(TOPIC, *predictions(1, predictions=[{"class_id": 0, "label": "\x1b[2J\x9b2J\n", "score": 1}]))
    output, _ = listening.communicate(timeout=30)
    assert "\x1b" not in output and output.endswith("#1  \ufffd[2J\ufffd2J\ufffd 1.00\n")


def test_json_has_topic_and_payload_and_what_is_odd(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--count", "3", "--json")
    payloads = predictions(1, 4, 4)
    broker.publish(TOPIC, *payloads)
    first, second, third = map(json.loads, listening.communicate(timeout=30)[0].splitlines())
    assert first == {"topic": TOPIC, "payload": payloads[0]}
    assert second == {"topic": TOPIC, "payload": payloads[1], "missing": [2, 3]}
    assert third == {"topic": TOPIC, "payload": payloads[2], "duplicate": True}


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_signal_ends_with_the_accounting(listen: Any, broker: Any, predictions: Any, number: int, status: int) -> None:
    listening = listen()
    broker.publish(TOPIC, *predictions(1, 2))
    assert [listening.stdout.readline() for _ in range(2)]
    listening.send_signal(number)
    _, log = listening.communicate(timeout=30)
    assert log == "nothing missing: 2 predictions of 1 stream, 0 duplicates, 0 reordered\n"
    assert listening.returncode == status


def test_listener_of_a_group_says_that_it_has_a_part(listen: Any, broker: Any, predictions: Any) -> None:
    listening = listen("--group", "g", "--prefix", "site/a", "--count", "2")
    broker.publish("site/a/pi/door/prediction", *predictions(1, 3))
    output, log = listening.communicate(timeout=30)
    assert "missing" not in output and "one of a group" in log.splitlines()[-1]


def test_session_keeps_what_comes_while_no_one_listens(listen: Any, broker: Any, predictions: Any) -> None:
    session = ("--client-id", "log", "--session-expiry", "60", "--count", "2")
    broker.publish(TOPIC, *predictions(1))  # nobody has asked for it yet
    first = listen(*session)
    broker.publish(TOPIC, *predictions(2, 3))
    first.communicate(timeout=30)
    broker.publish(TOPIC, *predictions(4, 5))
    numbers = re.findall(r"#(\d)", listen(*session).communicate(timeout=30)[0])
    assert numbers == ["4", "5"]


@pytest.fixture
def table(listen: Any) -> Iterator[Callable[..., Callable[[], list[str]]]]:
    """Starts ``edgekit listen`` on a terminal; the result waits for its end and gives the lines of the last table."""
    ours, its = pty.openpty()

    def start(count: int) -> Callable[[], list[str]]:
        environment = {**os.environ, "COLUMNS": "120", "LINES": "5", "TERM": "xterm"}
        listening = listen("--count", str(count), stdout=its, env=environment)
        os.close(its)

        def lines() -> list[str]:
            shown = b""
            try:
                while part := os.read(ours, 65536):
                    shown += part
            except OSError:  # it has ended
                pass
            assert listening.wait(20) == 0
            return re.sub(rb"\x1b\[[0-9;?]*[A-Za-z]", b"", shown).decode().split("device")[-1].splitlines()

        return lines

    yield start
    os.close(ours)


def test_table_on_a_terminal(table: Any, broker: Any, predictions: Any) -> None:
    lines = table(7)
    broker.publish("edgekit/pi/status", "offline")
    broker.publish("edgekit/a/door/prediction", *predictions(1, device="a"))
    broker.publish("edgekit/z/door/prediction", *predictions(1, device="z"))
    broker.publish(TOPIC, *predictions(1, 4, 4), *predictions(4, 5, replayed=True))
    last = lines()
    assert last[0].split() == ["stream", "label", "score", "when", "(UTC)", "rate", "received", "missing", "duplicates"]
    assert last[1].split()[:5] == ["a", "door", "macaw", "0.91", "03:04:05"]
    assert last[2].split()[:7] == ["pi", "(offline)", "door", "macaw", "0.91", "replayed", "03:04:05"]
    assert last[2].split()[8:] == ["3", "2", "2"]
    assert "and 1 more" in last[3]


def test_table_has_what_is_held_once_something_was(table: Any, broker: Any, predictions: Any) -> None:
    lines = table(2)
    other = {**EVENT, "event_id": "a-2", "class_id": 4, "label": "parrot", "score": 0.95}
    broker.publish("edgekit/pi/door/event", EVENT, other)
    broker.publish("edgekit/a/door/prediction", *predictions(1, device="a"))
    broker.publish(TOPIC, *predictions(1))
    last = lines()
    assert last[0].split()[:4] == ["stream", "label", "held", "score"]
    assert last[1].split()[:4] == ["a", "door", "macaw", "-"]
    assert last[2].split()[:5] == ["pi", "door", "macaw", "parrot,", "macaw"]


def test_nothing_that_comes_is_an_error(edgekit_fails: Any, broker: Any) -> None:
    assert "no message within 0.5 s" in edgekit_fails("listen", "--broker", broker.url, "--timeout", "0.5")


def test_reader_that_goes_ends_it_quietly(broker: Any, until_listening: Any, predictions: Any) -> None:
    command = f"{sys.executable} -m edgekit listen --broker {broker.url} --timeout 20 | head -n 1"
    listening = subprocess.Popen(command, shell=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    until_listening(listening)
    broker.publish(TOPIC, *predictions(1, 2, 3))
    broker.publish(TOPIC, *predictions(4, 5, 6))
    output, log = listening.communicate(timeout=30)
    assert output.count("\n") == 1 and "Error" not in log and "Traceback" not in log
