"""``edgekit.run`` in a thread of a test, and what it is to run."""

from __future__ import annotations

import shutil
import threading
from pathlib import Path
from typing import Any

import edgekit
from edgekit.errors import EdgekitError


class Running:
    """``edgekit.run`` in a thread, with what its streams predicted."""

    def __init__(self, **options: Any) -> None:
        self.stop, self.reload, self.error = threading.Event(), threading.Event(), ""
        self.counts: Any = None
        self.predictions: list[Any] = []
        self._thread = threading.Thread(target=self._run, kwargs=options, daemon=True)
        self._thread.start()

    def _run(self, **options: Any) -> None:
        try:
            self.counts = edgekit.run(
                stop=self.stop, reload=self.reload, on_prediction=self.predictions.append, **options
            )
        except EdgekitError as error:
            self.error = str(error)

    def labels(self, stream: str = "main") -> list[str]:
        return [p.predictions[0].label for p in self.predictions.copy() if p.stream == stream and p.predictions]

    def end(self) -> None:
        self.stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()


def replace(source: Path, target: Path) -> None:
    """In one step, and with another time than before."""
    beside = target.with_suffix(".new")
    shutil.copyfile(source, beside)
    beside.replace(target)


def settings(broker: str, *streams: str) -> str:
    return "\n".join([f'device_id = "pi"\nbroker = "{broker}"', *streams])


def of_stream(name: str, bundle: Path, source: Path | str, more: str = "") -> str:
    return f'[[stream]]\nname = "{name}"\nbundle = "{bundle}"\nsource = "{source}"\nloop = true\nmax_fps = 50\n{more}\n'
