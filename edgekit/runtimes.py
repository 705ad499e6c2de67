"""The TFLite runtimes that may be installed, the one we prefer first."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from types import ModuleType

from edgekit.errors import RuntimeMissingError

# name -> (module with ``Interpreter``, distribution)
RUNTIMES = {
    "litert": ("ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite-runtime": ("tflite_runtime.interpreter", "tflite-runtime"),
}


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
