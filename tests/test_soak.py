from __future__ import annotations

import json
import random
import shutil
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edgekit.devices.soak import soak
from edgekit.devices.soak.proxy import Passage, Proxy, Traffic
from edgekit.devices.soak.result import blame
from edgekit.errors import BrokerError

pytestmark = pytest.mark.no_runtime

NO_FAULTS = dict.fromkeys(soak.Faults.__dataclass_fields__, 0)


@pytest.fixture
def needs_mosquitto(mosquitto: Any) -> None:
    """Skips where there is none."""


def test_soak_loses_nothing_over_faults(needs_mosquitto: None, edgekit_cli: Any, tmp_path: Path) -> None:
    result = edgekit_cli(
        *"soak --duration 8 --seed 3 --broker-kills 1 --broker-restarts 1 --runtime-kills 1".split(),
        *"--cuts 1 --delays 1 --disk-full 1 --folder left --json".split(),
    )
    assert result.returncode == 0, result.stderr
    account = json.loads(result.stdout)
    assert account["sent"] > 200 and account["lost"] == [] and account["duplicates_unflagged"] == 0
    assert account["received"] == account["sent"] + account["untold"]
    assert account["faults"] == {
        "kill broker": 1, "restart broker": 1, "kill runtime": 1, "cut": 1, "delay": 1, "fill disk": 1,
    }  # fmt: skip
    assert account["runtime_starts"] >= 2
    assert "connecting again" in (tmp_path / "left" / "runtime.log").read_text()


