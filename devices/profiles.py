"""What is known of a board: which delegates to try, how many threads, what its camera is asked for, where it is hot."""

from __future__ import annotations

import difflib
import fnmatch
import os
import platform
import re
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from edgekit.devices.toml_file import TomlFile
from edgekit.errors import EdgekitError

FOLDER = Path(__file__).with_name("profiles")
# Of a machine that no other profile is for.
GENERIC = "generic"
# Types of thermal zones that are of the processor, where the profile's places give nothing.
_OF_CPU = re.compile(r"cpu|pkg|soc", re.IGNORECASE)


class CameraHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a camera is asked for; None: what it gives by itself. It may give something else."""

    size_wh: tuple[int, int] | None = None
    fps: float | None = None
    fourcc: str | None = None


class AudioHints(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``microphone``: a part of the name of the one to prefer where any will do and such a one is there."""

    microphone: str = ""


class Match(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a profile is for: one of these is true. ``compatible`` are strings of the device tree, ``usb`` devices
    (``vendor:product``), ``machine`` what ``uname -m`` says."""

    compatible: tuple[str, ...] = ()
    usb: tuple[str, ...] = ()
    machine: tuple[str, ...] = ()


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A kind of device.

    Attributes:
        title: its name as people say it.
        delegates: in the order in which ``auto`` tries them.
        threads: for the CPU kernels of all streams together; no more than this process may use.
        temperature: where the processor's is read, the first place that gives one: ``zone:TYPE``, a thermal zone of
            this type, ``hwmon:NAME``, a sensor of this driver, or files; with wildcards, in thousandths of a degree.
        hints: how to mend what is missing on it, by ``coral``, ``gpu``, ``camera`` and ``microphone``.
    """

    name: str = ""
    title: str
    match: Match = Match()
    delegates: tuple[str, ...] = ("cpu",)
    threads: int = 1
    camera: CameraHints = CameraHints()
    audio: AudioHints = AudioHints()
    temperature: tuple[str, ...] = ()
    hints: dict[str, str] = {}

    def cpu_temp_c(self, root: Path = Path("/")) -> float | None:
        """The processor's temperature, the highest where there are several; None where the system does not tell."""
        for place in self.temperature:
            if found := list(_read_c(_files(root, place))):
                return max(found)
        zones = (zone for zone in root.glob("sys/class/thermal/thermal_zone*/type") if _OF_CPU.search(_text(zone)))
        return max(_read_c(zone.with_name("temp") for zone in zones), default=None)


def detect(root: Path = Path("/")) -> Profile:
    """The profile of this machine: by its device tree, else by an accelerator on USB, else by its kind of processor.

    Args:
        root: where ``/proc`` and ``/sys`` are looked for.
    """
    compatible = _text(root / "proc/device-tree/compatible").split("\0")
    usb = [
        f"{_text(vendor)}:{_text(vendor.with_name('idProduct'))}"
        for vendor in root.glob("sys/bus/usb/devices/*/idVendor")
    ]
    profiles = [load_profile(name) for name in profile_names()]
    for kind, found in (("compatible", compatible), ("usb", usb), ("machine", [platform.machine()])):
        for profile in profiles:
            if any(fnmatch.filter(found, pattern) for pattern in getattr(profile.match, kind)):
                return profile
    return load_profile(GENERIC)


def load_profile(name: str) -> Profile:
    """The profile of that name, or one in a ``.toml`` file of one's own.

    Raises:
        EdgekitError: there is none, or the file is not a profile.
    """
    names = profile_names()
    if name not in names and not name.endswith(".toml"):
        close = difflib.get_close_matches(name, names, 1)
        mend = f"did you mean {close[0]!r}?" if close else "give one of these, or the path of a .toml"
        raise EdgekitError(f"profile {name!r}", expected=" or ".join([", ".join(names[:-1]), names[-1]]), mend=mend)
    file = TomlFile(FOLDER / f"{name}.toml" if name in names else name, "profile")
    profile = file.convert(Profile, {"[match]": Match, "[camera]": CameraHints, "[audio]": AudioHints}, _EXPECTED)
    cores = len(os.sched_getaffinity(0))
    return msgspec.structs.replace(profile, name=Path(name).stem, threads=min(profile.threads, cores))


def profile_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


_EXPECTED = {
    "name": "nothing: it is that of the file",
    "title": "a name as people say it",
    "match": "a table",
    "delegates": "a list of cpu, coral and gpu",
    "threads": "a whole number, 1 or more",
    "camera": "a table",
    "size_wh": "[width, height] in pixels",
    "fps": "frames a second",
    "fourcc": "four characters, such as MJPG",
    "audio": "a table",
    "microphone": "a part of its name",
    "temperature": "a list of places",
    "hints": "a table of texts",
    **dict.fromkeys(("compatible", "usb", "machine"), "a list of patterns"),
}


def _text(path: Path) -> str:
    """Empty where there is no such file, or it cannot be read."""
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""


def _files(root: Path, place: str) -> Iterator[Path]:
    """Where a place of ``temperature`` is now; numbers of zones and sensors change from one start to the next."""
    kind, colon, pattern = place.partition(":")
    if not colon:
        yield from root.glob(place.lstrip("/"))
    elif kind == "zone":
        for named in root.glob("sys/class/thermal/thermal_zone*/type"):
            if fnmatch.fnmatchcase(_text(named), pattern):
                yield named.with_name("temp")
    else:
        for named in root.glob("sys/class/hwmon/hwmon*/name"):
            if fnmatch.fnmatchcase(_text(named), pattern):
                yield from named.parent.glob("temp*_input")


def _read_c(files: Iterable[Path]) -> Iterator[float]:
    for file in files:
        try:
            degrees = int(_text(file)) / 1000
        except ValueError:  # a sensor that is asleep
            continue
        if -40 < degrees < 150:  # a Jetson says -256 for a part that is switched off
            yield round(degrees, 1)
