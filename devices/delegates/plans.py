"""What ``--delegate`` means on this machine: what is tried, in which order, what has to be there for it, and how to
mend what is not."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edgekit import bundle as bundles
from edgekit import gpu, runtimes
from edgekit.bundle import Bundle, File
from edgekit.edge_tpu import COMPILED
from edgekit.errors import BundleError, EdgekitError

EDGE_TPU_LIBRARY = "libedgetpu.so.1"
VULKAN_LIBRARY = "libvulkan.so.1"
# In which order ``auto`` tries them where no profile says otherwise.
ORDER = ("coral", "gpu", "cpu")
# Where the Vulkan loader looks for the descriptions of drivers, of
# https://github.com/KhronosGroup/Vulkan-Loader/blob/main/docs/LoaderDriverInterface.md, "Driver Discovery on Linux".
_DRIVER_VARIABLES = ("VK_DRIVER_FILES", "VK_ICD_FILENAMES")
_DRIVER_FOLDERS = (
    "~/.config",
    "/etc/xdg",
    "/usr/local/etc",
    "/etc",
    "~/.local/share",
    "/usr/local/share",
    "/usr/share",
)


class AbsentError(EdgekitError):
    """What a delegate needs is not on this machine, or the model is not one for it."""


@dataclass(frozen=True)
class Plan:
    """How a model is loaded with one delegate.

    Attributes:
        name: ``cpu``, ``coral``, ``gpu`` or the name of a library.
        file: the model: the bundle, or the one compiled for the Edge TPU.
        library: the delegate library, as the dynamic loader takes it; empty for ``cpu`` and ``gpu``.
        options: what the library is told.
        mend: what to do when it fails.
    """

    name: str
    file: File
    library: str = ""
    options: dict[str, str] = field(default_factory=dict)
    mend: str = ""


def candidates(bundle: Bundle, delegate: str, order: Iterable[str] = ORDER) -> tuple[str, ...]:
    """What is tried for ``delegate``, in this order: each takes over from the one before it.

    Raises:
        BundleError: it is no delegate.
    """
    if delegate not in ("auto", *ORDER) and not _is_library(delegate):
        raise BundleError(
            f"delegate {delegate!r}",
            expected="auto, cpu, coral, gpu or the path of a delegate library",
            mend="give one",
        )
    if _compiled(bundle.file) and delegate in ("auto", "coral"):
        return ("coral",)  # nothing else can run it
    wanted = [*order] if delegate == "auto" else [delegate]
    return tuple(dict.fromkeys([*wanted, "cpu"]))


def plan(name: str, bundle: Bundle, runtime: str | None = None, *, auto: bool = False) -> Plan:
    """How ``bundle`` is loaded with the delegate ``name``, one of :func:`candidates`.

    Raises:
        AbsentError: what it needs is not here, or with ``auto``, would not take the model as far as its rules are
            known. Whether what is here works is known when it is loaded only.
        BundleError: the model compiled for it is not whole.
    """
    if name == "cpu":
        return Plan(name, bundle.file)
    if name == "coral":
        return _coral(bundle)
    if name == "gpu":
        return _gpu(bundle, runtime, auto)
    library, *options = name.split(",")
    given = Path(library).expanduser()
    if given.is_file():
        library = str(given.resolve())
    elif "/" in library or not is_installed(library):
        raise AbsentError(f"delegate {library}", expected="a library", got="no such file", mend="check the path")
    return Plan(
        given.name,
        bundle.file,
        library,
        dict(map(_option, options)),
        "check that it fits this runtime and this machine",
    )


def compiled_path(path: Path) -> Path:
    """Where the model compiled for the Edge TPU lies, as Coral's compiler names it."""
    return path.with_name(f"{path.stem}_edgetpu.tflite")


def is_installed(library: str) -> bool:
    """Whether the dynamic loader would find ``library``, such as ``libvulkan.so.1``. It is not loaded: it is foreign
    code."""
    folders = [
        *filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")),
        "/lib",
        "/usr/lib",
        "/lib64",
        "/usr/lib64",
    ]
    if multiarch := getattr(sys.implementation, "_multiarch", ""):
        folders += [f"/lib/{multiarch}", f"/usr/lib/{multiarch}"]
    if any(Path(folder, library).is_file() for folder in folders):
        return True
    try:
        return f"/{library}\0".encode() in Path("/etc/ld.so.cache").read_bytes()
    except OSError:
        return False


def vulkan_drivers() -> list[Path]:
    """The descriptions of the Vulkan drivers that are installed."""
    for variable in _DRIVER_VARIABLES:
        if given := os.environ.get(variable):
            return [path for path in map(Path, given.split(":")) if path.exists()]
    folders = (Path(folder, "vulkan/icd.d").expanduser() for folder in _DRIVER_FOLDERS)
    return [path for folder in folders for path in sorted(folder.glob("*.json"))]


def _compiled(file: File) -> bool:
    return any(operator.name == COMPILED for operator in file.model.operators)


def _is_library(delegate: str) -> bool:
    path = delegate.partition(",")[0]
    return "/" in path or ".so" in Path(path).suffixes


def _option(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise BundleError(f"delegate option {text!r}", expected="KEY=VALUE", mend="give PATH.so,KEY=VALUE,…")
    return key, value


def _coral(bundle: Bundle) -> Plan:
    file = bundle.file
    if not _compiled(file):
        path = compiled_path(file.path)
        if not path.exists():
            raise AbsentError(
                f"delegate coral: no {path.name} beside the bundle",
                mend="edgetpu_compiler makes it of the int8 bundle, `edgekit convert --target coral` both",
            )
        file = bundles.read_file(path)
    if not is_installed(EDGE_TPU_LIBRARY):
        raise AbsentError(
            f"delegate coral: {EDGE_TPU_LIBRARY} is not installed",
            mend="install libedgetpu1-std (https://coral.ai/docs/accelerator/get-started)",
        )
    # Google's library is of 2021, and crashes in later runtimes: google-coral/edgetpu issue 812.
    mend = (
        "check that the Edge TPU is plugged in, that this user may use it (group plugdev), and that the library was "
        "built for this runtime"
    )
    return Plan("coral", file, EDGE_TPU_LIBRARY, mend=mend)


def _gpu(bundle: Bundle, runtime: str | None, auto: bool) -> Plan:
    if runtime not in (None, "litert") or "litert" not in runtimes.installed():
        raise AbsentError("delegate gpu: only LiteRT has it", mend="pip install ai-edge-litert")
    if len(bundle.file.model.inputs) > 1:
        raise AbsentError("delegate gpu: a model that streams keeps its states on the CPU", mend="use --delegate cpu")
    if not is_installed(VULKAN_LIBRARY):
        raise AbsentError(f"delegate gpu: {VULKAN_LIBRARY} is not installed", mend="apt-get install libvulkan1")
    if not vulkan_drivers():
        raise AbsentError(
            "delegate gpu: no Vulkan driver is installed",
            mend="apt-get install mesa-vulkan-drivers, or the GPU maker's",
        )
    refusals = gpu.refusals(bundle.file.model) if auto else []
    if left := [(op.name, reason) for op, reason in zip(bundle.file.model.operators, refusals, strict=False) if reason]:
        operator, reason = left[0]
        raise AbsentError(
            f"delegate gpu takes whole models, and of this one {len(left)} of {len(refusals)} operators not "
            f"({operator}: {reason})",
            mend="`edgekit inspect` names them",
        )
    return Plan("gpu", bundle.file, mend="check the driver with vulkaninfo")
