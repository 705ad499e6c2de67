from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edgekit
from edgekit.broker import BrokerAddress
from edgekit.devices.config import Config, ConfigError, StreamConfig, read_config
from edgekit.devices.profiles import profile_names
from edgekit.devices.toml_file import TomlFile
from edgekit.errors import EdgekitError

pytestmark = pytest.mark.no_runtime
PAGE = Path(__file__).parents[1] / "docs" / "config.md"
STREAM = '[[stream]]\nname = "door"\nbundle = "door.tflite"\nsource = "camera:0"\n'


def read(folder: Path, text: str) -> Config:
    (folder / "edgekit.toml").write_text(text)
    return read_config(folder / "edgekit.toml")


def refusal(folder: Path, text: str) -> str:
    """What is said of a configuration, without the folder."""
    with pytest.raises(EdgekitError) as caught:
        read(folder, text)
    assert "\n" not in str(caught.value)
    return str(caught.value).replace(f"{folder}/", "")


@pytest.mark.parametrize(
    ("text", "line", "said"),
    [
        (STREAM + "treshold = 0.5", 5, "stream door: unknown key 'treshold': expected bundle, .* mean 'threshold'"),
        ("device-id = 'pi'\n" + STREAM, 1, "unknown key 'device-id': .* did you mean 'device_id'"),
        ("[[streams]]\n", 1, "unknown key 'streams': .* did you mean 'stream'"),
        ("zzz = 1\n" + STREAM, 1, "unknown key 'zzz': expected stream, .* or key; leave it out"),
        # where a key belongs
        ("\ntop_k = 3\n" + STREAM, 2, r"unknown key 'top_k': .*; put it below \[\[stream\]\]"),
        (STREAM + "hang_s = 3", 5, "stream door: unknown key 'hang_s': .*; put it above the first table"),
        # what is missing
        ("", 1, r"stream is missing: expected \[\[stream\]\] with a bundle and a source; add it"),
        ("stream = []", 1, r"stream: expected \[\[stream\]\] with a bundle and a source, got none"),
        (STREAM + "\n[[stream]]\nbundle = 'a'", 6, "stream 2: source is missing: expected a camera, a microphone"),
        ("[stream]\nbundle = 'a'\nsource = 'mic'", 1, r"stream: expected \[\[stream\]\] with .*, got a table"),
        # names
        (STREAM + "\n" + STREAM, 7, "stream door: expected a name of its own, got that of line 2"),
        (STREAM * 2 + "# the end", 6, "stream door: expected a name of its own, got that of line 2"),
        (STREAM.replace("door", "Front Door", 1), 2, "stream Front Door: name: expected a name of a-z, 0-9, _ and -"),
        ("device_id = 'Pi 4'\n" + STREAM, 1, "device_id: expected a name .*, got 'Pi 4'"),
        ("prefix = 'a//b'\n" + STREAM, 1, "prefix: expected names of a-z, 0-9, _ and -, with / between them"),
        ("[label_groups]\n'Big Ones' = ['a']\n" + STREAM, 2, "label_groups 'Big Ones': expected a table of lists"),
        ("[label_groups]\nbig = []\n" + STREAM, 2, "label_groups 'big': .*, got an empty list"),
        # types
        (STREAM + "top_k = '3'", 5, "stream door: top_k: expected a whole number, 1 or more, got '3'"),
        (STREAM + "top_k = 3.5", 5, "stream door: top_k: expected a whole number, 1 or more, got 3.5"),
        (STREAM + "loop = 'yes'", 5, "stream door: loop: expected true or false, got 'yes'"),
        (STREAM + "ops = 'mish.so'", 5, "stream door: ops: expected a list of paths, got 'mish.so'"),
        (STREAM + "ops = ['mish.so',\n  3]", 5, "stream door: ops: expected a list of paths, got 3"),
        ("stream = 3", 1, r"stream: expected \[\[stream\]\] with a bundle and a source, got 3"),
        ("stream = ['door']", 1, r"stream 1: expected \[\[stream\]\] with a bundle and a source, got 'door'"),
        ("broker = 1883\n" + STREAM, 1, "broker: expected mqtt://.*, got 1883"),
        ("label_groups = {a = 'b'}\n" + STREAM, 1, "label_groups: expected a table of lists .*, got text in it"),
        (STREAM + "[stream.threshold]\ncat = 'x'", 5, "stream door: threshold: expected a score .*, got text in it"),
        # values
        (STREAM + "threshold = 1.5", 5, "stream door: threshold: expected a score from 0 to 1.*, got 1.5"),
        (STREAM + "threshold = nan", 5, "stream door: threshold: expected a score from 0 to 1.*, got nan"),
        (STREAM + "threshold = { cat = 0.5, dog = 50 }", 5, "stream door: threshold 'dog': .*, got 50"),
        (STREAM + "[stream.threshold]\n'a.b' = 0\ncat = -1", 7, "stream door: threshold 'cat': .*, got -1"),
        (STREAM + "threshold.cat = 0.1\nthreshold.dog = 2", 6, "stream door: threshold 'dog': .*, got 2"),
        (STREAM + "top_k = 0", 5, "stream door: top_k: expected a whole number, 1 or more, got 0"),
        (STREAM + "max_fps = 0", 5, "stream door: max_fps: expected frames a second, 0.001 or more, got 0"),
        (STREAM + "hop_s = inf", 5, "stream door: hop_s: expected seconds, 0.001 or more, got inf"),
        (STREAM + "threads = 0", 5, "stream door: threads: expected a whole number from 1 to 256, got 0"),
        (STREAM + "drop = 'all'", 5, "stream door: drop: expected oldest, newest or none, got 'all'"),
        (STREAM + "smoothing = 0", 5, "stream door: smoothing: expected a whole number from 1 to 10000, got 0"),
        (STREAM + "hysteresis = 2", 5, "stream door: hysteresis: expected a score from 0 to 1, got 2"),
        (STREAM + "delegate = 'tpu'", 5, r"stream door: delegate: expected auto, .* a library \(.so\), got 'tpu'"),
        (STREAM + "labels = ''", 5, "stream door: labels: expected a path, got ''"),
        (STREAM.replace("camera:0", ""), 4, "stream door: source: expected a camera, .*, got ''"),
        (STREAM.replace("door.tflite", r"a\u0000b"), 3, "stream door: bundle: expected the path of a .tflite"),
        ("spool_size_mb = 0\n" + STREAM, 1, "spool_size_mb: expected megabytes, .*, got 0"),
        ("spool_days = -1\n" + STREAM, 1, "spool_days: expected days, 0.001 or more, got -1"),
        ("replay_rate = 0\n" + STREAM, 1, "replay_rate: expected messages a second, 0.001 or more, got 0"),
        ("hang_s = 0\n" + STREAM, 1, "hang_s: expected seconds, 0.1 or more, got 0"),
        ("profile = 'raspberry-pi-6'\n" + STREAM, 1, "profile 'raspberry-pi-6': expected .*; did you mean 'rasp"),
        ("profile = 'mine.toml'\n" + STREAM, 1, "profile mine.toml: expected a TOML file, got nothing"),
        # the broker
        ("broker = 'http://hub'\n" + STREAM, 1, "broker URL: expected mqtt://.*, got http://; write mqtt://"),
        ("\npassword_file = 'none'\n" + STREAM, 2, "password file none: .*, got No such file or directory"),
        ("password_file = ''\n" + STREAM, 1, "password_file: expected a path, got ''"),
        ("broker = 'embedded'\ncafile = 'ca.pem'\n" + STREAM, 2, "cafile: expected a broker with mqtt://.*embedded"),
        # TOML
        ("device_id = pi-4\n" + STREAM, 1, r"Invalid value: expected \[table\], .* text in quotes"),
        (STREAM + "top_k = 3\ntop_k = 4", 6, "Cannot overwrite a value"),
        ("device_id = 'pi'\n\n[[stream]\n", 3, r"Expected '\]\]'"),
        ("# no end\nlabels = [\n  'a',", 3, "Invalid value|Unclosed array"),
        ("a = " + "[" * 3000, 1, "not TOML"),
        ("a = " + "1" * 5000, 1, "not TOML"),
    ],
)  # fmt: skip
def test_read_config_that_is_wrong_says_line_and_key(tmp_path: Path, text: str, line: int, said: str) -> None:
    assert re.match(rf"edgekit\.toml line {line}: ({said})", refusal(tmp_path, text)), refusal(tmp_path, text)


