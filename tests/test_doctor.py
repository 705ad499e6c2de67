from __future__ import annotations

import errno
import fcntl
import getpass
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import edgekit
from edgekit import runtimes
from edgekit.broker import parse_broker
from edgekit.devices.doctor import doctor as doctor_module
from edgekit.devices.doctor import machine, probe
from edgekit.devices.doctor.finding import Finding
from edgekit.devices.profiles import load_profile

sys.path.insert(0, str(Path(__file__).parent))
from sound_server import SoundServer

PI, COMPUTER = load_profile("raspberry-pi-4"), load_profile("x86-64")


@pytest.fixture
def configured(tmp_path: Path, models: Path) -> Callable[..., Path]:
    """Writes a configuration: the top of it, and a stream each."""
    shutil.copy(models / "int8.tflite", tmp_path)

    def write(top: str, *streams: str) -> Path:
        path = tmp_path / "edgekit.toml"
        path.write_text("\n[[stream]]\n".join([top, *streams]))
        return path

    return write


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tries no runtimes and delegates, which takes the longest."""
    monkeypatch.setattr(probe, "models", lambda *_: iter(()))


def by_check(findings: Any) -> dict[str, Finding]:
    return {finding.check: finding for finding in findings}


# -- the command -------------------------------------------------------------------------------------------------------


def test_doctor_on_this_machine(edgekit_cli: Any) -> None:
    """No camera, no broker: nothing that is needed."""
    result = edgekit_cli("doctor")
    assert result.returncode == 0, result.stderr
    assert not result.stderr
    lines = {line[8:].partition(":")[0]: line for line in result.stdout.splitlines()}
    preferred = f"runtime {next(iter(runtimes.installed()))}"
    assert lines[preferred].startswith("ok ")
    # XNNPACK asks the system what the processor can do
    how = "with" if Path("/proc/cpuinfo").exists() else "without"
    assert f"computes rightly, {how} XNNPACK" in lines[preferred]
    expected = "python profile delegate_coral delegate_gpu operators mic broker spool shared_memory memory clock"
    assert {check.replace("_", " ") for check in expected.split()} <= set(lines)


def test_doctor_prints_json_and_fails_if_what_is_asked_for_does(edgekit_cli: Any, free_port: Callable[[], int]) -> None:
    result = edgekit_cli("doctor", "--json", "--broker", f"mqtt://ann:hunter2@127.0.0.1:{free_port()}")
    diagnosis = json.loads(result.stdout)
    assert diagnosis["schema"] == "edgekit.doctor/1"
    broker = next(finding for finding in diagnosis["findings"] if finding["check"] == "broker")
    assert (broker["status"], broker["needed"]) == ("failed", True) and "cannot be reached" in broker["detail"]
    assert result.returncode == 1
    assert "edgekit: error: needed, and not so: broker; " in result.stderr
    assert "hunter2" not in result.stdout + result.stderr.replace("the password in --broker", "")


def test_doctor_shows_a_table_on_a_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgekit.terminal import print_diagnosis

    print_diagnosis(edgekit.doctor())
    assert "MB free in /dev/shm" in capsys.readouterr().out


# -- what a configuration needs ----------------------------------------------------------------------------------------


def test_configuration_that_is_all_there(configured: Callable[..., Path], frames: Path) -> None:
    path = configured(
        'broker = "none"\nspool = "none"',
        f'name = "door"\nbundle = "int8.tflite"\nsource = "{frames}"',
        f'name = "gate"\nbundle = "int8.tflite"\nsource = "{frames}"\ndelegate = "cpu"',
    )
    diagnosis = edgekit.doctor(path)
    found = by_check(diagnosis.findings)
    assert diagnosis.failing == []
    assert found["bundle of door"].detail.endswith("3 classes")
    assert "operators delegated" in found["model of gate"].detail and found["model of gate"].needed
    assert found["source of door"].status == found["source of gate"].status == "ok"


def test_configuration_with_what_is_not_there(configured: Callable[..., Path], free_port: Callable[[], int]) -> None:
    path = configured(
        f'broker = "mqtt://127.0.0.1:{free_port()}"\nspool_size_mb = 1000000',
        'name = "door"\nbundle = "int8.tflite"\nsource = "camera:7"\ndelegate = "coral"',
        'name = "gate"\nbundle = "nowhere.tflite"\nsource = "nowhere.mp4"',
        f'name = "yard"\nbundle = "int8.tflite"\nsource = "rtsp://ann:hunter2@127.0.0.1:{free_port()}/1"',
        'name = "hall"\nbundle = "edgekit.toml"\nsource = "edgekit.toml"\ndelegate = "nowhere.so"',
    )
    diagnosis = edgekit.doctor(path)
    assert diagnosis.failing == [
        "delegate coral", "model of door", "bundle of gate", "bundle of hall", "camera:7", "source of gate",
        "source of yard", "broker",
    ]  # fmt: skip
    found = by_check(diagnosis.findings)
    assert found["model of door"].status == "missing" and "int8_edgetpu.tflite" in found["model of door"].detail
    assert found["camera:7"].status == "missing" and found["camera:7"].mend
    assert found["spool"].status == "failed" and "--spool-size" in found["spool"].mend
    assert "hunter2" not in str(diagnosis)


def test_configuration_that_cannot_be_read_is_told_among_the_rest(
    no_models: None, configured: Callable[..., Path]
) -> None:
    diagnosis = edgekit.doctor(configured('brocker = "none"', 'bundle = "int8.tflite"\nsource = "x.mp4"'))
    found = by_check(diagnosis.findings)
    assert diagnosis.failing == ["configuration"]
    assert "brocker" in found["configuration"].detail and found["shared memory"].status == "ok"


def test_spool_that_cannot_be_written(no_models: None, configured: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    path = configured('broker = "none"\nspool = "file/spool"', 'bundle = "int8.tflite"\nsource = "camera:0"')
    assert edgekit.doctor(path).failing == ["camera:0", "spool"]


def test_source_that_the_bundle_cannot_take(configured: Callable[..., Path], tmp_path: Path) -> None:
    (tmp_path / "text.mp4").write_text("this is no video\n" * 100)
    path = configured(
        'broker = "none"\nspool = "none"',
        'name = "door"\nbundle = "int8.tflite"\nsource = "text.mp4"',
        'name = "hall"\nbundle = "int8.tflite"\nsource = "mic:nowhere"',
    )
    found = by_check(edgekit.doctor(path).findings)
    assert "text.mp4 cannot be opened" in found["source of door"].detail
    assert "expected images, which its bundle takes, got sound" in found["bundle of hall"].detail


# -- runtimes and delegates --------------------------------------------------------------------------------------------


@pytest.fixture
def edge_tpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Finding]:
    """What is found with a stand-in for libedgetpu, the body of a function in C that loads its delegate."""
    if not shutil.which("gcc"):
        pytest.skip("no gcc here; scripts/test installs it")

    def find(body: str) -> Finding:
        source = tmp_path / "libedgetpu.c"
        source.write_text(
            "#include <stdlib.h>\n#include <unistd.h>\n"
            "void *tflite_plugin_create_delegate(char **keys, char **values, size_t n, void (*report)(const char *))"
            f"{{ {body} }}\nvoid tflite_plugin_destroy_delegate(void *delegate) {{}}\n"
        )
        library = tmp_path / "libedgetpu.so.1"
        subprocess.run(["gcc", "-shared", "-fPIC", "-o", library, source], check=True)
        monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
        return next(found for found in probe.models(COMPUTER, []) if found.check == "delegate coral")

    return find


@pytest.mark.parametrize(
    ("body", "complaint"),
    [
        ('report("no device found"); return 0;', "no device found"),
        ("abort();", "crashed (SIGABRT)"),
        ("pause(); return 0;", "gave nothing for 1 s"),
    ],
    ids=["no device", "crash", "hang"],
)
def test_delegate_that_does_not_load_is_a_finding(
    edge_tpu: Callable[[str], Finding], monkeypatch: pytest.MonkeyPatch, body: str, complaint: str
) -> None:
    if "pause" in body:
        monkeypatch.setattr(probe, "LOAD_S", 1.0)
    found = edge_tpu(body)
    assert found.status == "failed" and complaint in found.detail and "plug the Edge TPU in" in found.mend


def test_delegate_that_is_not_installed_is_missing() -> None:
    found = by_check(probe.models(PI, []))
    assert found["delegate coral"].status == "missing" and "there is no libedgetpu" in found["delegate coral"].detail
    assert found["delegate coral"].mend == PI.hints["coral"]


def test_gpu_that_is_software_computes_rightly(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = os.environ.get("EDGEKIT_TEST_VULKAN") or pytest.skip("no EDGEKIT_TEST_VULKAN here; scripts/test sets it")
    if "litert" not in runtimes.installed():
        pytest.skip("only LiteRT has it")
    monkeypatch.setenv("VK_DRIVER_FILES", driver)
    assert by_check(probe.models(COMPUTER, []))["delegate gpu"].status == "ok"


def test_runtime_that_does_not_load_is_told_and_the_other_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    real = runtimes.find()
    broken = {"tflite-runtime": "litert", "litert": "tflite-runtime"}[next(iter(real))]
    other = {broken: runtimes.Runtime(broken, "0", sys.executable)}
    monkeypatch.setattr(runtimes, "find", lambda: {**other, next(iter(real)): next(iter(real.values()))})
    if broken in real:
        pytest.skip("both are here")
    found = by_check(probe.models(COMPUTER, []))
    assert (found[f"runtime {broken}"].status, found[f"runtime {broken}"].needed) == ("failed", True)
    assert found[f"runtime {next(iter(real))}"].status == "ok"


def test_no_runtime_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtimes, "find", dict)
    monkeypatch.setattr(runtimes, "installed", dict)
    monkeypatch.setattr(runtimes, "RUNTIMES", {"litert": ("nowhere_litert", "ai-edge-litert")})
    (found,) = probe.models(COMPUTER, [])
    assert (found.status, found.needed, found.mend) == ("failed", True, "pip install ai-edge-litert")


def test_operators_that_were_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe.custom_ops, "find_library", lambda: None)
    found = probe.operators()
    assert found.status == "missing" and "install a C compiler" in found.mend


# -- the broker --------------------------------------------------------------------------------------------------------


def test_broker_that_lets_us_in(no_models: None, broker: Any) -> None:
    assert by_check(edgekit.doctor(broker=broker.url).findings)["broker"].detail.endswith("lets us in, with MQTT 5")


@pytest.mark.parametrize(
    ("url", "complaint"),
    [
        ("mqtt://ann:wrong@127.0.0.1:{port}", "refused the connection: not author"),
        ("mqtts://127.0.0.1:{port}", "cannot be reached"),
        ("mqtt://nowhere.invalid", "cannot be reached"),
    ],
)
def test_broker_that_does_not(mosquitto: Any, tmp_path: Path, url: str, complaint: str) -> None:
    passwords = tmp_path / "passwords"
    subprocess.run(["mosquitto_passwd", "-b", "-c", passwords, "ann", "right"], check=True)
    started = mosquitto(f"user {getpass.getuser()}", f"password_file {passwords}", "allow_anonymous false")
    found = doctor_module.find_broker(url.format(port=started.port))
    assert (found.status, found.needed) == ("failed", True) and complaint in found.detail and found.mend
    right = doctor_module.find_broker(parse_broker(f"mqtt://ann:right@127.0.0.1:{started.port}"))
    assert right.status == "ok" and "right" not in right.detail


def test_embedded_broker_needs_nothing() -> None:
    assert doctor_module.find_broker("embedded").status == doctor_module.find_broker("none").status == "ok"


# -- the machine -------------------------------------------------------------------------------------------------------


class Cameras:
    """A tree of the system's files with these devices, and what their drivers answer: their capabilities, or how they
    fail."""

    def __init__(self, root: Path, monkeypatch: Any, devices: dict[str, tuple[str, int | OSError]]) -> None:
        self.root = root
        by_inode = {}
        for node, device in devices.items():
            for path in (root / "sys/class/video4linux" / node / "name", root / "dev" / node):
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(device[0])
            by_inode[path.stat().st_ino] = device

        def ioctl(handle: int, request: int, answer: bytearray) -> int:
            assert request == 0x80685600 and len(answer) == 104
            title, says = by_inode[os.fstat(handle).st_ino]
            if isinstance(says, OSError):
                raise says
            struct.pack_into("=16s32s", answer, 0, b"uvcvideo", title.encode())
            struct.pack_into("=II", answer, 84, says | 0x8000_0001, says)
            return 0

        monkeypatch.setattr(fcntl, "ioctl", ioctl)


def test_cameras_are_those_that_capture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Cameras(
        tmp_path,
        monkeypatch,
        {
            "video0": ("HD Webcam", 0x0420_0001),
            "video1": ("HD Webcam", 0x0480_0000),  # its metadata
            "video2": ("Elsewhere", OSError(errno.ENODEV, "No such device")),
            "video10": ("bcm2835-codec-decode", 0x0400_4000),
            "video11": ("unicam-image", 0x0400_0001),
        },
    )
    found = by_check(machine.cameras(COMPUTER, here.root, needed=("camera:0", "camera:3", "frames/", "mic")))
    assert {check: finding.status for check, finding in found.items()} == {
        "camera:0": "ok", "camera:2": "failed", "camera:3": "missing",
    }  # fmt: skip
    assert "HD Webcam" in found["camera:0"].detail and found["camera:0"].needed
    assert "does not answer (No such device)" in found["camera:2"].detail and not found["camera:2"].needed


def test_camera_by_a_link_is_the_camera(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Cameras(tmp_path, monkeypatch, {"video4": ("HD Webcam", 1)})
    link = tmp_path / "dev/v4l/by-id/usb-webcam"
    link.parent.mkdir(parents=True)
    link.symlink_to("../../video4")
    (found,) = machine.cameras(COMPUTER, here.root, needed=("camera:/dev/v4l/by-id/usb-webcam",))
    assert (found.check, found.status, found.needed) == ("camera:4", "ok", True)


def test_camera_that_may_not_be_opened_names_the_group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = Cameras(tmp_path, monkeypatch, {"video0": ("HD Webcam", 1)})
    opened = os.open

    def refuse(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("dev/video0"):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, *arguments, **options)

    monkeypatch.setattr(os, "open", refuse)  # root is let in anywhere
    (found,) = machine.cameras(COMPUTER, here.root)
    assert found.status == "failed" and found.mend.startswith("sudo usermod -aG ")


def test_pi_without_picamera2_says_how_to_get_it(tmp_path: Path) -> None:
    found = by_check(machine.cameras(PI, tmp_path))
    assert found["camera:csi"].status == "missing" and "python3-picamera2" in found["camera:csi"].mend
    assert found["camera"].status == "missing"


def test_camera_module_on_another_board_says_what_it_takes(tmp_path: Path) -> None:
    found = by_check(machine.cameras(COMPUTER, tmp_path, needed=("camera:csi:1",)))["camera:csi"]
    assert (found.status, found.needed) == ("failed", True) and found.mend


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        ("return [{'Model': 'imx708', 'Id': '/i2c/imx708@1a'}, {'Model': 'UVC', 'Id': '/usb@1'}]", "ok", "imx708"),
        ("return []", "missing", "none on a ribbon cable"),
        ("raise RuntimeError('no pipeline handler')", "failed", "no pipeline handler"),
        ("raise ValueError('numpy.dtype size changed')", "failed", "numpy.dtype size changed"),
    ],
)
def test_pi_lists_its_camera_modules(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, status: str, told: str
) -> None:
    """By a stand-in for picamera2, in a process of its own."""
    package = tmp_path / "packages/picamera2"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(
        "print('a driver says something')\n"
        f"class Picamera2:\n    @staticmethod\n    def global_camera_info():\n        {body}\n"
    )
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    found = by_check(machine.cameras(PI, tmp_path / "root", needed=("camera:csi",)))["camera:csi"]
    assert (found.status, found.needed) == (status, True) and told in found.detail and "UVC" not in found.detail


@pytest.fixture
def sound_server(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Iterator[SoundServer]:
    pytest.importorskip("pyaudio", reason="needs pyaudio; scripts/test installs it")
    if not shutil.which("pulseaudio"):
        pytest.skip("no pulseaudio here; scripts/test installs it")
    server = SoundServer(tmp_path_factory.mktemp("sound"))
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    yield server
    server.close()


def test_microphone_is_recorded_from(sound_server: SoundServer) -> None:
    found = machine.microphone(COMPUTER)
    assert found.status == "ok" and "silence only" in found.detail
    absent = machine.microphone(COMPUTER, "nowhere", needed=True)
    assert (absent.check, absent.status, absent.needed) == ("mic:nowhere", "missing", True)


@pytest.mark.parametrize(
    ("answer", "status", "told"),
    [
        ("throttled=0x0", "ok", "enough"),
        ("throttled=0x50005", "failed", "too little voltage, throttled, since it was started: too little voltage"),
        ("throttled=0x80000", "failed", "since it was started: soft limit of temperature"),
        ("VCHI initialization failed", "failed", "vcgencmd does not tell"),
    ],
)
def test_pi_tells_whether_it_was_slowed_down(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str, status: str, told: str
) -> None:
    (tmp_path / "vcgencmd").write_text(f'#!/bin/sh\n[ "$1" = get_throttled ] && echo "{answer}"\n')
    (tmp_path / "vcgencmd").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    found = by_check(machine.heat(PI, tmp_path))["supply"]
    assert found.status == status and told in found.detail


@pytest.mark.parametrize(("thousandths", "status"), [(51_500, "ok"), (84_000, "failed")])
def test_temperature_is_told(tmp_path: Path, thousandths: int, status: str) -> None:
    zone = tmp_path / "sys/class/thermal/thermal_zone0"
    zone.mkdir(parents=True)
    (zone / "type").write_text("cpu-thermal\n")
    (zone / "temp").write_text(f"{thousandths}\n")
    assert by_check(machine.heat(PI, tmp_path))["temperature"].status == status


@pytest.mark.parametrize(("available_kb", "status"), [(500_000, "ok"), (50_000, "failed")])
def test_memory_is_told(tmp_path: Path, available_kb: int, status: str) -> None:
    assert machine.memory(tmp_path).status == "missing"
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text(
        f"MemTotal:  948000 kB\nMemFree:  2000 kB\nMemAvailable:  {available_kb} kB\n"
    )
    found = machine.memory(tmp_path)
    assert found.status == status and "of 971 MB" in found.detail


def test_shared_memory_that_is_not_there_is_told(tmp_path: Path) -> None:
    assert machine.shared_memory().status == "ok"
    assert machine.shared_memory(1 << 40).status == machine.shared_memory(1, tmp_path / "nowhere").status == "failed"


# -- checks that go wrong ----------------------------------------------------------------------------------------------


def test_check_that_hangs_or_fails_keeps_none_of_the_others() -> None:
    checks = [
        doctor_module.Check("hung", threading.Event().wait, needed=True, limit_s=0.2),
        doctor_module.Check("wrong", lambda: 1 / 0),  # type: ignore[arg-type, return-value]
        doctor_module.Check("right", machine.shared_memory),
    ]
    found = by_check(doctor_module.carry_out(checks))
    assert (found["hung"].status, found["hung"].needed) == ("failed", True) and "no answer" in found["hung"].detail
    assert "ZeroDivisionError" in found["wrong"].detail and found["shared memory"].status == "ok"
