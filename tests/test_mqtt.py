from __future__ import annotations

import contextlib
import logging
import random
import shutil
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import paho.mqtt.client as paho
import pytest

from edgekit.broker import parse_broker
from edgekit.embedded_broker import EmbeddedBroker
from edgekit.errors import BrokerError
from edgekit.mqtt import Connection

pytestmark = pytest.mark.no_runtime


@pytest.mark.parametrize(
    ("url", "text", "credentials"),
    [
        ("mqtt://hub", "mqtt://hub:1883", (None, None)),
        ("mqtt://ann:s%40crét@10.0.0.1:1884", "mqtt://10.0.0.1:1884", ("ann", "s@crét")),
        ("mqtts://hub", "mqtts://hub:8883", (None, None)),
        ("mqtt://[::1]:99", "mqtt://[::1]:99", (None, None)),
        ("mqtt://[fe80::1%25lo]:99", "mqtt://[fe80::1%25lo]:99", (None, None)),
        ("mqtt://[fe80::1%lo]:99", "mqtt://[fe80::1%25lo]:99", (None, None)),
        ("mqtt://ann:pa$WORD@hub", "mqtt://hub:1883", ("ann", "pa$WORD")),
    ],
)
def test_parse_broker(url: str, text: str, credentials: Any) -> None:
    address = parse_broker(url)
    assert (str(address), (address.username, address.password)) == (text, credentials)
    assert "s@crét" not in repr(address) and "ann" not in repr(address)
    assert parse_broker(text).host == address.host


def test_zone_of_an_address_is_what_the_system_calls_it() -> None:
    assert parse_broker("mqtt://[fe80::1%25lo]").host == "fe80::1%lo"