def test_read_config_finds_a_line_after_values_of_several(tmp_path: Path) -> None:
    text = 'prefix = """\\\n  edge\\\n  [[stream]]"""\n'
    assert "line 1: prefix" in refusal(tmp_path, text + STREAM)
    assert "line 4: unknown key 'hang'" in refusal(tmp_path, text + "hang = 3\n" + STREAM)
    text = "# [[stream]]\r\n[label_groups]\r\nbig = [\r\n  'a', # hang_s = 3\r\n  'b',\r\n]\r\n\r\n"
    assert "line 12: stream door: unknown key 'x'" in refusal(tmp_path, text + STREAM + 'x = "é"')


def test_read_config_that_cannot_be_read(tmp_path: Path) -> None:
    path = tmp_path / "edgekit.toml"
    with pytest.raises(EdgekitError, match=r"configuration .*: expected a TOML file, got nothing; check the path"):
        read_config(path)
    with pytest.raises(EdgekitError, match="got a folder"):
        read_config(tmp_path)
    with pytest.raises(EdgekitError, match="got something else"):
        read_config("/dev/zero")
    path.write_bytes(b"# caf\xc3\xa9\n# caf\xe9\n")
    with pytest.raises(EdgekitError, match="line 2: expected UTF-8, got the byte 0xe9; save the file as UTF-8"):
        read_config(path)
    path.write_bytes(b"#" * 300_000)
    with pytest.raises(EdgekitError, match="expected 256 kB at most, got more"):
        read_config(path)
    path.write_bytes(b"\xef\xbb\xbf" + STREAM.encode())  # as Windows' editors begin a file
    assert read_config(path).stream[0].name == "door"


