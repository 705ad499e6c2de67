"""Checks of the machine: cameras, microphone, memory, clock, heat. ``root`` is that of the system's files."""

from __future__ import annotations

import ctypes
import fcntl
import grp
import json
import os
import re
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from edgekit.devices.doctor.finding import Finding, failed, from_error, missing, ok
from edgekit.devices.profiles import Profile
from edgekit.devices.publish.ring import RING_BYTES
from edgekit.devices.sources.microphone import Microphone
from edgekit.errors import SourceError

# linux/videodev2.h
_VIDIOC_QUERYCAP, _CAPABILITY_BYTES, _DEVICE_CAPS_AT = 0x80685600, 104, 88
_CAPTURES = 0x0000_0001 | 0x0000_1000  # V4L2_CAP_VIDEO_CAPTURE, and _MPLANE
# Parts of a Raspberry Pi's camera module, which only libcamera can put together.
_PARTS = re.compile(r"unicam|rp1-cfe|bcm2835-isp|pispbe|bcm2835-codec|rpi-hevc|rpivid")
_CHILD_S = 20.0
# A Raspberry Pi slows down from 80 °C on, others from 85 or more.
HOT_C = 80.0
_SMALL_BYTES = 100 << 20
# adjtimex(2)
_TIME_ERROR = 5
# https://www.raspberrypi.com/documentation/computers/os.html#get_throttled; 16 bits higher: since it was started.
_THROTTLED = {
    0: "too little voltage",
    1: "clock capped",
    2: "throttled",
    3: "soft limit of temperature",
}


def cameras(profile: Profile, root: Path = Path("/"), *, needed: tuple[str, ...] = ()) -> Iterator[Finding]:
    """Those that OpenCV can open, and on a Raspberry Pi those on a ribbon cable.

    Args:
        needed: the sources of streams; a camera among them that is not here is missing.
    """
    wanted = {source: _device(source, root) for source in needed}
    found = set()
    for entry in sorted((root / "sys/class/video4linux").glob("video*"), key=lambda path: int(path.name[5:] or 0)):
        device, title = root / "dev" / entry.name, _text(entry / "name")
        if not _PARTS.search(title) and (finding := _camera(device, title, device in wanted.values())):
            found.add(device)
            yield finding
    csi_needed = any(source.startswith("camera:csi") for source in needed)
    if profile.name.startswith("raspberry-pi"):
        csi = _csi(csi_needed)
        found.update([Path("csi")] if csi.status == "ok" else [])
        yield csi
    elif csi_needed:
        yield _csi_by_opencv()
    hint = profile.hints.get("camera", "plug one in; `v4l2-ctl --list-devices` lists those the system knows")
    absent = [source for source, device in wanted.items() if device and device not in found]
    for source in absent:
        yield missing(source, "there is no such camera", hint, needed=True)
    if not found and not absent:
        yield missing("camera", "none", hint)


def _device(source: str, root: Path) -> Path | None:
    """Of a source that is a V4L2 device; its name may be a link, as those in ``/dev/v4l/by-id``."""
    name = source.removeprefix("camera:")
    if source.startswith("camera:") and name.isdecimal():
        return root / "dev" / f"video{int(name)}"
    return (root / name[1:]).resolve() if name.startswith("/dev/") else None


def _camera(device: Path, title: str, needed: bool) -> Finding | None:
    """None for what is no camera: coders, and the side channel that a USB camera has for metadata."""
    check = f"camera:{device.name[5:]}"
    try:
        handle = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except PermissionError:
        mend = f"sudo usermod -aG {_group(device)} {_user()}, and log in again"
        return failed(check, f"{title}: may not be opened", mend, needed=needed)
    except OSError as error:
        return failed(check, f"{title}: cannot be opened ({error.strerror})", "plug it in again", needed=needed)
    answer = bytearray(_CAPABILITY_BYTES)
    try:
        fcntl.ioctl(handle, _VIDIOC_QUERYCAP, answer)
    except OSError as error:
        return failed(check, f"{title}: does not answer ({error.strerror})", "plug it in again", needed=needed)
    finally:
        os.close(handle)
    (capabilities,) = struct.unpack_from("=I", answer, _DEVICE_CAPS_AT)
    return ok(check, f"{title}, {device}", needed=needed) if capabilities & _CAPTURES else None


def _csi(needed: bool) -> Finding:
    check = "camera:csi"
    if not find_spec("picamera2"):
        return missing(
            check,
            "picamera2 is not here",
            "apt-get install python3-picamera2, and use a venv made with --system-site-packages",
            needed=needed,
        )
    code = "import json; from picamera2 import Picamera2; print(json.dumps(Picamera2.global_camera_info()))"
    try:
        answer = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, errors="replace", timeout=_CHILD_S
        )
    except subprocess.TimeoutExpired:
        return failed(check, "libcamera does not answer", "restart the device", needed=needed)
    if answer.returncode:
        why = (answer.stderr.strip().splitlines() or ["it says nothing"])[-1]
        mend = "try `rpicam-hello --list-cameras`"
        if "numpy.dtype" in why:  # https://github.com/raspberrypi/picamera2/issues/1088
            mend = "pip install 'numpy<2' 'opencv-python-headless<4.12'"
        return failed(check, f"picamera2 fails ({why})", mend, needed=needed)
    models = [
        camera.get("Model", "?")
        for camera in json.loads(answer.stdout.splitlines()[-1])
        if "usb" not in camera.get("Id", "")
    ]
    if not models:
        return missing(check, "none on a ribbon cable", "check the cable, both ends", needed=needed)
    return ok(check, ", ".join(models), needed=needed)


