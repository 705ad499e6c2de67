from __future__ import annotations

import asyncio
import json
import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.reasoncodes import ReasonCode

from edgekit import Subscriber
from edgekit.accounting import Accounting
from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError, EdgekitError
from edgekit.messages import PredictionMessage

pytestmark = pytest.mark.no_runtime

OTHERS = {
    "event": {
        "schema": "edgekit.event/1", "event_id": "e", "event": "begin", "boot_id": "b", "device": "pi",
        "stream": "door", "at": "2026-11-22T03:04:05.678Z", "class_id": 3, "label": "macaw", "score": 0.91,
        "replayed": False,
    },
    "state": {
        "schema": "edgekit.state/1", "captured_at": "2026-11-22T03:04:05.678Z", "class_id": 3, "label": "macaw",
        "score": 0.91,
    },
    "info": {
        "schema": "edgekit.info/1", "device": "pi", "boot_id": "b", "profile": "pi",
        "versions": {"edgekit": "1", "python": "3", "runtime": "2"}, "streams": {},
    },
    "health": {
        "schema": "edgekit.health/1", "captured": 3, "inferred": 2, "dropped": {"behind": 1}, "failed": 0,
        "in_flight": 0, "fps": 4.5, "latency_ms": {"p50": 1.0, "p95": 2.0, "p99": 3.0},
        "spool": {"messages": 0, "bytes": 0, "oldest_s": None, "shed": {}},
        "delegate": {"requested": "auto", "active": "cpu", "operators_delegated": None, "operators": None},
        "streams": {}, "cpu_temp_c": None, "rss_bytes": 1, "uptime_s": 2.0,
    },
}  # fmt: skip
TOPIC = "edgekit/pi/door/prediction"


def seqs_until_silence(subscriber: Subscriber, silence_s: float = 0.5) -> list[int]:
    seqs = []
    try:
        while True:
            message = subscriber.next(silence_s)
            assert message.prediction
            seqs.append(message.prediction.seq)
    except TimeoutError:
        return seqs


@pytest.fixture
def lasting(mosquitto: Callable[..., Any], tmp_path: Path) -> Any:
    """A broker that keeps its sessions when it is stopped."""
    tmp_path.chmod(0o755)
    return mosquitto("allow_anonymous true", "persistence true", f"persistence_location {tmp_path}/", "user root")


def test_message_is_typed(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url, device="pi", stream="door") as subscriber:
        broker.publish(TOPIC, *predictions(1))
        message = subscriber.next(10)
    assert (message.kind, message.device, message.stream) == ("prediction", "pi", "door")
    assert (message.label, message.score, message.captured_at) == ("macaw", 0.91, "2026-11-22T03:04:05.678Z")
    assert message.prediction == msgspec.convert(*predictions(1), PredictionMessage)


@pytest.mark.parametrize("kind", OTHERS)
def test_message_of_another_kind_is_typed(broker: Any, kind: Any) -> None:
    topic = f"edgekit/pi/{kind}" if kind in ("info", "health") else f"edgekit/pi/door/{kind}"
    with Subscriber(broker.url, kinds=(kind,)) as subscriber:
        broker.publish(topic, OTHERS[kind])
        message = subscriber.next(10)
    assert message.payload == json.loads(msgspec.json.encode(getattr(message, kind))) == OTHERS[kind]
    named = kind in ("event", "state")
    assert (message.label, message.score) == (("macaw", 0.91) if named else (None, None))
    assert message.captured_at == ("2026-11-22T03:04:05.678Z" if named else None)


def test_missing_holds_the_seqs_that_never_came(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url) as subscriber:
        broker.publish(TOPIC, *predictions(5, 6, 9, 10), *predictions(1, boot_id="c"))
        assert [list(subscriber.next(10).missing) for _ in range(5)] == [[], [], [7, 8], [], []]
        assert str(subscriber.accounting).startswith("2 missing (pi/door 'b' 7-8): 5 predictions of 1 stream")