def test_read_config_takes_paths_from_the_folder_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "password").write_text("secret\n")
    (tmp_path / "password").chmod(0o600)
    (tmp_path / "board.toml").write_text("title = 'ours'")
    text = """
        broker = "mqtts://me@hub"
        password_file = "password"
        cafile = "ca.pem"
        cert = "/etc/device.pem"
        key = "device.key"
        spool = "spool"
        profile = "board.toml"
    """ + STREAM.replace("camera:0", "clips/a.mp4")
    config = read(tmp_path, text + "labels = '../labels.txt'\nops = ['mish.so']\ndelegate = './libgpu.so,x=1'")
    assert config.broker == BrokerAddress(
        "hub", 8883, True, "me", "secret", f"{tmp_path}/ca.pem", "/etc/device.pem", f"{tmp_path}/device.key"
    )
    assert (config.spool, config.profile) == (f"{tmp_path}/spool", f"{tmp_path}/board.toml")
    assert config.stream[0] == StreamConfig(
        name="door",
        bundle=f"{tmp_path}/door.tflite",
        source=f"{tmp_path}/clips/a.mp4",
        labels=f"{tmp_path}/../labels.txt",
        ops=(f"{tmp_path}/mish.so",),
        delegate=f"{tmp_path}/libgpu.so,x=1",
    )
    monkeypatch.chdir(tmp_path)
    assert read_config("edgekit.toml").stream[0].bundle == "door.tflite"


@pytest.mark.parametrize(
    "source", ["camera:0", "camera:csi", "mic", "mic:USB", "rtsp://me:pw@cam/1", "http://cam/mjpeg"]
)
def test_read_config_leaves_alone_what_is_no_path(tmp_path: Path, source: str) -> None:
    text = "broker = 'none'\nspool = 'none'\nprofile = 'x86-64'\n" + STREAM.replace("camera:0", source)
    config = read(tmp_path, text + "delegate = 'coral'")
    assert (config.broker, config.spool, config.profile) == ("none", "none", "x86-64")
    assert (config.stream[0].source, config.stream[0].delegate) == (source, "coral")


def test_read_config_of_a_minimal_file_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EDGEKIT_MQTT_USERNAME", "me")
    config = read(tmp_path, STREAM)
    stream = StreamConfig(name="door", bundle=f"{tmp_path}/door.tflite", source="camera:0")
    assert config == Config(stream=(stream,), broker=BrokerAddress("localhost", 1883, username="me"))
    assert (config.spool_bytes, config.spool_age_s) == (64 << 20, 7 * 86400)


def test_read_config_again_tells_what_changed(tmp_path: Path) -> None:
    text = "password_file = 'password'\n" + STREAM + STREAM.replace('"door"', '"yard"')
    (tmp_path / "password").write_text("one")
    before = read(tmp_path, text)
    assert read(tmp_path, "# the same\n" + text) == before
    after = read(tmp_path, text + "threshold = 0.5")
    assert [old == new for old, new in zip(before.stream, after.stream, strict=True)] == [True, False]
    (tmp_path / "password").write_text("two")
    after = read(tmp_path, text)
    assert after.broker != before.broker and after.stream == before.stream