def _csi_by_opencv() -> Finding:
    """That of a Jetson: whether OpenCV has what it takes."""
    from edgekit.devices.sources.cameras import camera_opener

    try:
        camera_opener("camera:csi", None)
    except SourceError as error:
        return from_error("camera:csi", error, needed=True)
    return ok("camera:csi", "by GStreamer, which this OpenCV has", needed=True)


def microphone(profile: Profile, name: str = "", *, needed: bool = False) -> Finding:
    """Records a moment of sound. ``name`` as of :class:`Microphone`."""
    check = f"mic:{name}" if name else "mic"
    recording = Microphone(name, profile.audio.microphone)
    try:
        recording.open()
        samples = recording.read().samples
    except SourceError as error:
        finding = from_error(check, error, needed=needed)
        if re.match("there is no|a microphone needs", error.what):
            mend = profile.hints.get("microphone", finding.mend) if "there is no" in error.what else finding.mend
            return missing(check, finding.detail, mend, needed=needed)
        return finding
    finally:
        recording.close()
    what = f"{recording.name}, {recording.sample_rate_hz:,} Hz, {recording.channels} channels"
    peak = int(np.abs(samples.astype(np.int32)).max(initial=0))
    heard = f"{20 * np.log10(peak / 32768):.0f} dB at most" if peak else "but silence only: is it muted?"
    return ok(check, f"{what}, {heard}", needed=needed)


def memory(root: Path = Path("/")) -> Finding:
    fields = dict(re.findall(r"^(\w+): +(\d+) kB", _text(root / "proc/meminfo"), re.MULTILINE))
    if "MemAvailable" not in fields:
        return missing("memory", "the system does not tell")
    available, total = (int(fields[key]) << 10 for key in ("MemAvailable", "MemTotal"))
    detail = f"{available / 1e6:,.0f} of {total / 1e6:,.0f} MB are free"
    if available < _SMALL_BYTES:
        return failed("memory", detail, "end what takes it, or add swap")
    return ok("memory", detail)


def shared_memory(streams: int = 1, folder: Path = Path("/dev/shm")) -> Finding:
    """Room for what a stream has just predicted, which outlasts its process there."""
    check = "shared memory"
    try:
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return failed(check, f"{folder}: {error.strerror}", f"mount a tmpfs there: {folder}")
    detail = f"{free / 1e6:,.0f} MB free in {folder}"
    if free < streams * RING_BYTES or not os.access(folder, os.W_OK):
        return failed(check, f"{detail}, or it may not be written", f"free {streams * RING_BYTES / 1e6:.0f} MB there")
    return ok(check, detail)


def clock() -> Finding:
    """Whether it is kept by a time server: predictions carry the time."""
    state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(512))  # zeros: only to ask
    if state < 0:
        return missing("clock", "the system does not tell whether it is right")
    if state == _TIME_ERROR:
        return failed("clock", "is not set by a time server", "sudo timedatectl set-ntp true, and have a network")
    return ok("clock", "set by a time server")


def heat(profile: Profile, root: Path = Path("/")) -> Iterator[Finding]:
    """The processor's temperature, and on a Raspberry Pi whether it was slowed down."""
    temperature_c = profile.cpu_temp_c(root)
    if temperature_c is None:
        yield missing("temperature", "the system does not tell")
    elif temperature_c >= HOT_C:
        yield failed("temperature", f"{temperature_c:.0f} °C: it slows down", "cool it, or take fewer frames a second")
    else:
        yield ok("temperature", f"{temperature_c:.0f} °C")
    if program := shutil.which("vcgencmd"):
        yield _throttled(program)


def _throttled(program: str) -> Finding:
    check = "supply"
    try:
        answer = subprocess.run([program, "get_throttled"], capture_output=True, text=True, timeout=5).stdout
        bits = int(answer.strip().removeprefix("throttled="), 16)
    except (OSError, subprocess.TimeoutExpired, ValueError):
        return failed(check, "vcgencmd does not tell", f"sudo usermod -aG video {_user()}, and log in again")
    told = [what for bit, what in _THROTTLED.items() if bits >> bit & 1]
    told += [f"since it was started: {what}" for bit, what in _THROTTLED.items() if bits >> bit + 16 & 1]
    if told:
        return failed(check, ", ".join(told), "use the supply made for it, and cool it")
    return ok(check, "enough, and never slowed down since it was started")


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _group(device: Path) -> str:
    try:
        return grp.getgrgid(device.stat().st_gid).gr_name
    except (OSError, KeyError):
        return "video"


def _user() -> str:
    return os.environ.get("USER", "USER")
