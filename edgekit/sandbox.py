"""A model in a TFLite runtime, in a process of its own: to try, to compare and to time it."""

from __future__ import annotations

import itertools
import json
import logging
import os
import select
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import flatbuffer
from edgekit.custom_ops import CustomOpResolver
from edgekit.errors import BundleError, EdgekitError
from edgekit.runtimes import RUNTIMES, Runtime

logger = logging.getLogger(__name__)

# A runtime that says nothing for so long hangs, if nothing else was asked for.
STALL_TIMEOUT_S = 120.0
# How long a model runs before it is another's turn: long enough to fill the caches again, short beside what the machine
# else does.
TURN_S = 0.1


class SandboxError(EdgekitError):
    """The runtime cannot load or run the model; ``what`` says how it failed."""


class Sandbox:
    """A loaded model. Use as a context manager; ends with the process.

    Args:
        runtime: the runtime, and the Python that has it.
        path: the ``.tflite``.
        delegate: ``cpu`` (XNNPACK), ``none``, ``gpu`` (LiteRT's GPU accelerator) or the path of a delegate library.
        threads: threads of the CPU kernels.
        ops: files with kernels of custom operators beside EdgeKit's own, as :class:`CustomOpResolver` takes them.
        timeout_s: a runtime that says nothing for so long hangs; None takes two minutes.

    Attributes:
        pieces: the operators in each piece that a delegate (on the CPU: XNNPACK) took, by their position in the graph;
            custom operators that have a kernel are in none. None where the runtime does not tell.
        peak_bytes: memory at its most beyond what the bare runtime had; known after :meth:`invoke`, 0 where the system
            does not tell.

    Raises:
        SandboxError: it does not load.
    """

    def __init__(
        self,
        runtime: Runtime,
        path: str | os.PathLike[str],
        delegate: str = "cpu",
        threads: int = 1,
        ops: Sequence[str | os.PathLike[str]] = (),
        timeout_s: float | None = None,
    ) -> None:
        self._timeout_s = STALL_TIMEOUT_S if timeout_s is None else timeout_s
        self._resolver = CustomOpResolver(*ops)
        self._model = _read(path)
        operators = self._model.operators if self._model else []
        resolved = {i for i, op in enumerate(operators) if op.custom and op.name in self._resolver.versions}
        if self._model and (problem := self._resolver.outdated(self._model)):
            raise SandboxError(f"it needs {problem}")
        self._log = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self._child = subprocess.Popen(
            [
                runtime.python,
                str(Path(__file__).with_name("sandboxed.py")),
                RUNTIMES[runtime.name][0],
                os.fspath(path),
                delegate,
                str(threads),
                *([os.fspath(Path(__file__).parent), *map(os.fspath, self._resolver.paths)] if resolved else []),
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            bufsize=0,
        )
        self._unread = b""
        self.peak_bytes = 0
        try:
            pieces = self._answer()["pieces"]
            self.pieces: list[list[int]] | None
            self.pieces = None if pieces is None else [piece for piece in pieces if not resolved.issuperset(piece)]
        except BaseException:
            self.close()
            raise

    def invoke(self, count: int) -> npt.NDArray[np.float64]:
        """Times of ``count`` invocations on noise, ms.

        Raises:
            SandboxError: it failed.
        """
        self._ask("invoke", count)
        answer = self._answer()
        self.peak_bytes = answer["peak_bytes"]
        return np.array(answer["ms"])

    def replay(
        self,
        inputs: Path,
        outputs: Path,
        progress: Callable[[int], None] = lambda _: None,
        *,
        count: int | None = None,
        tensor: int | None = None,
    ) -> None:
        """Runs the input tensors in ``inputs``, an ``.npy`` of shape (n, ...), or for a model with states (n, steps,
        ...), and writes what comes out, of the last step, to ``outputs``, (n, values).

        Args:
            progress: called with how many are done.
            count: only so many.
            tensor: write what this one holds, not the output; with the delegate ``none`` only.

        Raises:
            SandboxError: it failed.
        """
        self._ask("replay", os.fspath(inputs), os.fspath(outputs), count, *([] if tensor is None else [tensor]))
        while "written" not in (answer := self._answer()):
            progress(answer["done"])

    def _ask(self, *command: Any) -> None:
        assert self._child.stdin is not None
        try:
            self._child.stdin.write(json.dumps(command).encode() + b"\n")
        except BrokenPipeError:
            raise self._ended() from None

    def _answer(self) -> Any:
        assert self._child.stdout is not None
        while b"\n" not in self._unread:
            if not select.select([self._child.stdout], [], [], self._timeout_s)[0]:
                raise SandboxError(f"gave nothing for {self._timeout_s:g} s")
            read = os.read(self._child.stdout.fileno(), 1 << 16)
            if not read:
                raise self._ended()
            self._unread += read
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            error = reason(answer["error"], self._read_log())
            missing = self._model and self._resolver.unresolved(self._model, error)
            raise SandboxError(f"it needs {missing}" if missing else error)
        return answer

    def _ended(self) -> SandboxError:
        self._read_log()
        return SandboxError(describe_exit(self._child.wait()))

    def _read_log(self) -> str:
        self._log.seek(0)
        log = self._log.read()
        logger.debug("%s", log[-20_000:])
        return log

    def close(self) -> None:
        self._child.kill()
        self._child.communicate()
        self._log.close()

    def __enter__(self) -> Sandbox:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _read(path: str | os.PathLike[str]) -> flatbuffer.Model | None:
    """None for what is no model: the runtime tells better why."""
    try:
        return flatbuffer.Model(Path(path).read_bytes())
    except (OSError, BundleError):
        return None


def alternate(
    sandboxes: list[Sandbox], seconds: float, progress: Callable[[int, int], None] = lambda *_: None
) -> list[npt.NDArray[np.float64] | SandboxError]:
    """Times of invocations of each, ms, measured in turns, so that what else the machine does strikes all alike.

    Args:
        seconds: for each, its warming up not counted.
        progress: called with how many turns are over, of how many.

    Returns:
        For each its times, or how it failed.
    """
    times: list[list[npt.NDArray[np.float64]]] = [[] for _ in sandboxes]
    failures: dict[int, SandboxError] = {}
    counts: dict[int, int] = {}
    for number, sandbox in enumerate(sandboxes):
        try:
            sandbox.invoke(1)
            counts[number] = max(1, round(1e3 * TURN_S / max(float(sandbox.invoke(3).min()), 1e-3)))
        except SandboxError as error:
            failures[number] = error
    started_s = time.monotonic()
    turns = max(3, round(seconds / TURN_S))
    for turn in itertools.count(1):
        # Every second turn in reverse, so that no model always runs after the same other.
        for number in list(counts)[:: 1 if turn % 2 else -1]:
            try:
                # The first one after others had the caches.
                times[number].append(sandboxes[number].invoke(counts[number] + 1)[1:])
            except SandboxError as error:
                failures[number] = error
                del counts[number]
        progress(turn, turns)
        slow = time.monotonic() - started_s > 2 * seconds * max(len(sandboxes), 1)
        if turn >= turns or not counts or (slow and turn >= 3):
            break
    return [failures.get(number) or np.concatenate(parts) for number, parts in enumerate(times)]


def reason(error: str, log: str) -> str:
    """Why a runtime does not load a model: its ``error``, or what it said of it in its ``log``."""
    return "no GPU with a Vulkan driver" if "No adapters found" in log else error


def describe_exit(status: int) -> str:
    """How a child process ended; ``status`` as :class:`subprocess.Popen` gives it, negative for a signal."""
    if status >= 0:
        return f"ended with status {status}"
    name = signal.Signals(-status).name
    return f"was killed ({name}: out of memory?)" if name == "SIGKILL" else f"crashed ({name})"
