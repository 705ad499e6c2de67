from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from edgekit.broker import parse_broker
from edgekit.decode import Prediction
from edgekit.devices.publish.commands import Commands
from edgekit.devices.publish.home_assistant import Discovery
from edgekit.devices.publish.publisher import Publisher
from edgekit.devices.publish.spool import Spool
from edgekit.devices.results import Result
from edgekit.errors import BrokerError
from edgekit.messages import (
    BundleRef,
    DelegateHealth,
    HealthMessage,
    InfoMessage,
    Latency,
    Percentiles,
    PredictionMessage,
    SpoolHealth,
    StateMessage,
    Versions,
)
from edgekit.mqtt import Connection

pytestmark = pytest.mark.no_runtime

INFO = InfoMessage(
    schema="edgekit.info/1", device="pi", boot_id="b", profile="test", versions=Versions("0", "3", "-"), streams={}
)


def prediction(seq: int, label: str = "macaw", boot_id: str = "b") -> PredictionMessage:
    return PredictionMessage(
        schema="edgekit.prediction/1", id=f"{boot_id}-{seq}", boot_id=boot_id, seq=seq, device="pi", stream="door",
        captured_at="2026-11-22T03:04:05.678Z", replayed=False, bundle=BundleRef("n", "1", "00"), delegate="cpu",
        latency_ms=Latency(0.4, 2.8, 3.4), predictions=[Prediction(len(label), label, 0.91)],
    )  # fmt: skip


def give(publisher: Publisher, message: PredictionMessage, label: str = "", *, wait: bool = True) -> None:
    """What came of a frame of the stream ``door``; the state changed if there is a label."""
    state = (
        StateMessage(schema="edgekit.state/1", captured_at=message.captured_at, class_id=1, label=label, score=0.91)
        if label
        else None
    )
    publisher.publish("door", Result(message, [], state), wait=threading.Event() if wait else None)


@pytest.fixture(autouse=True)
def backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    # time enough for a test to listen first
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (1.0, 1.0))


@pytest.fixture
def stop() -> threading.Event:
    return threading.Event()


@pytest.fixture
def publisher(tmp_path: Path, stop: threading.Event) -> Callable[..., Publisher]:
    """Makes publishers of one spool."""

    def make(url: str, **options: Any) -> Publisher:
        limits = {name: options.pop(name) for name in ("max_bytes", "max_age_s") if name in options}
        spool = Spool(tmp_path / "spool" / "pi.door.sqlite", **limits)
        return Publisher(parse_broker(url), INFO, "edgekit-pi-door", spool, stop, **options)

    return make