@pytest.mark.parametrize(
    "url",
    [
        "hub", "http://u:hunter2@hub", "mqtt://", "mqtt://u:hunter2@hub:x", "mqtt://u:hunter2@hub:0", "mqtt://hub:99999",
        "mqtt://hub/topic", "mqtt://hub?x=1", "mqtt://hub#x", "mqtt://hub :1883", "mqtt://hub\0", "",
    ],
)  # fmt: skip
def test_parse_broker_refuses_other_forms_and_keeps_the_password_to_itself(url: str) -> None:
    with pytest.raises(BrokerError, match=r"expected (mqtt://|a number from 1 to 65535)") as caught:
        parse_broker(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("password", "hun#ter hun/ter hun?ter 12#34 12/34 p@ss/w#rd hun[ter a%ff".split())
def test_password_that_breaks_the_url_is_answered_with_how_to_write_it(password: str) -> None:
    with pytest.raises(BrokerError, match=r"percent-encode .* password file") as caught:
        parse_broker(f"mqtt://hubert:{password}@kitchen:1884")
    assert not any(part in str(caught.value) for part in ("hubert", "kitchen", "hun", "'ss'", "rd'", "34", "'a%"))


@pytest.mark.parametrize(
    "url",
    ["mqtt://$HOST", "mqtt://${HOST}:1883", "mqtt://hub:$PORT", "mqtt://$USER:x@hub", "mqtt://ann:${PW:-none}@hub",
     "mqtt://ann:$MQTT_PASSWORD@hub", "mqtt://hub/$HOME"],
)  # fmt: skip
def test_variable_in_the_url_is_refused(url: str) -> None:
    with pytest.raises(BrokerError, match="a variable in the broker URL is not replaced"):
        parse_broker(url)


def test_scheme_of_other_programs_is_answered_with_ours() -> None:
    with pytest.raises(BrokerError, match="got tcp://; write mqtt:// instead"):
        parse_broker("tcp://hub:1883")


def test_no_piece_of_a_password_is_shown_whatever_is_wrong_with_the_url() -> None:
    chance = random.Random(7)
    letters = "QXZJVWKGY7"  # in pieces that no message has by itself
    marks = [*"#/?@[]:%\\ \t\n\0&=;$|}é\udce4\u2100\uff1a", "//", "${", "%4", "%ff", "%23", "mqtt://", "@@"]
    schemes = ["mqtt://", "mqtt://", "mqtt://", "mqtts://", "tcp://", "mqtt:/", "mqtt:", "", "//", "MQTT://", "mqtt//"]
    ends = ["@hub", "@hub", "@hub:1884", "@hub:x", "@[::1]:99", "@[::1", "@", "@hub/topic", "@hub#x", "@:1"]
    outcomes: set[str] = set()
    for _ in range(1000):
        secret, user = ("".join(chance.choices(letters, k=12)) for _ in range(2))
        wrapped = secret
        for _ in range(chance.randrange(3)):
            at = chance.randrange(len(wrapped) + 1)
            wrapped = wrapped[:at] + chance.choice(marks) + wrapped[at:]
        end = chance.choice(ends)
        url = f"{chance.choice(schemes)}{user}:{wrapped}{end}"
        if chance.random() < 0.3:  # one more anywhere before the host
            at = chance.randrange(len(url) - len(end) + 1)
            url = url[:at] + chance.choice(marks) + url[at + chance.randrange(2) :]
        try:
            address = parse_broker(url)
            shown = f"{address} {address!r}"
        except BrokerError as error:
            assert error.__suppress_context__ or not error.__context__  # nor in a traceback
            shown = str(error)
        outcomes.add(shown.partition(":")[0])
        pieces = {text[at : at + 4] for text in (secret, user) for at in range(len(text) - 3)}
        assert not [piece for piece in pieces if piece.lower() in shown.lower()], url
    assert len(outcomes) >= 5  # accepted, and refused for several reasons


def test_credentials_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_MQTT_USERNAME", "ann")
    monkeypatch.setenv("EDGEKIT_MQTT_PASSWORD", "secret")
    address = parse_broker("mqtt://hub")
    assert (address.username, address.password) == ("ann", "secret")


@pytest.mark.parametrize("by", ["argument", "variable"])
def test_password_comes_from_a_file(by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    file = tmp_path / "password"
    file.write_text("s3cret \nmore\n")
    file.chmod(0o604)
    if by == "variable":
        monkeypatch.setenv("EDGEKIT_MQTT_PASSWORD_FILE", str(file))
    address = parse_broker("mqtt://ann@hub", password_file=str(file) if by == "argument" else None)
    assert (address.username, address.password) == ("ann", "s3cret ")
    assert "everyone on this machine can read" in caplog.text and "s3cret" not in caplog.text


def test_mark_that_windows_begins_a_file_with_is_no_part_of_the_password(tmp_path: Path) -> None:
    file = tmp_path / "password"
    file.write_bytes(b"\xef\xbb\xbfs3cret\r\n")
    assert parse_broker("mqtt://ann@hub", password_file=str(file)).password == "s3cret"
    file.write_bytes("s3cret\r\n".encode("utf-16"))
    with pytest.raises(BrokerError, match=r"password file .*not UTF-8"):
        parse_broker("mqtt://ann@hub", password_file=str(file))


@pytest.mark.parametrize("name", ["USERNAME", "PASSWORD"])
def test_user_or_password_that_is_no_text_is_refused_where_it_comes_in(name: str, monkeypatch: Any) -> None:
    monkeypatch.setenv(f"EDGEKIT_MQTT_{name}", "hunter\udce4")
    with pytest.raises(BrokerError, match=r"(user|password) is not valid UTF-8") as caught:
        parse_broker("mqtt://hub")
    assert "hunter" not in str(caught.value)


@pytest.mark.parametrize(
    "url",
    ["mqtt://ann:p\udce4@hub", "mqtt://\udce4:p@hub", "mqtt://hub\udce4", "mqtt://ann:p%e4@hub", "mqtt://%e4@hub"],
)
def test_url_that_is_no_text_is_refused(url: str) -> None:
    with pytest.raises(BrokerError, match="not valid UTF-8"):
        parse_broker(url)


@pytest.mark.parametrize("url", ["mqtt://a%00b@hub", f"mqtt://{'a' * 70000}@hub", f"mqtt://a:{'a' * 70000}@hub"])
def test_user_or_password_that_mqtt_cannot_carry_is_refused(url: str) -> None:
    with pytest.raises(BrokerError, match=r"(NUL|at most 65,535 bytes)"):
        parse_broker(url)


@pytest.mark.parametrize("client_id", ["p\udce4", "a\0b", "a" * 70000])
def test_client_id_that_mqtt_cannot_carry_is_refused(client_id: str) -> None:
    with pytest.raises(BrokerError, match="client id"):
        Connection(parse_broker("mqtt://hub"), client_id)


def test_password_file_that_is_not_there_is_named() -> None:
    with pytest.raises(BrokerError, match=r"password file /nowhere: .*No such file"):
        parse_broker("mqtt://hub", password_file="/nowhere")


def test_certificate_for_a_broker_without_tls_is_refused() -> None:
    with pytest.raises(BrokerError, match="expected mqtts://"):
        parse_broker("mqtt://hub", cafile="ca.pem")


@pytest.fixture
def connection() -> Iterator[Callable[..., Connection]]:
    """Makes connections, which are closed at the end."""
    made: list[Connection] = []

    def make(url: str, **options: Any) -> Connection:
        made.append(Connection(parse_broker(url), "one", **options))
        return made[-1]

    yield make
    for one in made:
        one.close()


def test_connects_with_mqtt_5(broker: Any, connection: Any, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    one = connection(broker.url)
    assert one.start() and one.protocol == paho.MQTTv5 and "MQTT 5" in caplog.text


def test_falls_back_to_mqtt_3_1_1(free_port: Callable[[], int], connection: Any, caplog: Any) -> None:
    caplog.set_level(logging.INFO)
    url = f"127.0.0.1:{free_port()}"
    with EmbeddedBroker(f"embedded://{url}"):
        one = connection(f"mqtt://{url}")
        assert one.start() and one.protocol == paho.MQTTv311 and "MQTT 3.1.1" in caplog.text
        one.close()


@pytest.mark.parametrize("host", ["127.0.0.1", "no-such-host.invalid"])
def test_unreachable_broker_is_told_apart(host: str, free_port: Callable[[], int], connection: Any) -> None:
    with pytest.raises(BrokerError, match="cannot be reached"):
        connection(f"mqtt://{host}:{free_port()}").start()
    assert not connection(f"mqtt://{host}:{free_port()}").start(patience_s=None)


class End(BaseException):
    """Ends a thread."""


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("fault", [RuntimeError, End])
@pytest.mark.parametrize("patience_s", [0, 600])
def test_who_waits_for_a_connection_hears_of_a_fault_of_ours(
    fault: type[BaseException], patience_s: int, broker: Any, connection: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def client(*_arguments: Any, **_options: Any) -> Any:
        raise fault("one")

    monkeypatch.setattr("edgekit.mqtt.Client", client)
    with pytest.raises(BrokerError, match="failed by an error of EdgeKit"):
        connection(broker.url).start(patience_s)


def test_fault_of_ours_that_passes_ends_no_service(broker: Any, connection: Any, monkeypatch: Any, until: Any) -> None:
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (0.05, 0.2))
    faults = [RuntimeError("in a callback"), RuntimeError("in another one")]

    def fail() -> None:
        if faults:
            raise faults.pop()

    one = connection(broker.url, on_connect=fail, on_disconnect=fail)
    one.start(patience_s=None)
    until(lambda: not faults and one.connected)


def test_patience_waits_for_a_broker_that_comes_later(mosquitto: Callable[..., Any], connection: Any) -> None:
    broker = mosquitto()
    broker.stop()
    threading.Timer(0.7, broker.start).start()
    assert connection(broker.url).start(patience_s=10)


@pytest.fixture
def guarded(mosquitto: Callable[..., Any], tmp_path: Path) -> Any:
    """A broker that knows ann, whose password is right."""
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "ann", "right"], check=True)
    passwords.chmod(0o644)
    tmp_path.chmod(0o755)
    return mosquitto("allow_anonymous false", f"password_file {passwords}", "user root")


@pytest.mark.parametrize("patience_s", [0, 30, None])
def test_refused_credentials_are_told_apart_at_once(guarded: Any, connection: Any, patience_s: Any) -> None:
    with pytest.raises(BrokerError, match=r"refused the connection: not authori[sz]ed.*check the user and password"):
        connection(f"mqtt://ann:wrong@127.0.0.1:{guarded.port}").start(patience_s)
    assert connection(f"mqtt://ann:right@127.0.0.1:{guarded.port}").start()


def test_credentials_refused_later_are_told_and_tried_again(
    guarded: Any, connection: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any, until: Any
) -> None:
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (0.05, 0.2))
    one = connection(f"mqtt://ann:right@127.0.0.1:{guarded.port}")
    one.start()

    def restart_with(password: str) -> None:
        subprocess.run(["mosquitto_passwd", "-b", tmp_path / "passwords", "ann", password], check=True)
        guarded.stop()
        guarded.start()

    restart_with("other")
    until(lambda: "refused the connection" in caplog.text)
    restart_with("right")
    until(lambda: one.connected)
    assert [record.levelname for record in caplog.records if "refused the connection" in record.message] == ["ERROR"]
    assert "right" not in caplog.text