def test_duplicate_is_told(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url) as subscriber:
        broker.publish(TOPIC, *predictions(1, 2), *predictions(1, replayed=True))
        assert [subscriber.next(10).duplicate for _ in range(3)] == [False, False, True]
        assert "1 duplicate (all replayed)" in str(subscriber.accounting)


def test_events_are_paired_and_change_nothing_of_the_accounting(broker: Any, predictions: Any) -> None:
    """A device that is killed while it holds a label, and sends once more what was under way."""

    def event(event: str, event_id: str = "a-1", **changes: Any) -> dict[str, Any]:
        return {**OTHERS["event"], "event_id": event_id, "event": event, **changes}

    begin, end = event("begin"), event("end", at="2026-11-22T03:04:07.178Z", score=0.25)
    left = event("begin", "a-2", at="2026-11-22T03:05:00.000Z")
    with Subscriber(broker.url, kinds=("prediction", "event")) as subscriber:
        broker.publish(TOPIC, *predictions(1))
        broker.publish("edgekit/pi/door/event", begin, end, {**end, "replayed": True}, left)
        broker.publish(TOPIC, *predictions(2, 3), *predictions(1, boot_id="c"))
        messages = [subscriber.next(10) for _ in range(8)]
    assert [message.duplicate for message in messages] == [False, False, False, True, False, False, False, False]
    assert messages[1].held_s is None and messages[2].began == messages[1].event and messages[2].held_s == 1.5
    assert messages[3].held_s is None
    assert messages[7].left_open == (messages[4].event,) and not any(message.left_open for message in messages[:7])
    assert subscriber.events.open == []
    assert str(subscriber.accounting) == "nothing missing: 4 predictions of 1 stream, 0 duplicates, 0 reordered"


def test_prefix_may_have_several_levels(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url, prefix="site/hall-2", device="pi") as subscriber:
        broker.publish("site/hall-2/pi/door/prediction", *predictions(1))
        assert subscriber.next(10).device == "pi"


def test_only_what_was_asked_for_arrives(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url, device="pi", kinds=("prediction", "status")) as subscriber:
        broker.publish("edgekit/other/door/prediction", *predictions(1))
        broker.publish("edgekit/pi/door/state", {"a": 1})
        broker.publish("edgekit/pi/status", "online")
        message = subscriber.next(10)
        assert (message.kind, message.device, message.payload, message.label) == ("status", "pi", "online", None)
        with pytest.raises(TimeoutError):
            subscriber.next(0.3)


def test_message_of_others_is_skipped_with_a_warning(
    broker: Any, caplog: pytest.LogCaptureFixture, predictions: Any
) -> None:
    caplog.set_level(logging.WARNING)
    with Subscriber(broker.url) as subscriber:
        broker.publish(TOPIC, "not JSON", "[" * 100_000, *predictions(2**63), *predictions("many"))
        broker.publish("edgekit/other/door/prediction", *predictions(1))  # in the name of pi
        broker.publish(TOPIC, *predictions(1))
        assert subscriber.next(10).label == "macaw"
    assert caplog.text.count("skipped") == 5
    assert subscriber.accounting.predictions == 1


def test_group_shares_the_messages_and_accounts_for_them_together(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url, group="g") as one, Subscriber(broker.url, group="g") as other:
        broker.publish(TOPIC, *predictions(*range(1, 8), *range(9, 22)))
        received = [seqs_until_silence(subscriber) for subscriber in (one, other)]
    assert received[0] and received[1]
    assert sorted(received[0] + received[1]) == [*range(1, 8), *range(9, 22)]
    assert one.accounting.missing is None and "one of a group" in str(other.accounting)
    assert str(Accounting.merge([one.accounting, other.accounting])).startswith("1 missing (pi/door 'b' 8): 20 pred")


def subscribe_again(broker: Any, **options: Any) -> Subscriber:
    """As a service does that is started again."""
    return Subscriber(broker.url, client_id="archive", session_expiry_s=60, **options)


