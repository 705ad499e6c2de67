"""EdgeKit: image and sound models on small devices, from a Keras model to predictions over MQTT."""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgekit.errors import (
    BrokerError,
    BundleError,
    ConversionError,
    EdgekitError,
    InferenceError,
    RuntimeMissingError,
    SourceError,
)

if TYPE_CHECKING:
    from edgekit.converters.convert import convert
    from edgekit.converters.custom_ops import custom_op
    from edgekit.custom_ops import CustomOpResolver, kernel
    from edgekit.decode import Prediction
    from edgekit.devices.bench import bench
    from edgekit.devices.doctor.doctor import doctor
    from edgekit.devices.interpreter import load
    from edgekit.devices.run import run, stream
    from edgekit.devices.soak.soak import soak
    from edgekit.inspection import inspect
    from edgekit.subscriber import Subscriber

__version__ = "0.1.0"

__all__ = [
    "BrokerError",
    "BundleError",
    "ConversionError",
    "CustomOpResolver",
    "EdgekitError",
    "InferenceError",
    "Prediction",
    "RuntimeMissingError",
    "SourceError",
    "Subscriber",
    "bench",
    "convert",
    "custom_op",
    "doctor",
    "inspect",
    "kernel",
    "load",
    "run",
    "soak",
    "stream",
]

# Imported when first asked for: `import edgekit` loads neither TensorFlow, OpenCV nor a TFLite runtime.
_LAZY = {
    "CustomOpResolver": "edgekit.custom_ops",
    "Prediction": "edgekit.decode",
    "Subscriber": "edgekit.subscriber",
    "bench": "edgekit.devices.bench",
    "convert": "edgekit.converters.convert",
    "custom_op": "edgekit.converters.custom_ops",
    "doctor": "edgekit.devices.doctor.doctor",
    "inspect": "edgekit.inspection",
    "kernel": "edgekit.custom_ops",
    "load": "edgekit.devices.interpreter",
    "run": "edgekit.devices.run",
    "soak": "edgekit.devices.soak.soak",
    "stream": "edgekit.devices.run",
}

# In a checkout the two sides lie beside this folder, in a wheel inside it.
if not (Path(__file__).parent / "devices").is_dir():
    __path__.append(str(Path(__file__).parent.parent))


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_LAZY[name]), name)
    except ModuleNotFoundError as error:
        extra = "[convert]" if name in ("convert", "custom_op") else ""
        raise EdgekitError(
            f"edgekit.{name} needs the package {error.name}", mend=f"pip install 'edgekit{extra}'"
        ) from error
