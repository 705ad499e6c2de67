"""A TCP proxy that can be told to misbehave, and that notes what MQTT goes through it."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import TracebackType

_PUBLISH, _PUBACK, _SUBACK = 3, 4, 9
_PREDICTION_ID = re.compile(rb'"id":"(\w+-\d+)"')
# Predictions that are remembered, the newest.
_REMEMBERED = 200_000


@dataclass
class Passage:
    """Of one prediction: how often it was sent, and what its receiver answered, an MQTT reason code, if it did."""

    times: int = 0
    answer: int | None = None


class Traffic:
    """What MQTT carried through one proxy, noted in its thread; may be asked from any other."""

    def __init__(self) -> None:
        self._passages: dict[str, Passage] = {}
        self._lock = threading.Lock()
        #: When one subscribed last, by the monotonic clock.
        self.subscribed_s = 0.0

    def watch(self) -> tuple[Callable[[bytes], None], Callable[[bytes], None]]:
        """For one connection: what to call with the bytes of each direction."""
        # Message ids are those of one sender: what each of the two has under way is kept apart.
        up: dict[bytes, Passage] = {}
        down: dict[bytes, Passage] = {}
        return self._watch_one(up, down), self._watch_one(down, up)

    def _watch_one(self, sent: dict[bytes, Passage], sent_by_other: dict[bytes, Passage]) -> Callable[[bytes], None]:
        packets = Packets()

        def feed(data: bytes) -> None:
            for first, body in packets.feed(data):
                kind = first >> 4
                if kind == _PUBLISH and first & 0b110:
                    self._publish(body, sent)
                elif kind == _PUBACK and (passage := sent_by_other.pop(body[:2], None)):
                    passage.answer = body[2] if len(body) > 2 else 0
                elif kind == _SUBACK:
                    self.subscribed_s = time.monotonic()

        return feed

    def _publish(self, body: bytes, sent: dict[bytes, Passage]) -> None:
        topic_end = 2 + int.from_bytes(body[:2], "big")
        found = _PREDICTION_ID.search(body, topic_end) if body[2:topic_end].endswith(b"/prediction") else None
        if found:
            with self._lock:
                passage = self._passages.setdefault(found[1].decode(), Passage())
                if len(self._passages) > _REMEMBERED:
                    del self._passages[next(iter(self._passages))]
            passage.times += 1
            sent[body[topic_end : topic_end + 2]] = passage

    def passages(self) -> dict[str, Passage]:
        """Of the predictions, by their ids."""
        with self._lock:
            return self._passages.copy()


class Packets:
    """Cuts a stream of bytes into MQTT control packets."""

    def __init__(self) -> None:
        self._data = bytearray()

    def feed(self, data: bytes) -> Iterator[tuple[int, bytes]]:
        """The packets that are whole now: the first byte, type and flags, and what follows the length."""
        self._data += data
        while True:
            length = 0
            for at, byte in enumerate(self._data[1:5]):
                length |= (byte & 0x7F) << 7 * at
                if byte < 0x80:
                    break
            else:
                return
            start = at + 2
            if len(self._data) < start + length:
                return
            packet = bytes(self._data[: start + length])
            del self._data[: start + length]
            yield packet[0], packet[start:]


class Proxy:
    """Passes connections to a free port of 127.0.0.1 on to another port, in a thread, while the ``with`` block lasts.

    Attributes:
        port: where it listens.
        delay_s: what is sent, each way, is held for so long.
    """

    def __init__(self, to_port: int, traffic: Traffic) -> None:
        self._to_port, self._traffic = to_port, traffic
        self.delay_s, self._open = 0.0, True
        self._writers: set[asyncio.StreamWriter] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="proxy", daemon=True)
        self._thread.start()
        listening = asyncio.start_server(self._serve, "127.0.0.1", 0)
        self._server: asyncio.Server = asyncio.run_coroutine_threadsafe(listening, self._loop).result()
        self.port: int = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """Resets all connections, losing what is under way, and takes no others until :meth:`mend`."""
        self._open = False
        self._loop.call_soon_threadsafe(self._reset)

    def mend(self) -> None:
        self.delay_s, self._open = 0.0, True

    def _reset(self) -> None:
        for writer in self._writers:
            # no farewell (FIN), but a reset (RST)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writers = [writer]
        self._writers.add(writer)
        try:
            if not self._open:
                return
            to_reader, to_writer = await asyncio.open_connection("127.0.0.1", self._to_port)
            writers.append(to_writer)
            self._writers.add(to_writer)
            up, down = self._traffic.watch()
            # What one side sent before it died is passed on, though the other can send it nothing more.
            both = self._pass_on(reader, to_writer, up), self._pass_on(to_reader, writer, down)
            await asyncio.gather(*both, return_exceptions=True)
        except (OSError, asyncio.CancelledError):
            pass  # the other side is not there: so neither is this one
        finally:
            for one in writers:
                self._writers.discard(one)
                one.close()

    async def _pass_on(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, watch: Callable[[bytes], None]
    ) -> None:
        while data := await reader.read(1 << 16):
            if self.delay_s:
                await asyncio.sleep(self.delay_s)
            writer.write(data)
            watch(data)
            await writer.drain()
        with contextlib.suppress(OSError):
            writer.write_eof()

    async def _end(self) -> None:
        self._server.close()
        self._reset()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    def close(self) -> None:
        asyncio.run_coroutine_threadsafe(self._end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> Proxy:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
