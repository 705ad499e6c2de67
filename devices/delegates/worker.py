"""Runs a model, driven through a socket: ``worker.py TASK``. The other side is
:class:`edgekit.devices.delegates.isolated.Isolated`.

A process of its own: delegate libraries, GPU drivers and kernels of the user are native code of others, which may
crash, or hang in a call that nothing but the end of the process ends.

``TASK`` is JSON. When the model is loaded a line of JSON tells what it is like, or an ``error``. From then on each
command is one byte, and so is the answer to it. Tensors lie in shared memory: the input, and behind it the output.
"""

from __future__ import annotations

import json
import sys

if __name__ == "__main__":
    sys.path[:] = json.loads(sys.argv[1])["python_path"]  # so that imports are those of the other side

import dataclasses
import fcntl
import math
import mmap
import os
import select
import signal
import socket
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from edgekit.devices.delegates.backend import Accelerated, Backend, Interpreted, TensorType

INVOKE, RESET = b"i", b"r"
DONE, FAILED = b".", b"!"


def layout(input: TensorType, output: TensorType) -> tuple[int, int]:
    """Where the output begins in shared memory, on a cache line of its own, and bytes of it all."""
    given, made = (np.dtype(tensor.dtype).itemsize * math.prod(tensor.shape) for tensor in (input, output))
    begins = -(-given // 64) * 64
    return begins, begins + made


def views(memory: mmap.mmap, input: TensorType, output: TensorType) -> list[npt.NDArray[Any]]:
    """The input tensor and the raw output, (classes,), in shared memory."""
    given = np.frombuffer(memory, input.dtype, math.prod(input.shape))
    begins, _ = layout(input, output)
    return [given.reshape(input.shape), np.frombuffer(memory, output.dtype, math.prod(output.shape), begins)]


def _load(task: dict[str, Any]) -> Backend:
    with os.fdopen(task["model"], "rb") as file:
        content = file.read()
    path = Path(task["path"])
    if task["gpu"]:
        return Accelerated(content, path)
    return Interpreted(
        content,
        path,
        runtime=task["runtime"],
        library=task["library"],
        options=task["options"],
        threads=task["threads"],
        ops=task["ops"],
    )


def _told(error: BaseException) -> str:
    operator = getattr(error, "edgekit_operator", None)
    text = " ".join(str(error).split())[:1000] or type(error).__name__
    return f"the kernel of the custom operator {operator} raised {type(error).__name__}: {text}" if operator else text


def _end_with(life: int) -> None:
    """From now on this process ends with the other side, at once and whatever it does: nothing is ever written to this
    pipe, so that SIGIO tells of its end. It comes from the kernel, as a call that hangs may hold Python's lock."""
    signal.signal(signal.SIGIO, signal.SIG_DFL)
    fcntl.fcntl(life, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(life, fcntl.F_SETFL, os.O_ASYNC)
    ended = select.poll()
    ended.register(life)
    if ended.poll(0):  # already
        os._exit(0)


def main(task: dict[str, Any]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # it ends with the other side, which may have frames to finish
        signal.signal(number, signal.SIG_IGN)
    _end_with(task["life"])
    channel = socket.socket(fileno=os.dup(0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    os.dup2(2, 1)  # what drivers print on standard output belongs with the other messages
    try:
        backend = _load(task)
        os.ftruncate(task["memory"], layout(backend.input, backend.output)[1])
        given, made = views(mmap.mmap(task["memory"], 0), backend.input, backend.output)
        if task["library"] or task["gpu"]:  # one that cannot run costs no frame
            given[...] = backend.input.zero_point
            backend.invoke(given)
            backend.reset()
    except Exception as error:
        traceback.print_exc()
        channel.sendall(json.dumps({"error": _told(error)}).encode() + b"\n")
        return
    found = {name: getattr(backend, name) for name in ("runtime", "operators", "operators_delegated")}
    tensors = {"input": dataclasses.astuple(backend.input), "output": dataclasses.astuple(backend.output)}
    channel.sendall(json.dumps(found | tensors).encode() + b"\n")
    # What drivers print from now on, maybe for months, is kept by no one.
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    while command := channel.recv(1):
        try:
            if command == INVOKE:
                made[...] = backend.invoke(given)
            else:
                backend.reset()
        except Exception as error:
            channel.sendall(FAILED + _told(error).encode())
            return
        channel.sendall(DONE)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    finally:
        os._exit(0)  # without the drivers' tidying up, which may block