@pytest.mark.parametrize("hang_up", [True, False], ids=["hangs up", "keeps silent"])
def test_peer_that_is_no_broker_is_an_error(hang_up: bool, connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgekit.mqtt.ANSWER_TIMEOUT_S", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            for _ in range(2):
                peer, _ = server.accept()
                if hang_up:
                    peer.close()
                else:
                    peers.append(peer)

        peers: list[socket.socket] = []
        threading.Thread(target=serve, daemon=True).start()
        with pytest.raises(BrokerError, match="did not answer as an MQTT broker"):
            connection(f"mqtt://127.0.0.1:{server.getsockname()[1]}").start()
        for peer in peers:
            peer.close()


@pytest.fixture
def answering() -> Iterator[Callable[..., int]]:
    """Makes servers that give each CONNECT the same answer, and hang up unless they stay; the port of each."""
    servers: list[socket.socket] = []

    def make(answer: bytes, stay: bool = True) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve() -> None:
            with contextlib.suppress(OSError):  # closed
                while True:
                    peer, _ = server.accept()
                    with peer:
                        peer.recv(1000)
                        peer.sendall(answer)
                        peer.settimeout(5)
                        while stay and peer.recv(1000):
                            pass

        threading.Thread(target=serve, daemon=True).start()
        return int(server.getsockname()[1])

    yield make
    for server in servers:
        with contextlib.suppress(OSError):
            server.shutdown(socket.SHUT_RDWR)
        server.close()


def connack(reason: int) -> bytes:
    return bytes([0x20, 3, 0, reason, 0])


@pytest.mark.parametrize(
    ("reason", "said"),
    [(0x80, "takes no connection now"), (0x88, "takes no connection now"), (0x97, "takes no connection now"),
     (0x85, "refused the connection.*calls itself one"), (0x86, "refused the connection.*user and password"),
     (0x95, "refused the connection.*log")],
)  # fmt: skip
def test_reason_of_a_refusal_says_what_to_do(reason: int, said: str, answering: Any, connection: Any) -> None:
    with pytest.raises(BrokerError, match=said):
        connection(f"mqtt://127.0.0.1:{answering(connack(reason))}").start()


def test_reasons_are_known_by_their_number(answering: Any, connection: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their names are paho's, and may change."""
    monkeypatch.setattr("paho.mqtt.reasoncodes.ReasonCode.getName", lambda _reason: "another name")
    with pytest.raises(BrokerError, match="takes no connection now: another name"):
        connection(f"mqtt://127.0.0.1:{answering(connack(0x88))}").start()


def test_connects_again_and_forgets_what_was_under_way(
    broker: Any, connection: Any, monkeypatch: pytest.MonkeyPatch, until: Any
) -> None:
    """What a lost connection had not got through is for the owner to send: nothing comes by itself."""
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (0.05, 0.2))
    told: list[str] = []
    sent: list[int] = []
    got: list[bytes] = []

    def turn() -> None:
        if one.connected and told[-1] == "paused":
            sent.append(one.publish("a", "lost"))
            told.append("sent")

    one = connection(
        broker.url,
        subscriptions=["a"],
        on_connect=lambda: told.append("connected") or one.publish("a", "connected"),
        on_disconnect=lambda: told.append("lost"),
        on_message=lambda message: got.append(message.payload),
        on_turn=turn,
    )
    one.start()
    until(lambda: got == [b"connected"])
    broker.pause()
    told.append("paused")
    one.wake()
    until(lambda: sent)
    broker.kill()
    broker.start()
    until(lambda: len(got) == 2)
    assert told == ["connected", "paused", "sent", "lost", "connected"]
    assert got == [b"connected", b"connected"]


def test_connection_that_a_publish_finds_gone_is_made_again(
    broker: Any, connection: Any, until: Any, caplog: pytest.LogCaptureFixture
) -> None:
    """paho closes its socket then, which the selector still has."""
    die = threading.Event()

    def on_turn() -> None:
        if die.is_set() and one.connected:
            die.clear()
            broker.kill()
            while one.client.socket():
                one.publish("t", "x")

    one = connection(broker.url, on_turn=on_turn)
    assert one.start(10)
    die.set()
    one.wake()
    until(lambda: not one.connected)
    broker.start()
    until(lambda: one.connected)
    assert "unexpected" not in caplog.text


def test_second_client_of_the_same_name_is_named_as_the_reason(
    broker: Any, connection: Any, caplog: Any, until: Any
) -> None:
    first, second = connection(broker.url), connection(broker.url)
    first.start()
    second.start()
    until(lambda: "another client may call itself one" in caplog.text)


@pytest.mark.parametrize(
    ("goodbye", "said"),
    [(bytes([0xE0, 1, 0x95]), "packet too large"), (bytes([0xE0, 1, 0x82]), "protocol error"),
     (bytes([0xE0, 1, 0x97]), "quota exceeded"), (b"", "another client may call itself one")],
)  # fmt: skip
def test_reason_that_the_broker_gives_is_that_of_a_quick_loss(
    goodbye: bytes, said: str, answering: Any, connection: Any, monkeypatch: Any, caplog: Any, until: Any
) -> None:
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (0.05, 0.1))
    connection(f"mqtt://127.0.0.1:{answering(connack(0) + goodbye, stay=False)}").start(patience_s=None)
    until(lambda: "lost within seconds" in caplog.text)
    line = next(line for line in caplog.text.splitlines() if "lost within seconds" in line)
    assert said in line and ("another client" in line) == (not goodbye)