def test_session_of_an_earlier_run_brings_nothing_that_is_not_asked_for(lasting: Any, predictions: Any) -> None:
    subscribe_again(lasting, kinds=("prediction", "event")).close()
    lasting.publish(TOPIC.replace("/pi/", "/other/"), *predictions(1, device="other"))
    lasting.publish(TOPIC, *predictions(1, 2))
    with subscribe_again(lasting, device="pi") as subscriber:
        assert seqs_until_silence(subscriber) == [1, 2]


def test_message_of_a_topic_that_nobody_knows_is_skipped(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url) as subscriber:
        broker.publish("edgekit/pi/response/prediction", "{}")
        broker.publish(TOPIC, *predictions(1))
        assert subscriber.next(5).prediction.seq == 1


def test_session_that_is_cancelled_while_it_opens_leaves_no_client(free_port: Any, predictions: Any) -> None:
    async def opens() -> None:
        async with Subscriber(f"mqtt://127.0.0.1:{free_port()}", patience_s=60):
            pytest.fail("there is no broker")

    before = {thread.name for thread in threading.enumerate()}
    with pytest.raises(asyncio.TimeoutError):
        asyncio.run(asyncio.wait_for(opens(), 1))
    assert not {name for name in {thread.name for thread in threading.enumerate()} - before if name.startswith("mqtt")}


def test_session_keeps_what_comes_while_we_are_away(lasting: Any, predictions: Any) -> None:
    subscribe_again(lasting).close()
    lasting.publish(TOPIC, *predictions(1, 2, 3))
    with subscribe_again(lasting) as subscriber:
        assert seqs_until_silence(subscriber) == [1, 2, 3]


@pytest.mark.parametrize(
    ("before", "now", "topic"),
    [
        ({"kinds": ("prediction", "event")}, {}, "edgekit/pi/door/event"),
        ({"kinds": ("prediction", "status")}, {}, "edgekit/pi/status"),
        ({}, {"device": "other"}, TOPIC),
        ({"stream": "door"}, {"stream": "yard"}, TOPIC),
        ({"prefix": "site"}, {}, "site/pi/door/prediction"),
    ],
)
def test_session_hands_out_nothing_that_is_no_longer_asked_for(
    lasting: Any, predictions: Any, caplog: pytest.LogCaptureFixture, before: Any, now: Any, topic: str
) -> None:
    subscribe_again(lasting, **before).close()
    kept = OTHERS["event"] if topic.endswith("event") else "online" if topic.endswith("status") else predictions(1)[0]
    lasting.publish(topic, kept)
    wanted = f"edgekit/{now.get('device', 'pi')}/{now.get('stream', 'door')}/prediction"
    names = {name: value for name, value in now.items() if name in ("device", "stream")}
    with subscribe_again(lasting, **now) as subscriber:
        lasting.publish(topic, kept, kept)
        lasting.publish(wanted, *predictions(7, **names))
        message = subscriber.next(10)
        assert (message.topic, message.prediction.seq) == (wanted, 7)  # type: ignore[union-attr]
        assert seqs_until_silence(subscriber) == [] and subscriber.accounting.predictions == 1
    assert caplog.text.count("dropped") == 1
    with subscribe_again(lasting, **before) as subscriber, pytest.raises(TimeoutError):
        subscriber.next(0.5)  # all is acknowledged


def test_session_that_joins_a_group_takes_no_more_than_its_share(lasting: Any, predictions: Any) -> None:
    subscribe_again(lasting).close()
    with subscribe_again(lasting, group="g") as one, Subscriber(lasting.url, group="g") as other:
        lasting.publish(TOPIC, *predictions(*range(1, 21)))
        received = [seqs_until_silence(subscriber) for subscriber in (one, other)]
    assert all(received) and sorted(received[0] + received[1]) == [*range(1, 21)]