def test_soak_runs_a_bundle(needs_mosquitto: None, edgekit_cli: Any, models: Path, frames: Path) -> None:
    result = edgekit_cli(
        "soak", models / "int8.tflite", "--source", frames, *"--rate 20 --duration 6 --broker-kills 1".split(),
        *"--broker-restarts 0 --runtime-kills 1 --cuts 0 --delays 0 --disk-full 0".split(),
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "lost 0\n" in result.stdout and "1 x kill runtime" in result.stdout


@pytest.mark.parametrize(
    ("put", "lost", "twice"),
    [
        ("b'7\",\"boot_id' in message[2] or put(*message)", True, False),
        ("put(*message) and put(*message)", False, True),
    ],
    ids=["loses", "repeats"],
)
def test_soak_tells_of_a_runtime_that(
    put: str, lost: bool, twice: bool, needs_mosquitto: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A spool that says to have taken a prediction and has not, or takes it twice."""
    (tmp_path / "runtime.py").write_text(
        "from edgekit.devices.soak import runtime\n"
        "put = runtime.Spool.put\n"
        f"runtime.Spool.put = lambda *message: {put}\n"
        "runtime.main()\n"
    )
    monkeypatch.setattr(soak, "_MADE", (str(tmp_path / "runtime.py"),))
    monkeypatch.setattr(soak, "_PATIENCE_S", 3.0)
    result = soak.soak(duration_s=2, **NO_FAULTS)
    assert not result.sound
    assert bool(result.lost) == lost and bool(result.duplicates_unflagged) == twice
    assert all(one.id.endswith("7") and one.by == "runtime" for one in result.lost)
    assert ("by the runtime: never sent" in str(result)) == lost
    assert ("not marked as such" in str(result)) == twice


def test_soak_starts_a_runtime_again_that_ends_by_itself(
    needs_mosquitto: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runtime.py").write_text(
        "import os, pathlib, threading\n"
        "from edgekit.devices.soak import runtime\n"
        "ended = pathlib.Path(__file__).with_name('ended')\n"
        "def end():\n"
        "    ended.touch()\n"
        "    os.write(2, b'no more\\n')\n"
        "    os._exit(3)\n"
        "ended.exists() or threading.Timer(0.5, end).start()\n"
        "runtime.main()\n"
    )
    monkeypatch.setattr(soak, "_MADE", (str(tmp_path / "runtime.py"),))
    result = soak.soak(duration_s=6, **NO_FAULTS)
    assert result.sent and result.sound
    assert result.runtime_ended == ["no more"] and result.runtime_starts == 2


@pytest.mark.parametrize(
    ("first", "second", "by"),
    [
        (None, None, "runtime"),
        (Passage(2), None, "runtime"),
        (Passage(1, 0x87), None, "runtime"),
        (Passage(1, 0x10), None, "broker"),
        (Passage(1, 0), None, "broker"),
        (Passage(1, 0), Passage(1), "broker"),
        (Passage(1, 0), Passage(1, 0), "subscriber"),
    ],
)
def test_blame_goes_to_who_had_it_last(first: Passage | None, second: Passage | None, by: str) -> None:
    assert blame("boot-1", first, second).by == by


def test_schedule_is_that_of_its_seed_and_has_one_fault_of_a_kind_at_a_time() -> None:
    faults = soak.Faults(broker_kills=20, broker_restarts=3, runtime_kills=5, cuts=4, delays=3, disk_full=2)
    steps = soak.schedule(faults, 100.0, random.Random(1))
    assert steps == soak.schedule(faults, 100.0, random.Random(1)) != soak.schedule(faults, 100.0, random.Random(2))
    assert all(0 < step.at_s < 100 for step in steps)
    counts = Counter(step.action for step in steps)
    assert counts["kill broker"] == 20 and counts["restart broker"] == 3 and counts["start broker"] == 23
    assert counts["mend network"] == 7 and counts["fill disk"] == counts["free disk"] == 2
    of_broker = [step.action == "start broker" for step in steps if step.action.endswith("broker")]
    assert of_broker == [False, True] * 23


@pytest.mark.parametrize(
    ("options", "what"),
    [(["--rate", "0"], "soak: expected a rate"), (["bundle.tflite"], "--source"), (["--source", "a.png"], "BUNDLE")],
)
def test_soak_refuses_what_it_cannot_do(options: list[str], what: str, edgekit_fails: Any) -> None:
    assert what in edgekit_fails("soak", *options)


def test_soak_of_a_bundle_that_cannot_be_run(needs_mosquitto: None, edgekit_fails: Any) -> None:
    error = edgekit_fails("soak", "missing.tflite", "--source", "missing.png")
    assert "the runtime does not start" in error and "missing.tflite" in error


def test_soak_without_mosquitto(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    with pytest.raises(BrokerError, match="mosquitto is not installed"):
        soak.soak(duration_s=1)


@pytest.fixture
def client() -> Iterator[Callable[[int], paho.Client]]:
    """Makes MQTT 5 clients on a port of this machine, connected."""
    clients: list[paho.Client] = []

    def connect(port: int) -> paho.Client:
        one = paho.Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        one.reconnect_delay_set(1, 1)
        one.connect("127.0.0.1", port)
        one.loop_start()
        clients.append(one)
        return one

    yield connect
    for one in clients:
        one.disconnect()
        one.loop_stop()


def publish(client: paho.Client, prediction: str, size: int = 0) -> None:
    payload = f'{{"id":"{prediction}","more":"{"x" * size}"}}'
    client.publish("edgekit/a/b/prediction", payload, 1).wait_for_publish(10)


def test_proxy_notes_what_passes(broker: Any, client: Callable[[int], paho.Client]) -> None:
    traffic, onward = Traffic(), Traffic()
    with Proxy(broker.port, traffic) as proxy, Proxy(broker.port, onward) as other:
        sender, receiver = client(proxy.port), client(other.port)
        publish(sender, "boot-1")
        arrived = threading.Semaphore(0)
        receiver.on_message = lambda *_: arrived.release()
        receiver.on_subscribe = lambda *_: arrived.release()
        receiver.subscribe("edgekit/#", 1)
        assert arrived.acquire(timeout=10)
        publish(sender, "boot-2", 1000)
        publish(sender, "boot-3", 300_000)
        sender.publish("edgekit/a/b/prediction", '{"id":"boot-4"}', 0)  # acknowledged by none
        assert all(arrived.acquire(timeout=10) for _ in range(3))
        assert traffic.passages() == {"boot-1": Passage(1, 0x10), "boot-2": Passage(1, 0), "boot-3": Passage(1, 0)}
        assert onward.subscribed_s > traffic.subscribed_s == 0 and onward.passages().keys() == {"boot-2", "boot-3"}


def test_proxy_cut_and_mended(broker: Any, client: Callable[[int], paho.Client]) -> None:
    with Proxy(broker.port, Traffic()) as proxy:
        one = client(proxy.port)
        publish(one, "boot-1")
        lost, refused, back = threading.Event(), threading.Event(), threading.Event()
        one.on_disconnect = lambda *_: (refused if lost.is_set() else lost).set()
        one.on_connect = lambda *_: back.set()
        proxy.cut()
        assert lost.wait(10) and refused.wait(10) and not back.is_set()
        proxy.mend()
        assert back.wait(10)
        publish(one, "boot-2")


def test_proxy_delay(broker: Any, client: Callable[[int], paho.Client]) -> None:
    with Proxy(broker.port, Traffic()) as proxy:
        one = client(proxy.port)
        publish(one, "boot-1")
        proxy.delay_s = 0.3
        began_s = time.monotonic()
        publish(one, "boot-2")
        assert time.monotonic() - began_s >= 0.6  # there and back
