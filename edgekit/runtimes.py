"""The TFLite runtimes that may be installed, the one we prefer first."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from dataclasses import dataclass
from types import ModuleType

from edgekit.errors import RuntimeMissingError

# name -> (module with ``Interpreter``, distribution)
RUNTIMES = {
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite-runtime": ("tflite_runtime.interpreter", "tflite-runtime"),
}

# A Python with tflite-runtime, where this one cannot have it: its wheel needs NumPy 1 and Python 3.11 at most.
PYTHON_VARIABLE = "EDGEKIT_TFLITE_RUNTIME_PYTHON"


@dataclass(frozen=True)
class Runtime:
    """A TFLite runtime on this machine: its name, its version and the Python that has it."""

    name: str
    version: str
    python: str


def find() -> dict[str, Runtime]:
    """The runtimes of this Python, and tflite-runtime of the one that ``EDGEKIT_TFLITE_RUNTIME_PYTHON`` names, by name,
    the preferred one first. Imports none.

    Raises:
        RuntimeMissingError: that Python does not have it.
    """
    found = {name: Runtime(name, version, sys.executable) for name, version in installed().items()}
    if python := os.environ.get(PYTHON_VARIABLE):
        ask = (
            "import sys; sys.path[:] = [p for p in sys.path if p]; "
            "import importlib.metadata as m; print(m.version('tflite-runtime'))"
        )
        try:
            answer = subprocess.run([python, "-c", ask], capture_output=True, text=True, timeout=60)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise RuntimeMissingError(
                f"{PYTHON_VARIABLE}={python} does not run ({error})", mend="name a Python there, or unset it"
            ) from error
        if answer.returncode:
            raise RuntimeMissingError(
                f"{PYTHON_VARIABLE}={python} has no tflite-runtime", mend="install it there or unset it"
            )
        found["tflite-runtime"] = Runtime("tflite-runtime", answer.stdout.strip(), python)
    return found


def installed() -> dict[str, str]:
    """Name and version of each runtime that is installed and fits its surroundings, the preferred one first. Imports
    none."""
    found = {}
    for name, (module, distribution) in RUNTIMES.items():
        if importlib.util.find_spec(module.partition(".")[0]) and not _misfit(name):
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
    return found


def _misfit(name: str) -> str:
    """Why an installed runtime cannot work here; empty if nothing is known against it."""
    numpy = importlib.metadata.version("numpy")
    if name == "tflite-runtime" and int(numpy.partition(".")[0]) > 1:
        # It imports, and its first call fails with a SystemError.
        return f"its wheel needs NumPy 1, got {numpy}: pip install 'numpy<2' 'opencv-python-headless<4.12'"
    return ""


def load(name: str | None = None) -> tuple[str, ModuleType]:
    """Imports the runtime ``name``, or the preferred one that is installed.

    Returns:
        Its name, and its module with ``Interpreter`` and ``load_delegate``.

    Raises:
        RuntimeMissingError: it is not installed, or does not load.
    """
    candidates = [name] if name else list(installed()) or list(RUNTIMES)
    failures = []
    for candidate in candidates:
        if candidate not in RUNTIMES:
            raise RuntimeMissingError(f"runtime {candidate}", expected=" or ".join(RUNTIMES), mend="give one of these")
        try:
            module = importlib.import_module(RUNTIMES[candidate][0])
        except ImportError as error:
            failures.append(f"{candidate} ({error})")
        else:
            if misfit := _misfit(candidate):
                failures.append(f"{candidate} ({misfit})")
                continue
            return candidate, module
    raise RuntimeMissingError(
        "no TFLite runtime loads: " + ", ".join(failures), mend=f"pip install {RUNTIMES[candidates[0]][1]}"
    )
