"""Records from a microphone, driven through pipes: ``recorder.py [NAME [PREFERRED]]``. The other side is
:class:`edgekit.devices.sources.microphone.Microphone`.

A process of its own: sound drivers print lines of their own, may block for ever in a call when the device or the sound
server hangs, and find devices plugged in later only when they start anew. This one can be ended at any time. It needs
PyAudio only.

Its first line is JSON: ``name``, ``sample_rate_hz`` and ``channels``, or ``error`` and ``mend``. Then come blocks, each
behind a :data:`HEADER`.
"""

from __future__ import annotations

import sys

if __name__ == "__main__":
    # This folder's modules must not be taken for others of the same name. PYTHONSAFEPATH leaves it out from the start.
    if not getattr(sys.flags, "safe_path", False):
        sys.path.pop(0)

import contextlib
import json
import os
import queue
import signal
import struct
import threading
import time
from typing import Any

# Of a block: bytes of samples (int16, channels interleaved), when it had arrived (monotonic, s), and whether sound was
# lost before it.
HEADER = "<Id?"
BLOCKS_PER_S = 10
# So many blocks wait while the other side does not read; then sound is lost.
MAX_BLOCKS = 100


class UnavailableError(Exception):
    """``error``: what is wrong; ``mend``: what to do about it."""

    def __init__(self, error: str, mend: str) -> None:
        super().__init__(error)
        self.answer = {"error": error, "mend": mend}


def find(audio: Any, name: str, preferred: str = "") -> dict[str, Any]:
    """The device whose name is or holds ``name``. Without one, a device whose name holds ``preferred``, or the default
    one.

    Raises:
        UnavailableError: there is none.
    """
    devices = [audio.get_device_info_by_index(index) for index in range(audio.get_device_count())]
    inputs = [device for device in devices if device["maxInputChannels"] > 0]
    if not inputs:
        raise UnavailableError("there is no microphone", "plug one in; `arecord -l` lists those the system knows")
    if not name:
        if preferred and (matches := [device for device in inputs if preferred.lower() in device["name"].lower()]):
            return dict(matches[0])
        try:
            return dict(audio.get_default_input_device_info())
        except OSError:
            return dict(inputs[0])
    matches = [device for device in inputs if device["name"].lower() == name.lower()]
    matches += [device for device in inputs if name.lower() in device["name"].lower()]
    if not matches:
        known = ", ".join(dict.fromkeys(device["name"] for device in inputs))
        raise UnavailableError(f"there is no microphone {name!r}", f"give one of: {known}")
    return dict(matches[0])


def open_stream(pyaudio: Any, audio: Any, device: dict[str, Any], callback: Any) -> tuple[Any, int]:
    """A stream, running, at the device's own rate, and its channels.

    One that can have many, as a sound server's, is asked for two; a card may have no other number than its own.

    Raises:
        UnavailableError: it cannot be opened.
    """
    rate_hz, most = int(device["defaultSampleRate"]), int(device["maxInputChannels"])
    problem: Exception | None = None
    for channels in dict.fromkeys((min(most, 2), most, 1)):
        try:
            stream = audio.open(
                rate_hz,
                channels,
                pyaudio.paInt16,
                input=True,
                input_device_index=device["index"],
                frames_per_buffer=max(rate_hz // BLOCKS_PER_S, 1),
                stream_callback=callback,
            )
            return stream, channels
        except (OSError, ValueError) as error:
            problem = problem or error
    raise UnavailableError(
        f"the microphone {device['name']!r} cannot be opened ({problem})", "check that no other program holds it"
    )


def _end_with_stdin() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


def main(name: str, preferred: str = "") -> None:
    # What drivers print on standard output belongs with the other messages.
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)
    # It ends with the one who reads, however that one ends, and not before: its end of standard input closes.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_stdin, daemon=True).start()
    blocks: queue.SimpleQueue[tuple[bytes, float, bool]] = queue.SimpleQueue()
    lost = False

    def callback(samples: bytes, _frames: int, _times: object, status: int) -> tuple[None, int]:
        nonlocal lost
        lost |= bool(status & pyaudio.paInputOverflow)
        if blocks.qsize() < MAX_BLOCKS:
            blocks.put((samples, time.monotonic(), lost))
            lost = False
        else:
            lost = True
        return None, pyaudio.paContinue

    try:
        try:
            import pyaudio
        except ImportError as error:
            raise UnavailableError(
                f"a microphone needs PyAudio ({error})",
                "apt-get install portaudio19-dev gcc python3-dev, then pip install 'edgekit[mic]'",
            ) from error
        audio = pyaudio.PyAudio()
        device = find(audio, name, preferred)
        stream, channels = open_stream(pyaudio, audio, device, callback)
        found = {"name": device["name"], "sample_rate_hz": int(device["defaultSampleRate"]), "channels": channels}
    except UnavailableError as error:
        found = error.answer
    except Exception as error:
        found = {"error": f"the sound system does not answer ({error})", "mend": "check the sound server"}
    out.write(json.dumps(found).encode() + b"\n")
    # What drivers print from now on, maybe for months, is kept by no one.
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 1)
    os.dup2(nowhere, 2)
    while "error" not in found:
        try:
            samples, arrived_s, gap = blocks.get(timeout=0.5)
        except queue.Empty:
            if not stream.is_active():  # the device is gone
                break
        else:
            block = struct.pack(HEADER, len(samples), arrived_s, gap) + samples
            while block:
                block = block[out.write(block) :]


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):
        main(*sys.argv[1:])
    # Without the drivers' tidying up, which may block.
    os._exit(0)