def in_session_of_archive(broker: Any, *options: str) -> list[str]:
    """The topics of what comes to another client with the session of :func:`subscribe_again`."""
    session = ["-i", "archive", "-c", "-q", "1", "-V", "mqttv5", "-x", "60"]
    command = ["mosquitto_sub", "-h", "127.0.0.1", "-p", str(broker.port), "-F", "%t", *session, *options]
    return subprocess.run(command, capture_output=True, text=True).stdout.split()


def test_subscription_that_an_earlier_run_left_is_given_up(lasting: Any, predictions: Any) -> None:
    subscribe_again(lasting, kinds=("prediction", "event")).close()
    with subscribe_again(lasting) as subscriber:
        lasting.publish("edgekit/pi/door/event", OTHERS["event"])
        lasting.publish(TOPIC, *predictions(1))
        assert subscriber.next(10).kind == "prediction"
    lasting.publish("edgekit/pi/door/event", OTHERS["event"])
    lasting.publish(TOPIC, *predictions(2))
    assert in_session_of_archive(lasting, "-t", "none", "-W", "1") == [TOPIC]


def test_messages_of_a_foreign_subscription_are_dropped_and_do_not_come_again(
    lasting: Any, predictions: Any, caplog: pytest.LogCaptureFixture
) -> None:
    in_session_of_archive(lasting, "-t", "edgekit/#", "-E")
    for topic in ("edgekit/pi/response/x", "edgekit/pi/command", "edgekit/pi", "edgekit/pi/door/prediction/more"):
        lasting.publish(topic, {"a": 1})
    for seq in (1, 2):
        lasting.publish(TOPIC, *predictions(seq))
        with subscribe_again(lasting) as subscriber:
            assert seqs_until_silence(subscriber) == [seq]
    assert caplog.text.count("dropped") == 1


@pytest.mark.parametrize(
    ("end", "again"),
    [("finish", [3]), ("fail", [2, 3]), ("close", [2, 3]), ("ack and close", [3]), ("time out", [3])],
)
def test_message_comes_again_if_its_consumer_did_not_finish_it(
    lasting: Any, end: str, again: list[int], predictions: Any
) -> None:
    subscriber = subscribe_again(lasting)
    lasting.publish(TOPIC, *predictions(1, 2))
    assert [subscriber.next(10).prediction.seq for _ in range(2)] == [1, 2]  # type: ignore[union-attr]
    if end == "finish":
        with subscriber:
            pass
    elif end == "fail":
        with pytest.raises(ZeroDivisionError), subscriber:
            raise ZeroDivisionError
    elif end == "time out":
        with pytest.raises(TimeoutError), subscriber:
            subscriber.next(0)
    else:
        if end == "ack and close":
            subscriber.ack()
        subscriber.close()
    lasting.publish(TOPIC, *predictions(3))
    with subscribe_again(lasting) as subscriber:
        assert seqs_until_silence(subscriber) == again


def test_broker_that_comes_back_sends_nothing_twice_that_was_not_handed_out(lasting: Any, predictions: Any) -> None:
    """Five wait here when it goes, one of them in hand; the broker has all of them in its session."""
    with subscribe_again(lasting) as subscriber:
        lasting.publish(TOPIC, *predictions(1, 2, 3, 4, 5))
        assert subscriber.next(10).prediction.seq == 1  # type: ignore[union-attr]
        lasting.stop()
        lasting.start()
        lasting.publish(TOPIC, *predictions(6))
        received = [subscriber.next(20).prediction.seq, *seqs_until_silence(subscriber, 1)]  # type: ignore[union-attr]
    assert set(received) == {1, 2, 3, 4, 5, 6}
    accounting = subscriber.accounting
    assert (accounting.missing, accounting.duplicates, accounting.duplicates_unflagged) == (0, 1, 0)


def test_consumer_of_a_group_that_died_at_work_finds_its_share_again(lasting: Any, predictions: Any) -> None:
    with Subscriber(lasting.url, group="g") as other:
        with pytest.raises(ZeroDivisionError), subscribe_again(lasting, group="g") as one:
            lasting.publish(TOPIC, *predictions(1, 2, 3, 4))
            one.next(10)
            raise ZeroDivisionError
        lasting.publish(TOPIC, *predictions(5, 6, 7, 8))
        with subscribe_again(lasting, group="g") as again:
            received = [seqs_until_silence(other), seqs_until_silence(again)]
    assert all(received) and sorted(received[0] + received[1]) == [*range(1, 9)]