def test_file_waits_for_room_no_longer_than_its_stream(
    publisher: Callable[..., Publisher], broker: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = threading.Event()
    with publisher(broker.url) as publishes, monkeypatch.context() as patched:
        patched.setattr(Spool, "full", property(lambda _spool: True))
        patched.setattr(Spool, "put", lambda *_: False)
        message = Result(prediction(1), [], None)
        waits = threading.Thread(target=lambda: publishes.publish("door", message, wait=end), daemon=True)
        waits.start()
        waits.join(0.3)
        assert waits.is_alive()
        end.set()
        waits.join(5)
        assert not waits.is_alive() and publishes._spool.shed == {"memory": 1}


@pytest.fixture
def listening() -> Any:
    """What arrives at a broker, as (topic, payload, message), from now on and over its restarts."""
    opened: list[Connection] = []

    def listen(broker: Any, topic: str = "edgekit/#") -> list[tuple[str, Any, Any]]:
        got: list[tuple[str, Any, Any]] = []
        subscribed = threading.Event()

        def receive(message: Any) -> None:
            text = message.payload.decode()
            got.append((message.topic, json.loads(text) if text[:1] == "{" else text, message))

        connection = Connection(
            parse_broker(broker.url),
            f"listener-{len(opened)}",
            subscriptions=[topic],
            on_message=receive,
            on_subscribe=lambda _reasons: subscribed.set(),
        )
        opened.append(connection)
        connection.start(10)
        assert subscribed.wait(10)
        return got

    yield listen
    for connection in opened:
        connection.close()


def predictions(got: list[tuple[str, Any, Any]]) -> list[tuple[int, bool]]:
    return [(payload["seq"], payload["replayed"]) for topic, payload, _ in got if topic.endswith("/prediction")]


def test_broker_away_at_the_start_gets_all_in_order_later(
    mosquitto: Any, publisher: Any, listening: Any, until: Any, caplog: Any
) -> None:
    broker = mosquitto()
    broker.stop()
    with publisher(broker.url) as publishes:
        for seq in range(1, 51):
            give(publishes, prediction(seq))
        assert "cannot be reached" in caplog.text
        broker.start()
        got = listening(broker)
        until(lambda: len(predictions(got)) >= 50)
        give(publishes, prediction(51))
        until(lambda: len(predictions(got)) >= 51)
    assert predictions(got) == [(seq, True) for seq in range(1, 51)] + [(51, False)]


def test_what_was_under_way_when_the_broker_died_is_marked_when_it_comes_again(
    broker: Any, publisher: Any, listening: Any, until: Any
) -> None:
    with publisher(broker.url) as publishes:
        before = listening(broker)
        give(publishes, prediction(1))
        until(lambda: predictions(before) == [(1, False)])
        broker.pause()
        give(publishes, prediction(2))
        until(lambda: publishes._inflight)
        broker.kill()
        broker.start()
        after = listening(broker)
        until(lambda: predictions(after))
    assert predictions(after) == [(2, True)] and predictions(before)[1:] in ([], [(2, True)])
    until(lambda: ("edgekit/pi/status", "offline") in [(topic, payload) for topic, payload, _ in after])


def test_killed_process_leaves_what_it_had_not_sent_to_the_next(
    mosquitto: Any, publisher: Any, listening: Any, until: Any, tmp_path: Path, free_port: Any
) -> None:
    script = tmp_path / "publishes.py"
    script.write_text(
        "import sys, threading\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "from test_publisher import INFO, Publisher, Spool, give, parse_broker, prediction\n"
        f"spool = Spool(Path({str(tmp_path / 'spool' / 'pi.door.sqlite')!r}))\n"
        f"address = parse_broker('mqtt://127.0.0.1:{free_port()}')\n"
        "publishes = Publisher(address, INFO, 'edgekit-pi-door', spool, threading.Event())\n"
        "for seq in range(1, 101):\n"
        "    give(publishes, prediction(seq, boot_id='old'))\n"
        "    print(seq, flush=True)\n"
        "threading.Event().wait()\n"
    )
    child = subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert child.stdout
    while child.stdout.readline().strip() != "100":
        assert child.poll() is None, child.stderr and child.stderr.read()
    child.send_signal(signal.SIGKILL)
    child.communicate()
    broker = mosquitto()
    got = listening(broker)
    with publisher(broker.url) as publishes:
        give(publishes, prediction(1, boot_id="new"))
    until(lambda: len(predictions(got)) >= 101)
    arrived = [(p["boot_id"], p["seq"], p["replayed"]) for topic, p, _ in got if topic.endswith("/prediction")]
    # the new one may have been there before the connection was
    assert arrived[:-1] == [("old", seq, True) for seq in range(1, 101)] and arrived[-1][:2] == ("new", 1)


def test_disk_that_hangs_holds_nobody_up_and_what_finds_no_room_is_counted(
    mosquitto: Any, publisher: Any, stop: Any, monkeypatch: pytest.MonkeyPatch, until: Any, listening: Any
) -> None:
    # by default Mosquitto drops what is more than a thousand ahead of a listener
    broker = mosquitto("allow_anonymous true", "max_queued_messages 0")
    goes_on = threading.Event()
    store = Spool.store

    def hang(spool: Spool, urgent: bool = True) -> float:
        goes_on.wait()
        return store(spool, urgent)

    publishes = publisher(broker.url)
    got = listening(broker)
    monkeypatch.setattr(Spool, "store", hang)
    for seq in range(1, 10_001):
        give(publishes, prediction(seq), wait=False)
    shed = publishes._spool.shed["memory"]
    assert 0 < shed < 10_000
    goes_on.set()
    until(lambda: len(predictions(got)) >= 10_000 - shed)
    stop.set()
    publishes.close()
    assert [seq for seq, _ in predictions(got)] == list(range(1, 10_001 - shed))


def test_what_waited_is_sent_at_a_bounded_rate(mosquitto: Any, publisher: Any, listening: Any, until: Any) -> None:
    broker = mosquitto()
    broker.stop()
    publishes = publisher(broker.url, replay_per_s=100.0)
    for seq in range(1, 121):
        give(publishes, prediction(seq))
    broker.start()
    got = listening(broker)
    until(lambda: predictions(got))
    began_s = time.monotonic()
    until(lambda: len(predictions(got)) == 120)
    assert time.monotonic() - began_s > 0.8
    publishes.close()


def test_refused_messages_are_kept_until_they_are_allowed(
    mosquitto: Any,
    publisher: Any,
    listening: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    until: Any,
    caplog: Any,
) -> None:
    monkeypatch.setattr("edgekit.devices.publish.publisher.REFUSED_RETRY_S", 0.2)
    rules = tmp_path / "acl"
    rules.write_text("topic read #\n")
    for path in (tmp_path, tmp_path.parent, rules):
        path.chmod(0o755)
    broker = mosquitto("allow_anonymous true", f"acl_file {rules}", "user root")
    got = listening(broker)
    with publisher(broker.url) as publishes:
        for seq in (1, 2, 3):
            give(publishes, prediction(seq))
        until(lambda: "refuses what is published: not authorized" in caplog.text)
        rules.write_text("topic readwrite #\n")
        broker._process.send_signal(signal.SIGHUP)
        until(lambda: len(predictions(got)) >= 3)
    assert [seq for seq, _ in predictions(got)] == [1, 2, 3]


def test_message_that_is_too_large_for_the_broker_is_shed_and_holds_up_no_other(
    mosquitto: Any, publisher: Any, listening: Any, until: Any
) -> None:
    broker = mosquitto("allow_anonymous true", "max_packet_size 2000")
    got = listening(broker)
    with publisher(broker.url) as publishes:
        for seq, label in ((1, "a"), (2, "b" * 3000), (3, "c")):
            give(publishes, prediction(seq, label))
        until(lambda: len(predictions(got)) == 2)
        shed = dict(publishes._spool.shed)
    assert predictions(got) == [(1, False), (3, False)] and shed == {"too large for the broker": 1}


def test_whatever_is_too_large_for_the_broker_is_left_out_and_reported_once(
    mosquitto: Any, publisher: Any, listening: Any, until: Any, caplog: Any
) -> None:
    broker = mosquitto("allow_anonymous true", "max_packet_size 1000")
    got = listening(broker)

    class Answers(Commands):
        def answer(self, payload: bytes | bytearray, **_: Any) -> list[bytes]:
            return [payload[:1] * (2000 if payload == b"large" else 10)]

    large = InfoMessage(
        schema="edgekit.info/1", device="pi", boot_id="b", profile="x" * 2000, versions=Versions("0", "3", "-"),
        streams={},
    )  # fmt: skip
    discovery = Discovery("pi", {"origin": {"name": "EdgeKit"}, "components": {}, "device": {"name": "x" * 2000}})
    with publisher(broker.url, commands=Answers(dict), discovery=discovery) as publishes:
        publishes.announce(large)
        give(publishes, prediction(1), "owl" * 500)
        until(lambda: "pi/config" in caplog.text)
        asks = Connection(parse_broker(broker.url), "asks")
        asks.start(10)
        for question in (b"large", b"large", b"small"):
            properties = Properties(PacketTypes.PUBLISH)
            properties.ResponseTopic = "edgekit/pi/response/me"
            asks.client.publish("edgekit/pi/command", question, 1, properties=properties)
        until(lambda: ("edgekit/pi/response/me", "s" * 10) in [(topic, payload) for topic, payload, _ in got])
        asks.close()
    until(lambda: ("edgekit/pi/status", "offline") in [(topic, payload) for topic, payload, _ in got])
    assert [payload for topic, payload, _ in got if topic == "edgekit/pi/status"] == ["online", "offline"]
    assert [seq for seq, _ in predictions(got)] == [1]
    assert all(len(message.payload) < 1000 for *_, message in got)
    lines = [record.getMessage() for record in caplog.records if "is left out" in record.getMessage()]
    left_out = ("edgekit/pi/info", "edgekit/pi/door/state", "homeassistant/device/pi/config", "an answer to a command")
    assert len(lines) == 4 and all(any(what in line for line in lines) for what in left_out)


def test_broker_is_told_how_long_to_keep_a_prediction(broker: Any, publisher: Any, listening: Any, until: Any) -> None:
    got = listening(broker, "edgekit/pi/door/prediction")
    with publisher(broker.url, max_age_s=100.0) as publishes:
        give(publishes, prediction(1))
        until(lambda: got)
    assert 95 <= got[0][2].properties.MessageExpiryInterval <= 100


def test_stop_while_the_broker_is_away_keeps_what_is_left(
    publisher: Any, stop: Any, free_port: Any, monkeypatch: pytest.MonkeyPatch, caplog: Any
) -> None:
    monkeypatch.setattr("edgekit.devices.publish.publisher.STOP_TIMEOUT_S", 0.2)
    url = f"mqtt://127.0.0.1:{free_port()}"
    with publisher(url) as publishes:
        give(publishes, prediction(1))
        stop.set()
    assert "1 messages are left; they are kept in" in caplog.text
    stop.clear()
    with (
        pytest.raises(
            BrokerError, match=r"cannot be reached: 2 messages are left; they are kept in .*pi\.door\.sqlite"
        ),
        publisher(url) as publishes,
    ):
        give(publishes, prediction(2))


def test_without_a_disk_what_is_left_is_an_error(
    stop: threading.Event, free_port: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgekit.devices.publish.publisher.STOP_TIMEOUT_S", 0.2)
    address = parse_broker(f"mqtt://127.0.0.1:{free_port()}")
    stop.set()
    with (
        pytest.raises(BrokerError, match=r"cannot be reached: 1 messages are left; check the broker and run again"),
        Publisher(address, INFO, "edgekit-pi-door", Spool(None), stop) as publishes,
    ):
        give(publishes, prediction(1))


def test_state_is_told_again_to_a_broker_that_forgot_it(
    broker: Any, publisher: Any, listening: Any, until: Any
) -> None:
    with publisher(broker.url) as publishes:
        give(publishes, prediction(1, "owl"), "owl")
        first = listening(broker, "edgekit/pi/door/state")
        until(lambda: [payload["label"] for _, payload, _ in first] == ["owl"])
        broker.kill()
        broker.start()
        second = listening(broker, "edgekit/pi/+/state")
        until(lambda: [payload["label"] for _, payload, _ in second][:1] == ["owl"])


def test_health_tells_of_the_spool(broker: Any, publisher: Any, listening: Any, until: Any) -> None:
    def health(spool: SpoolHealth) -> HealthMessage:
        return HealthMessage(
            schema="edgekit.health/1", captured=1, inferred=1, dropped={}, failed=0, in_flight=0, fps=1.0,
            latency_ms=Percentiles(None, None, None), spool=spool, delegate=DelegateHealth("auto", "cpu", None, None),
            streams={}, cpu_temp_c=None, rss_bytes=None, uptime_s=1.0,
        )  # fmt: skip

    got = listening(broker, "edgekit/pi/health")
    with publisher(broker.url, health=health):
        until(lambda: got)
    assert got[0][1]["spool"] == {"messages": 0, "bytes": 0, "oldest_s": None, "shed": {}}


def test_credentials_that_are_refused_at_the_start_are_an_error_and_the_spool_is_free_again(
    mosquitto: Any, publisher: Any, tmp_path: Path
) -> None:
    broker = mosquitto("allow_anonymous false")
    for _ in range(2):
        with pytest.raises(BrokerError, match="refused the connection"):
            publisher(broker.url)
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["pi.door.sqlite"]
