"""A model in a process of its own: the near side of ``worker.py``."""

from __future__ import annotations

import contextlib
import json
import logging
import mmap
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit import sandbox
from edgekit.devices.delegates.backend import TensorType
from edgekit.devices.delegates.plans import Plan
from edgekit.devices.delegates.worker import DONE, INVOKE, RESET, views
from edgekit.errors import BundleError, InferenceError

logger = logging.getLogger(__name__)

# A delegate that takes longer to load a model hangs.
LOAD_TIMEOUT_S = 60.0
_END_TIMEOUT_S = 5.0


class Isolated:
    """A model that is being loaded, and then a :class:`~edgekit.devices.delegates.backend.Backend`. One thread at a
    time may use it; another may :meth:`close` it, which ends a call under way.

    Args:
        plan: what to load.
        runtime: name of the runtime; None takes the preferred one.
        threads: threads of the CPU kernels.
        ops: files with kernels of custom operators beside EdgeKit's own.
        hang_s: a call that takes longer hangs.

    Attributes:
        worked: whether it did not fail at the first call already.
    """

    isolated, worked = True, False

    def __init__(
        self, plan: Plan, *, runtime: str | None, threads: int, ops: Sequence[str | os.PathLike[str]], hang_s: float
    ) -> None:
        self._hang_s, self._deadline_s = hang_s, time.monotonic() + LOAD_TIMEOUT_S
        self._memory, model, self._log = (
            os.fdopen(os.memfd_create(f"edgekit-{name}"), "w+b", buffering=0) for name in ("tensors", "model", "log")
        )
        self._channel, theirs = socket.socketpair()
        life, ours = os.pipe()
        self._life = os.fdopen(ours, "wb", buffering=0)
        with model, theirs, os.fdopen(life):
            model.write(plan.file.content)
            model.seek(0)
            task = {
                "python_path": sys.path,
                "gpu": plan.name == "gpu",
                "library": plan.library,
                "options": plan.options,
                "path": os.fspath(plan.file.path),
                "model": model.fileno(),
                "memory": self._memory.fileno(),
                "life": life,
                "runtime": runtime,
                "threads": threads,
                "ops": [os.fspath(path) for path in ops],
            }
            self._worker = subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name("worker.py")), json.dumps(task)],
                stdin=theirs.fileno(),
                stdout=self._log,
                stderr=self._log,
                pass_fds=(model.fileno(), self._memory.fileno(), life),
                start_new_session=True,  # Ctrl-C is for this side
            )
        self._unread = bytearray()
        self._busy = threading.Lock()

    def loaded(self, wait_s: float = 0.0) -> bool:
        """Whether it is loaded, waited for so long at most.

        Raises:
            BundleError: it does not load.
        """
        with self._busy:
            return self._loaded(wait_s)

    def _loaded(self, wait_s: float) -> bool:
        until_s = min(time.monotonic() + wait_s, self._deadline_s)
        while b"\n" not in self._unread:
            self._channel.settimeout(max(until_s - time.monotonic(), 0.0))
            try:
                received = self._channel.recv(1 << 16)
            except (TimeoutError, BlockingIOError):
                if time.monotonic() < self._deadline_s:
                    return False
                raise BundleError(f"gave nothing for {LOAD_TIMEOUT_S:g} s") from None
            except OSError:
                received = b""
            if not received:
                raise BundleError(self._end())
            self._unread += received
        found = json.loads(self._unread)
        self._log.seek(0)
        log = self._log.read().decode(errors="replace")
        logger.debug("%s", log[-20_000:])
        if "error" in found:
            raise BundleError(sandbox.reason(found["error"], log))
        self._log.close()
        self.runtime: str = found["runtime"]
        self.operators: int = found["operators"]
        self.operators_delegated: int | None = found["operators_delegated"]
        self.input, self.output = (
            TensorType(tuple(shape), *rest) for shape, *rest in (found["input"], found["output"])
        )
        with self._memory:
            self._given, self._made = views(mmap.mmap(self._memory.fileno(), 0), self.input, self.output)
        self._channel.settimeout(self._hang_s)
        return True

    def invoke(self, tensor: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """As :meth:`Backend.invoke`.

        Raises:
            InferenceError: it hangs, crashed or failed, and is of no more use.
            BundleError: the tensor does not fit.
        """
        if tensor.shape != self._given.shape or tensor.dtype != self._given.dtype:
            raise BundleError(
                "input tensor",
                expected=f"{self._given.dtype} {self._given.shape}",
                got=f"{tensor.dtype} {tensor.shape}",
                mend="give what preprocess makes",
            )
        with self._busy:
            np.copyto(self._given, tensor)
            self._call(INVOKE)
            self.worked = True
            return self._made.copy()

    def reset(self) -> None:
        """As :meth:`Backend.reset`; errors as :meth:`invoke`."""
        with self._busy:
            self._call(RESET)

    def _call(self, command: bytes) -> None:
        try:
            self._channel.sendall(command)
            answer = self._channel.recv(1)
            if answer == DONE:
                return
            told = self._channel.recv(1 << 12) if answer else b""
        except TimeoutError:
            raise InferenceError(f"gave nothing for {self._hang_s:g} s", cause="hung") from None
        except OSError:
            told = b""
        if told:
            raise InferenceError(f"failed ({told.decode(errors='replace')})", cause="failed")
        raise InferenceError(self._end(), cause="crashed")

    def _end(self) -> str:
        """How the process ended, which it has or is about to."""
        try:
            return sandbox.describe_exit(self._worker.wait(_END_TIMEOUT_S))
        except subprocess.TimeoutExpired:
            return "does not answer any more"

    def close(self) -> None:
        """Ends the process, from any thread."""
        with contextlib.suppress(OSError):  # it has ended already
            self._channel.shutdown(socket.SHUT_RDWR)  # wakes who waits for an answer
        self._worker.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # in a driver, where no signal reaches it
            self._worker.wait(_END_TIMEOUT_S)
        with self._busy:
            for file in (self._channel, self._memory, self._log, self._life):
                file.close()