def test_broker_that_forgot_the_session_takes_nothing_from_us(broker: Any, predictions: Any) -> None:
    with subscribe_again(broker) as subscriber:
        broker.publish(TOPIC, *predictions(1, 2, 3))
        assert subscriber.next(10).prediction.seq == 1  # type: ignore[union-attr]
        broker.stop()
        broker.start()
        assert seqs_until_silence(subscriber) == [2, 3]


def test_no_more_wait_than_receive_maximum(broker: Any, predictions: Any) -> None:
    with Subscriber(broker.url, receive_maximum=5) as subscriber:
        broker.publish(TOPIC, *predictions(*range(1, 41)))
        deadline = time.monotonic() + 10
        while len(subscriber._messages) < 5 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(subscriber._messages) == 5
        assert seqs_until_silence(subscriber) == [*range(1, 41)]


def test_close_in_another_thread_ends_the_loop(broker: Any) -> None:
    subscriber = Subscriber(broker.url)
    threading.Timer(0.2, subscriber.close).start()
    assert list(subscriber) == []
    with pytest.raises(EdgekitError, match="closed"):
        subscriber.next()


def test_async_for_receives(broker: Any, predictions: Any) -> None:
    async def receive() -> list[int]:
        seqs = []
        async with Subscriber(broker.url) as subscriber:
            await asyncio.to_thread(broker.publish, TOPIC, *predictions(1, 2))
            async for message in subscriber:
                seqs.append(message.prediction.seq)  # type: ignore[union-attr]
                if len(seqs) == 2:  # with nothing waiting
                    threading.Timer(0.2, broker.publish, (TOPIC, *predictions(3))).start()
                if len(seqs) == 3:
                    break
        return seqs

    assert asyncio.run(receive()) == [1, 2, 3]


def test_await_that_is_cancelled_loses_no_message(broker: Any, predictions: Any) -> None:
    async def receive() -> int:
        async with Subscriber(broker.url) as subscriber:
            with pytest.raises(asyncio.TimeoutError):
                await asyncio.wait_for(anext(subscriber), 0.05)
            await asyncio.to_thread(broker.publish, TOPIC, *predictions(7))
            message = await asyncio.wait_for(anext(subscriber), 10)
            return message.prediction.seq  # type: ignore[union-attr]

    assert asyncio.run(receive()) == 7


def connections_of(client_id: str) -> list[str]:
    return [thread.name for thread in threading.enumerate() if client_id in thread.name]


def test_async_with_that_is_cancelled_while_it_connects_leaves_no_client(mosquitto: Any, until: Any) -> None:
    broker = mosquitto()

    async def enter() -> None:
        subscriber = Subscriber(broker.url, client_id="cancelled", session_expiry_s=60, patience_s=5)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(subscriber.__aenter__(), 0.3)
        broker.start()
        with pytest.raises(StopAsyncIteration):
            await asyncio.wait_for(anext(subscriber), 20)

    broker.stop()
    asyncio.run(enter())
    until(lambda: not connections_of("cancelled"))
    with Subscriber(broker.url, client_id="cancelled", session_expiry_s=60) as again:
        assert not again._connection.client.session_present, "the cancelled one has connected"


