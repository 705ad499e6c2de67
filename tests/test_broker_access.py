"""The configuration in examples/mosquitto, with the certificates that its script makes, on a real broker."""

from __future__ import annotations

import queue
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import paho.mqtt.client as paho
import pytest
from paho.mqtt.enums import CallbackAPIVersion
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode

pytestmark = pytest.mark.no_runtime

EXAMPLE = Path(__file__).parents[1] / "examples" / "mosquitto"


def certificate(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([EXAMPLE / "certificate", *arguments], cwd=folder, capture_output=True, text=True)


class Client:
    """A connected MQTT 5 client; ``received`` is a queue of topics and payloads.

    ``stays``: the broker keeps what comes while it is away.
    """

    def __init__(
        self, hub: SimpleNamespace, who: str, client_id: str = "", will: str | None = None, stays: bool = False
    ) -> None:
        self.received: queue.Queue[tuple[str, bytes]] = queue.Queue()
        self._connected: queue.Queue[ReasonCode] = queue.Queue()
        self._answers: queue.Queue[ReasonCode] = queue.Queue()
        self._subscribed: queue.Queue[object] = queue.Queue()
        self.paho = paho.Client(
            CallbackAPIVersion.VERSION2,
            client_id=client_id or f"edgekit-{who}",
            protocol=paho.MQTTv5,
            reconnect_on_failure=False,
        )
        self.paho.on_connect = lambda _client, _data, _flags, reason, _properties: self._connected.put(reason)
        self.paho.on_publish = lambda _client, _data, _mid, reason, _properties: self._answers.put(reason)
        self.paho.on_subscribe = lambda *_: self._subscribed.put(None)
        self.paho.on_message = lambda _client, _data, message: self.received.put((message.topic, message.payload))
        device = (hub.folder / f"{who}.crt").exists()
        if device:
            self.paho.tls_set(hub.folder / "ca.crt", hub.folder / f"{who}.crt", hub.folder / f"{who}.key")
        elif (hub.folder / "ca.crt").exists():
            self.paho.tls_set(hub.folder / "ca.crt")
            self.paho.username_pw_set(who, f"secret of {who}")
        if will:
            self.paho.will_set(will, "offline", qos=1, retain=True)
        session = Properties(PacketTypes.CONNECT)
        session.SessionExpiryInterval = 3600 if stays else 0
        port = hub.devices_port if device else hub.consumers_port
        deadline = time.monotonic() + 10
        while True:
            try:
                self.paho.connect("localhost", port, clean_start=not stays, properties=session)
                break
            except ConnectionRefusedError:  # a broker that was just started may have opened another port only
                assert time.monotonic() < deadline
                time.sleep(0.05)
        self.paho.loop_start()
        hub.clients.append(self)
        assert self._connected.get(timeout=10) == "Success"

    def publish(self, topic: str, payload: str = "x", retain: bool = False) -> str:
        """The broker's answer."""
        self.paho.publish(topic, payload, qos=1, retain=retain)
        return str(self._answers.get(timeout=10))

    def subscribe(self, *topic_filters: str) -> None:
        self.paho.subscribe([(topic_filter, 1) for topic_filter in topic_filters])
        self._subscribed.get(timeout=10)

    def die(self) -> None:
        """Loses the connection without a word, so that the broker speaks the Last Will."""
        connection = self.paho.socket()
        assert isinstance(connection, socket.socket)
        connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.paho.disconnect()
        self.paho.loop_stop()


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not shutil.which("openssl"):
        pytest.skip("no openssl here")
    folder = tmp_path_factory.mktemp("certificates")
    devices = [["device", name] for name in ("pi-4", "pi-5", "site-7")]
    for arguments in (["ca"], ["server", "localhost", "127.0.0.1"], *devices):
        result = certificate(folder, *arguments)
        assert result.returncode == 0, result.stderr
    for user in ("archive", "operator", "homeassistant"):
        new = [] if (folder / "passwords").exists() else ["-c"]
        subprocess.run(["mosquitto_passwd", "-b", *new, folder / "passwords", user, f"secret of {user}"], check=True)
    return folder


def is_open(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def hub(
    certificates: Path, mosquitto: Callable[..., Any], tmp_path: Path, free_port: Callable[[], int], until: Any
) -> Iterator[SimpleNamespace]:
    """The broker as configured, but for its ports and folder; ``reload`` has it read its access rules again."""
    hub = SimpleNamespace(folder=certificates, devices_port=free_port(), consumers_port=free_port(), clients=[])
    config = (EXAMPLE / "edgekit.conf").read_text()
    for name in ("devices.acl", "consumers.acl"):
        shutil.copy(EXAMPLE / name, tmp_path)
    for there, here in {
        "/etc/mosquitto/certs/": f"{certificates}/",
        "/etc/mosquitto/consumers.passwords": str(certificates / "passwords"),
        "/etc/mosquitto/": f"{tmp_path}/",
        "listener 8883": f"listener {hub.devices_port}",
        "listener 8884": f"listener {hub.consumers_port}",
    }.items():
        assert there in config
        config = config.replace(there, here)
    (tmp_path / "conf.d").mkdir()
    (tmp_path / "conf.d" / "edgekit.conf").write_text(config)
    kept = ["persistence true", f"persistence_location {tmp_path}/"]
    hub.broker = mosquitto(f"include_dir {tmp_path / 'conf.d'}", "user root", *kept)
    for port in (hub.devices_port, hub.consumers_port):  # which open after its own
        until(lambda port=port: is_open(port))
    hub.acl, hub.reload = tmp_path / "devices.acl", lambda: hub.broker._process.send_signal(signal.SIGHUP)
    yield hub
    for client in hub.clients:
        client.close()


def sorted_messages(client: Client, count: int) -> list[tuple[str, bytes]]:
    return sorted(client.received.get(timeout=10) for _ in range(count))


OF_A_DEVICE = [
    "edgekit/pi-4/status", "edgekit/pi-4/info", "edgekit/pi-4/health", "edgekit/pi-4/door/prediction",
    "edgekit/pi-4/door/event", "edgekit/pi-4/door/state", "edgekit/pi-4/response/operator/1",
    "homeassistant/device/pi-4/config",
]  # fmt: skip


def test_device_writes_its_own_topics_and_no_others(hub: SimpleNamespace) -> None:
    device = Client(hub, "pi-4")
    for topic in OF_A_DEVICE:
        assert device.publish(topic) in ("Success", "No matching subscribers"), topic
    of_another = [topic.replace("pi-4", "pi-5") for topic in OF_A_DEVICE]
    for topic in (*of_another, "edgekit/pi-4/command", "edgekit/pi-5/command", "homeassistant/status", "elsewhere"):
        assert device.publish(topic) == "Not authorized", topic


def test_device_reads_what_is_meant_for_it_and_nothing_else(hub: SimpleNamespace) -> None:
    device, other = Client(hub, "pi-4"), Client(hub, "pi-5")
    device.subscribe("#", "edgekit/pi-5/door/prediction", "$share/all/edgekit/+/+/prediction", "edgekit/pi-5/command")
    for topic in OF_A_DEVICE:
        other.publish(topic.replace("pi-4", "pi-5"))
    operator = Client(hub, "operator")
    for to in ("pi-5", "pi-4"):
        operator.publish(f"edgekit/{to}/command", f"for {to}")
    Client(hub, "homeassistant").publish("homeassistant/status", "online")
    device.publish("homeassistant/device/pi-4/config", "{}")
    assert sorted_messages(device, 3) == [
        ("edgekit/pi-4/command", b"for pi-4"),
        ("homeassistant/device/pi-4/config", b"{}"),
        ("homeassistant/status", b"online"),
    ]
    assert device.received.empty()


def test_consumer_reads_all_devices_and_writes_nothing(hub: SimpleNamespace) -> None:
    consumer = Client(hub, "archive")
    consumer.subscribe("edgekit/#", "$share/store/edgekit/+/+/prediction")
    for device in ("pi-4", "pi-5"):
        Client(hub, device).publish(f"edgekit/{device}/door/prediction", device)
    once_for_each_subscription = [(f"edgekit/{device}/door/prediction", device.encode()) for device in ("pi-4", "pi-5")]
    assert sorted_messages(consumer, 4) == sorted(2 * once_for_each_subscription)
    for topic in (*OF_A_DEVICE, "edgekit/pi-4/command", "homeassistant/status", "edgekit/archive/status"):
        assert consumer.publish(topic) == "Not authorized", topic


def test_operator_commands_and_is_answered_and_a_consumer_does_not_hear_it(hub: SimpleNamespace) -> None:
    device, operator, consumer = Client(hub, "pi-4"), Client(hub, "operator"), Client(hub, "archive")
    device.subscribe("edgekit/pi-4/command")
    operator.subscribe("edgekit/pi-4/response/#")
    consumer.subscribe("edgekit/#")
    assert operator.publish("edgekit/pi-4/command", "ping") == "Success"
    assert device.received.get(timeout=10) == ("edgekit/pi-4/command", b"ping")
    device.publish("edgekit/pi-4/response/operator/1", "pong")
    device.publish("edgekit/pi-4/door/event", "last")
    assert operator.received.get(timeout=10) == ("edgekit/pi-4/response/operator/1", b"pong")
    assert consumer.received.get(timeout=10) == ("edgekit/pi-4/door/event", b"last")
    assert operator.publish("edgekit/pi-4/status", "offline") == "Not authorized"


def test_last_will_of_a_device_is_spoken_on_its_own_topic_only(hub: SimpleNamespace) -> None:
    consumer = Client(hub, "archive")
    consumer.subscribe("edgekit/+/status")
    liar = Client(hub, "pi-5", will="edgekit/pi-4/status")
    honest = Client(hub, "pi-4", will="edgekit/pi-4/status")
    liar.die()
    # Its connection has gone when another can be made under its id.
    Client(hub, "pi-5").publish("edgekit/pi-5/status", "online")
    assert consumer.received.get(timeout=10) == ("edgekit/pi-5/status", b"online")
    honest.die()
    assert consumer.received.get(timeout=10) == ("edgekit/pi-4/status", b"offline")


@pytest.mark.parametrize("victim", ["pi-4", "archive"])
def test_device_that_takes_a_client_id_of_another_throws_no_one_out(hub: SimpleNamespace, victim: str) -> None:
    other = Client(hub, victim, client_id="mine")
    Client(hub, "pi-5", client_id="mine").publish("edgekit/pi-5/status")
    topic = "edgekit/pi-4/door/state" if victim == "pi-4" else "edgekit/pi-5/status"
    other.subscribe("edgekit/+/status")
    assert other.publish(topic) == ("Not authorized" if victim == "archive" else "No matching subscribers")
    assert other.paho.is_connected()


def test_client_without_certificate_or_password_is_refused(hub: SimpleNamespace, tmp_path: Path) -> None:
    for command in (["ca"], ["device", "pi-4"]):
        assert certificate(tmp_path, *command).returncode == 0
    forged = ["--cert", tmp_path / "pi-4.crt", "--key", tmp_path / "pi-4.key"]
    as_server = ["--cert", hub.folder / "server.crt", "--key", hub.folder / "server.key"]
    for port, options in (
        (hub.devices_port, []),
        (hub.devices_port, forged),
        (hub.devices_port, as_server),
        (hub.consumers_port, []),
        (hub.consumers_port, ["-u", "archive", "-P", "wrong"]),
    ):
        command = ["mosquitto_pub", "-h", "localhost", "-p", str(port), "--cafile", hub.folder / "ca.crt", *options]
        result = subprocess.run([*command, "-q", "1", "-t", "edgekit/pi-4/status", "-m", "x"], capture_output=True)
        assert result.returncode != 0, options


def test_device_is_locked_out_by_its_id(hub: SimpleNamespace) -> None:
    device, other = Client(hub, "pi-4"), Client(hub, "pi-5")
    device.publish("edgekit/pi-4/status")
    hub.acl.write_text(hub.acl.read_text().replace("#user pi-9\n#topic", "user pi-4\ntopic"))
    hub.reload()
    deadline = time.monotonic() + 10
    while device.publish("edgekit/pi-4/status") != "Not authorized":
        assert time.monotonic() < deadline
    assert other.publish("edgekit/pi-5/status") == "No matching subscribers"


def test_bridge_of_a_site_keeps_what_comes_while_the_hub_is_away(
    hub: SimpleNamespace, mosquitto: Callable[..., Any], tmp_path: Path
) -> None:
    rules = hub.acl.read_text()
    of_site = rules.partition("#user site-7")[2].partition("\n\n")[0]
    hub.acl.write_text(rules.replace(of_site, of_site.replace("\n#", "\n")).replace("#user site-7", "user site-7"))
    hub.reload()
    bridge = (EXAMPLE / "bridge.conf").read_text()
    for there, here in {
        "/etc/mosquitto/certs/": f"{hub.folder}/",
        "hub.lan:8883": f"localhost:{hub.devices_port}",
        "restart_timeout 1 30": "restart_timeout 1",
    }.items():
        assert there in bridge
        bridge = bridge.replace(there, here)
    broker = mosquitto("allow_anonymous true", "user root", *bridge.splitlines())
    site = SimpleNamespace(folder=tmp_path, consumers_port=broker.port, clients=hub.clients)
    device, operator = Client(site, "pi-4"), Client(hub, "operator")
    device.subscribe("edgekit/pi-4/command")
    operator.subscribe("edgekit/pi-4/response/#")
    deadline = time.monotonic() + 20
    while device.received.empty():  # until the bridge stands
        operator.publish("edgekit/pi-4/command", "ping")
        assert time.monotonic() < deadline
        time.sleep(0.1)
    device.publish("edgekit/pi-4/response/operator/1", "pong")
    assert operator.received.get(timeout=10) == ("edgekit/pi-4/response/operator/1", b"pong")
    Client(hub, "archive", stays=True).subscribe("edgekit/+/+/prediction")
    hub.broker.stop()
    for number in range(30):
        device.publish("edgekit/pi-4/door/prediction", f"{number:02}")
    hub.broker.start()
    consumer = Client(hub, "archive", stays=True)
    assert [int(payload) for _, payload in sorted_messages(consumer, 30)] == list(range(30))


def test_run_and_listen_work_under_it(
    hub: SimpleNamespace, models: Path, frames: Path, until_listening: Any, tmp_path: Path
) -> None:
    (tmp_path / "archive.password").write_text("secret of archive\n")
    (tmp_path / "archive.password").chmod(0o600)
    house = Client(hub, "homeassistant")
    house.subscribe("homeassistant/device/+/config")

    def start(*command: str | Path) -> subprocess.Popen[str]:
        command = (sys.executable, "-m", "edgekit", *command, "--cafile", hub.folder / "ca.crt")
        pipe = subprocess.PIPE
        return subprocess.Popen(list(map(str, command)), cwd=tmp_path, stdout=pipe, stderr=pipe, text=True)

    url = f"mqtts://archive@localhost:{hub.consumers_port}"
    listening = start("listen", "--broker", url, "--password-file", "archive.password", "--count", "9")
    until_listening(listening)
    running = start(
        "run", models / "int8.tflite", "--source", frames, "--loop", "--max-fps", "20", "--spool", tmp_path / "spool",
        "--device-id", "pi-4", "--stream", "door", "--broker", f"mqtts://localhost:{hub.devices_port}",
        "--cert", hub.folder / "pi-4.crt", "--key", hub.folder / "pi-4.key",
    )  # fmt: skip
    try:
        output, log = listening.communicate(timeout=60)
        assert output.count("  pi-4/door  #") == 9 and "nothing missing: 9 predictions" in log
        assert house.received.get(timeout=30)[0] == "homeassistant/device/pi-4/config"
    finally:
        listening.kill()
        running.terminate()
        _, log = running.communicate(timeout=30)
    assert running.returncode == 0 and "refuse" not in log, log


@pytest.mark.parametrize("arguments", [["device", "Pi 4"], ["device", "../pi"], ["device", "ca"], ["server"], []])
def test_certificate_refuses_what_is_no_name(arguments: list[str], certificates: Path) -> None:
    before = sorted(certificates.iterdir())
    assert certificate(certificates, *arguments).returncode != 0
    assert sorted(certificates.iterdir()) == before


def test_certificate_overwrites_no_key(certificates: Path) -> None:
    before = (certificates / "pi-4.key").read_bytes()
    result = certificate(certificates, "device", "pi-4")
    assert result.returncode == 1 and "pi-4.key is there already" in result.stderr
    assert (certificates / "pi-4.key").read_bytes() == before
