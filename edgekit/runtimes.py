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
    """Name and version of each runtime that is installed, the preferred one first. Imports none."""
    found = {}
    for name, (module, distribution) in RUNTIMES.items():
        if importlib.util.find_spec(module.partition(".")[0]):
            try:
                found[name] = importlib.metadata.version(distribution)
            except importlib.metadata.PackageNotFoundError:
                found[name] = "unknown"
    return found


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
        try:
            return candidate, importlib.import_module(RUNTIMES[candidate][0])
        except ImportError as error:
            failures.append(f"{candidate} ({error})")
        except KeyError:
            raise RuntimeMissingError(f"runtime {candidate}", expected=" or ".join(RUNTIMES)) from None
    raise RuntimeMissingError(
        "no TFLite runtime loads: " + ", ".join(failures), mend=f"pip install {RUNTIMES[candidates[0]][1]}"
    )