def test_async_with_that_is_cancelled_while_it_subscribes_leaves_no_client(
    mosquitto: Any, until: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    broker, connected = mosquitto(), threading.Event()
    monkeypatch.setattr(Subscriber, "_answered", lambda *_: None)  # the broker's answer is lost
    monkeypatch.setattr(Subscriber, "_connected", lambda _: connected.set())

    async def enter() -> None:
        entering = asyncio.create_task(Subscriber(broker.url, client_id="cancelled").__aenter__())
        await asyncio.to_thread(connected.wait, 20)
        entering.cancel()
        with pytest.raises(asyncio.CancelledError):
            await entering
        assert not connections_of("cancelled")

    asyncio.run(enter())


def test_async_with_that_is_cancelled_before_its_thread_begins_never_connects(broker: Any) -> None:
    async def enter() -> None:
        loop, free = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        busy = asyncio.create_task(asyncio.to_thread(free.wait, 20))
        await asyncio.sleep(0)
        subscriber = Subscriber(broker.url, client_id="cancelled")
        entering = asyncio.create_task(subscriber.__aenter__())
        await asyncio.sleep(0)
        entering.cancel()
        await asyncio.sleep(0)
        free.set()
        with pytest.raises(asyncio.CancelledError):
            await entering
        await busy
        with pytest.raises(StopAsyncIteration):
            await anext(subscriber)

    asyncio.run(enter())
    assert not connections_of("cancelled")


def test_unreachable_broker_is_an_error_of_async_with(free_port: Any) -> None:
    async def receive() -> None:
        subscriber = Subscriber(f"mqtt://127.0.0.1:{free_port()}")
        with pytest.raises(BrokerError, match="cannot be reached"):
            async with subscriber:
                pass

    asyncio.run(receive())


@pytest.mark.parametrize(
    ("options", "expected"),
    [({"kinds": ("cat",)}, "expected prediction, event"), ({"session_expiry_s": 60}, "give a client_id")],
)
def test_options_that_make_no_sense_are_an_error(options: Any, expected: str) -> None:
    with pytest.raises(EdgekitError, match=expected):
        Subscriber("mqtt://localhost", **options)


@pytest.mark.parametrize("names", [{"device": "a/b"}, {"stream": "#"}, {"group": "+"}, {"prefix": "/a"}])
def test_name_that_cannot_stand_in_a_topic_is_refused(names: Any) -> None:
    with pytest.raises(EdgekitError, match="expected a name of a-z"):
        Subscriber("mqtt://localhost", **names)


def test_group_on_a_broker_without_mqtt_5_is_an_error(free_port: Any) -> None:
    url = f"127.0.0.1:{free_port()}"
    with EmbeddedBroker(f"embedded://{url}"), pytest.raises(BrokerError, match="MQTT 5"):
        Subscriber(f"mqtt://{url}", group="g")


def test_subscription_that_is_refused_is_an_error(mosquitto: Any, caplog: pytest.LogCaptureFixture) -> None:
    """Mosquitto 2.0 accepts every subscription; the answer is put in its place here."""
    broker = mosquitto()
    with Subscriber(broker.url) as subscriber:
        subscriber._answered([ReasonCode(PacketTypes.SUBACK, "Not authorized")])
        with pytest.raises(BrokerError, match="refused the subscription: not authorized"):
            subscriber.next(5)


def test_unreachable_broker_is_an_error(free_port: Any) -> None:
    with pytest.raises(BrokerError, match="cannot be reached"):
        Subscriber(f"mqtt://127.0.0.1:{free_port()}")


def test_broker_that_forgot_what_it_had_sent_costs_no_message(
    lasting: Any, predictions: Any, until: Any, tmp_path: Path
) -> None:
    """Killed, it knows the session as it last saved it: what waits here then is in no other hands."""
    with Subscriber(lasting.url, client_id="keeps", session_expiry_s=60) as subscriber:
        lasting._process.send_signal(signal.SIGUSR1)
        until(lambda: (tmp_path / "mosquitto.db").exists())
        lasting.publish(TOPIC, *predictions(*range(1, 16)))
        assert [subscriber.next(10).prediction.seq for _ in range(3)] == [1, 2, 3]
        until(lambda: len(subscriber._messages) == 12)
        lasting.kill()
        lasting.start()
        assert [subscriber.next(10).prediction.seq for _ in range(12)] == list(range(4, 16))
        assert "nothing missing" in str(subscriber.accounting)
