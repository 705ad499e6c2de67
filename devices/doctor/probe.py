"""Checks of what models run on: runtimes, delegates and kernels, each in a process of its own."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from edgekit import custom_ops, runtimes
from edgekit.devices.config import StreamConfig
from edgekit.devices.delegates.plans import EDGE_TPU_LIBRARY, AbsentError, plan
from edgekit.devices.doctor.finding import Finding, failed, from_error, missing, ok
from edgekit.devices.profiles import Profile
from edgekit.devices.stream import read_bundle
from edgekit.errors import EdgekitError, RuntimeMissingError
from edgekit.native_ops import listed_versions
from edgekit.runtimes import Runtime
from edgekit.sandbox import Sandbox, SandboxError

# One convolution, by scripts/make_probe.
PROBE = Path(__file__).with_name("probe.tflite")
# A runtime or a delegate that needs longer to load, or for one call, hangs.
LOAD_S = 20.0


def limit_s(streams: int) -> float:
    """Longer than :func:`models` may take: two answers of each runtime, delegate and model of a stream."""
    return 2 * LOAD_S * (len(runtimes.RUNTIMES) + 2 + streams) + 60


def models(profile: Profile, streams: Iterable[StreamConfig]) -> Iterator[Finding]:
    """One after the other: a small device has not the memory for several at once."""
    try:
        found = runtimes.find()
        if not found:
            runtimes.load()  # says what to install
    except RuntimeMissingError as error:
        yield from_error("runtime", error, needed=True)
        return
    preferred = next(iter(found.values()))
    for runtime in found.values():
        yield _try(f"runtime {runtime.name}", runtime, "cpu", needed=runtime is preferred)
    wanted = {stream.delegate for stream in streams}
    for delegate in ("coral", "gpu"):
        hint = profile.hints.get(delegate, "")
        yield _try(f"delegate {delegate}", preferred, delegate, hint, needed=delegate in wanted)
    for stream in streams:
        yield from _bundle(stream, preferred)


def _try(check: str, runtime: Runtime, delegate: str, hint: str = "", *, needed: bool) -> Finding:
    """Runs one convolution."""
    if delegate == "gpu" and runtime.name != "litert":
        return missing(check, f"{runtime.name} has none", "pip install ai-edge-litert", needed=needed)
    library = EDGE_TPU_LIBRARY if delegate == "coral" else delegate
    try:
        with (
            Sandbox(runtime, PROBE, library, timeout_s=LOAD_S) as sandbox,
            tempfile.TemporaryDirectory(prefix="edgekit-") as folder,
        ):
            given, made = Path(folder, "given.npy"), Path(folder, "made.npy")
            x = np.arange(12, dtype=np.float32).reshape(1, 2, 2, 3)
            np.save(given, x)
            sandbox.replay(given, made)
            y = np.load(made).reshape(2, 2, 2)
            right = np.allclose(y, np.stack([x[0, ..., 0] + x[0, ..., 2], x[0, ..., 1] - x[0, ..., 2]], -1), atol=1e-2)
            how = f", with{'' if sandbox.pieces else 'out'} XNNPACK" if delegate == "cpu" else ""
    except SandboxError as error:
        return _not_loaded(check, error.what, delegate, hint, needed=needed)
    if not right:
        return failed(check, f"{runtime.version} computes wrongly", "install another version", needed=needed)
    if delegate == "coral":
        return ok(check, f"{library} loads and has an Edge TPU", needed=needed)
    return ok(check, f"{runtime.name} {runtime.version} computes rightly{how}", needed=needed)


def _not_loaded(check: str, why: str, delegate: str, hint: str, *, needed: bool) -> Finding:
    if delegate == "coral":
        if "cannot open shared object" in why:
            mend = hint or "install libedgetpu1-std"
            return missing(check, f"there is no {EDGE_TPU_LIBRARY}", mend, needed=needed)
        mend = "plug the Edge TPU in, and let the user into the group plugdev (USB) or apex (PCIe)"
        return failed(check, why, mend, needed=needed)
    if delegate == "gpu":
        if "Vulkan" in why:
            return missing(check, why, hint or "install the GPU's Vulkan driver, and libvulkan1", needed=needed)
        return failed(check, why, "check the GPU's driver: `vulkaninfo --summary`", needed=needed)
    return failed(check, why, "install another version of it", needed=needed)


def _bundle(stream: StreamConfig, runtime: Runtime) -> Iterator[Finding]:
    """Reads the stream's bundle, and runs it once with the delegate that is asked for."""
    check = f"bundle of {stream.name}"
    try:
        bundle = read_bundle(stream)
    except EdgekitError as error:
        yield from_error(check, error, needed=True)
        return
    yield ok(check, f"{stream.bundle}, {len(bundle.labels)} classes", needed=True)
    check, name = f"model of {stream.name}", "cpu" if stream.delegate == "auto" else stream.delegate
    try:
        planned = plan(name, bundle, runtime.name)
        library = planned.library or planned.name
        with Sandbox(runtime, planned.file.path, library, ops=stream.ops, timeout_s=LOAD_S) as sandbox:
            ms = float(sandbox.invoke(2).min())
            share = ""
            if sandbox.pieces is not None:
                share = f", {sum(map(len, sandbox.pieces))} of {len(planned.file.model.operators)} operators delegated"
    except AbsentError as error:
        yield missing(check, error.what, error.mend, needed=True)
    except EdgekitError as error:
        yield from_error(check, error, needed=True)
    else:
        yield ok(check, f"runs on {planned.name} in {runtime.name}, {ms:.2f} ms{share}", needed=True)


def operators() -> Finding:
    check = "operators"
    library = custom_ops.find_library()
    if library is None:
        return missing(check, "EdgeKit's own are not here", custom_ops.NOT_BUILT.partition(": ")[2])
    try:
        return ok(check, ", ".join(sorted(listed_versions(library))))
    except EdgekitError as error:
        return from_error(check, error)