def test_fault_of_ours_is_blamed_on_no_other_client(
    broker: Any, connection: Any, monkeypatch: Any, caplog: Any, until: Any
) -> None:
    monkeypatch.setattr("edgekit.mqtt.BACKOFF_S", (0.05, 0.1))

    def fail() -> None:
        raise RuntimeError("one")

    connection(broker.url, on_connect=fail).start(patience_s=None)
    until(lambda: "lost within seconds: an error of ours" in caplog.text)
    assert "another client" not in caplog.text


def test_session_is_kept_for_who_asks_for_it(broker: Any, connection: Any, until: Any) -> None:
    got: list[bytes] = []
    subscribed = threading.Event()
    options: Any = {
        "subscriptions": ["kept"],
        "session_expiry_s": 60,
        "on_message": lambda message: got.append(message.payload),
        "on_subscribe": lambda _reasons: subscribed.set(),
    }
    first = connection(broker.url, **options)
    first.start()
    assert subscribed.wait(10) and not first.client.session_present
    first.close()
    broker.publish("kept", "while away")
    second = connection(broker.url, **options)
    second.start()
    until(lambda: got == [b"while away"])
    assert second.client.session_present


def test_broker_sends_no_more_than_may_be_unacknowledged(broker: Any, connection: Any, until: Any) -> None:
    got: list[Any] = []
    one = connection(
        broker.url, subscriptions=["many"], receive_maximum=3, manual_ack=True,
        on_message=lambda message: got.append((message, one.client)), on_subscribe=lambda _: got.append("subscribed"),
    )  # fmt: skip
    one.start()
    until(lambda: got == ["subscribed"])
    broker.publish("many", *"01234")
    until(lambda: len(got) == 4)
    one.ack(*got[1])
    until(lambda: len(got) >= 5)  # Mosquitto 2.0 sends one more than it may then
    assert [message.payload for message, _ in got[1:5]] == [b"0", b"1", b"2", b"3"]


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, and certificates by it for the broker (127.0.0.1) and a client; and another authority."""
    folder = tmp_path_factory.mktemp("certificates")
    for name in ("ca", "other"):
        openssl(
            folder,
            f"req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN={name} -keyout {name}.key -out {name}.pem"
            " -addext keyUsage=critical,keyCertSign,cRLSign",  # Python 3.13 asks for it
        )
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1")
    for name in ("server", "client"):
        openssl(folder, f"req -newkey rsa:2048 -nodes -subj /CN={name} -keyout {name}.key -out {name}.csr")
        openssl(
            folder,
            f"x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out {name}.pem -extfile names",
        )
    for path in (folder, folder.parent, *folder.iterdir()):
        path.chmod(0o755)
    return folder


def openssl(folder: Path, arguments: str) -> None:
    subprocess.run(["openssl", *arguments.split()], cwd=folder, check=True, capture_output=True)


def test_tls_with_an_authority_of_ones_own_and_a_client_certificate(
    mosquitto: Callable[..., Any], certificates: Path, connection: Any
) -> None:
    broker = mosquitto(
        "allow_anonymous true", f"cafile {certificates}/ca.pem", f"certfile {certificates}/server.pem",
        f"keyfile {certificates}/server.key", "require_certificate true", "user root",
    )  # fmt: skip
    url = f"mqtts://127.0.0.1:{broker.port}"

    def start(**files: str) -> bool:
        paths = {name: str(certificates / file) for name, file in files.items()}
        one = Connection(parse_broker(url, **paths), "one")
        try:
            return one.start()
        finally:
            one.close()

    assert start(cafile="ca.pem", certfile="client.pem", keyfile="client.key")
    with pytest.raises(BrokerError, match=r"cannot be reached .*certificate.*--cafile"):
        start(certfile="client.pem", keyfile="client.key")
    with pytest.raises(BrokerError, match=r"cannot be reached .*certificate.*--cafile"):
        start(cafile="other.pem", certfile="client.pem", keyfile="client.key")
    with pytest.raises(BrokerError, match="client certificate"):
        start(cafile="ca.pem")
    with pytest.raises(BrokerError, match=r"certificate .*/none.pem of broker"):
        start(cafile="none.pem")
    with pytest.raises(BrokerError, match=r"certificate .*/client.pem of broker"):
        start(cafile="ca.pem", certfile="client.pem", keyfile="server.key")


@pytest.mark.parametrize(
    ("which", "said"),
    [("early", r"not valid yet; check the clock"), ("late", r"has expired; renew it, or check the clock"),
     ("elsewhere", r"for another host; give a name"), ("between", r"--cafile; if one in between"),
     ("itself", r"signed by itself; .*--cafile")],
)  # fmt: skip
def test_certificate_that_is_refused_is_answered_with_what_is_wrong_with_it(
    which: str, said: str, mosquitto: Callable[..., Any], certificates: Path, tmp_path: Path, connection: Any
) -> None:
    for path in certificates.iterdir():
        shutil.copy(path, tmp_path)
    (tmp_path / "new").touch()
    (tmp_path / "serial").write_text("01")
    (tmp_path / "ca.conf").write_text(
        "[ca]\nunique_subject=no\ndatabase=new\nserial=serial\nnew_certs_dir=.\ndefault_md=sha256\npolicy=any\n"
        "[any]\ncommonName=supplied\n"
    )
    days = {"early": ("21000101", "21000201"), "late": ("20200101", "20200201")}.get(which, ("20200101", "21000101"))
    (tmp_path / "names").write_text(f"subjectAltName=IP:{'10.9.8.7' if which == 'elsewhere' else '127.0.0.1'}")
    authority = "ca"
    if which == "between":
        authority = "between"
        (tmp_path / "authority").write_text("basicConstraints=critical,CA:true\nkeyUsage=critical,keyCertSign")
        openssl(tmp_path, "req -newkey rsa:2048 -nodes -subj /CN=between -keyout between.key -out between.csr")
        openssl(
            tmp_path,
            "x509 -req -in between.csr -CA ca.pem -CAkey ca.key -CAcreateserial -days 2 -out between.pem"
            " -extfile authority",
        )
    signer = "-selfsign -keyfile server.key" if which == "itself" else f"-cert {authority}.pem -keyfile {authority}.key"
    openssl(
        tmp_path,
        f"ca -batch -config ca.conf -name ca {signer} -in server.csr -out server.pem -extfile names -notext"
        f" -startdate {days[0]}000000Z -enddate {days[1]}000000Z",
    )
    for path in (tmp_path, *tmp_path.iterdir()):
        path.chmod(0o755)
    broker = mosquitto(
        "allow_anonymous true", f"certfile {tmp_path}/server.pem", f"keyfile {tmp_path}/server.key", "user root"
    )
    one = Connection(parse_broker(f"mqtts://127.0.0.1:{broker.port}", cafile=str(certificates / "ca.pem")), "one")
    with pytest.raises(BrokerError, match=said):
        one.start()