def test_read_config_shows_no_password(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Not even in errors; and warns where it can be read in the file."""
    text = "broker = 'mqtt://me:hunter2@hub'\n" + STREAM
    config = read(tmp_path, text)
    assert config.broker == BrokerAddress("hub", 1883, username="me", password="hunter2")
    assert "everyone on this machine can read the broker's password" in caplog.text and "password_file" in caplog.text
    caplog.clear()
    (tmp_path / "edgekit.toml").chmod(0o640)
    assert read_config(tmp_path / "edgekit.toml") == config
    assert not caplog.records
    said = repr(config) + refusal(tmp_path, text.replace("hub", "hub:port")) + refusal(tmp_path, "key = 1\n" + text)
    assert "hunter2" not in said + refusal(tmp_path, text.replace("mqtt:", "http:"))


def test_config_is_checked_without_a_file() -> None:
    """As the command line makes it."""
    stream = StreamConfig(bundle="door.tflite", source="camera:0")
    wrong: dict[str, dict[str, Any]] = {
        "hang_s: expected seconds, 0.1 or more, got 0": {"hang_s": 0},
        "stream main: expected a name of its own, got that of another stream": {"stream": (stream, stream)},
        "profile 'pi': expected coral-dev-board, ": {"profile": "pi"},
    }
    for said, values in wrong.items():
        with pytest.raises(ConfigError) as caught:
            Config(**{"stream": (stream,), **values})
        assert str(caught.value).startswith(said)
    with pytest.raises(ConfigError, match=r"^stream main: top_k: expected a whole number, 1 or more, got 0; "):
        msgspec.structs.replace(Config(stream=(stream,)), stream=(msgspec.structs.replace(stream, top_k=0),))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"top_k": "3"}, "stream main: top_k: expected a whole number, 1 or more, got '3'"),
        ({"smoothing": 2.5}, "stream main: smoothing: expected a whole number from 1 to 10000, got 2.5"),
        ({"strict": "no"}, "stream main: strict: expected true or false, got 'no'"),
        ({"threshold": {"red": "high"}}, "stream main: threshold: expected a score from 0 to 1, .*, got a table"),
        ({"device_id": 3}, "device_id: expected a name of a-z, 0-9, _ and -, got 3"),
        ({"hang_s": None}, "hang_s: expected seconds, 0.1 or more, got None"),
    ],
)
def test_arguments_of_another_type_are_refused(models: Path, given: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=f"^{said}; "):
        edgekit.run(models / "int8.tflite", "camera:0", broker="none", **given)


def test_page_shows_every_key_with_its_default(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    short, full, board = re.findall(r"^```toml\n(.*?)^```", PAGE.read_text(), re.S | re.M)
    assert [stream.name for stream in read(tmp_path, short).stream] == ["desk", "hall"]
    assert read(tmp_path, full) == Config(
        stream=(StreamConfig(bundle=f"{tmp_path}/door.tflite", source="camera:0"),),
        broker=BrokerAddress("localhost", 1883),
        label_groups={"speaking": ("speech", "conversation")},
    )
    (tmp_path / "password").write_text("secret")
    everything = read(tmp_path, re.sub(r"^# (?=\w+ = )", "", full, flags=re.M).replace("mqtt:", "mqtts:"))
    shown = set(re.findall(r"^(?:# )?\[*(\w+)", full, re.M)) - {"speaking"}
    assert shown == {
        *Config.__struct_fields__, *StreamConfig.__struct_fields__, "password_file", "cafile", "cert", "key"
    }  # fmt: skip
    assert everything.profile == "raspberry-pi-4" and everything.stream[0].threads == 2
    (tmp_path / "board.toml").write_text(board)
    assert read(tmp_path, f"profile = 'board.toml'\n{STREAM}").profile == f"{tmp_path}/board.toml"
    assert tuple(sorted(re.findall(r"^\| `([\w-]+)` \|", PAGE.read_text(), re.M))) == profile_names()


def test_line_is_found_behind_values_of_several_lines(tmp_path: Path) -> None:
    labels = "\n".join(f'  ["label ] {i}", {{ n = "}}" }}],  # comment [ {i}' for i in range(2000))
    text = f'''a = "]"
b = """
[ " \\""" # ]
"""""
c = ''
d = [  # ]
{labels}
]
"e ]" = 1
[t."x ]"]
f = 1
[[s]]
f = 1
[[s]]
f = 2
'''
    (tmp_path / "x.toml").write_text(text)
    file = TomlFile(tmp_path / "x.toml", "file")
    lines = text.split("\n")
    for key, start in (
        (("a",), 'a = "]"'),
        (("b",), 'b = """'),
        (("c",), "c = ''"),
        (("d", 1999), "d = [  # ]"),
        (("e ]",), '"e ]" = 1'),
        (("t", "x ]", "f"), "f = 1"),
        (("s", 1, "f"), "f = 2"),
    ):
        assert lines[file.line(key) - 1] == start
