"""Network cameras for the tests, as many sell them: MJPEG over HTTP, and over RTSP."""

from __future__ import annotations

import contextlib
import re
import socketserver
import struct
import threading
import time
from collections.abc import Callable

import cv2
import numpy as np


class NetworkCamera:
    """Gives a hundred pictures a second, grey, each two levels brighter than the one before, up to 238.

    It may be killed and come back, and ``stalled`` it keeps its connections and gives nothing.
    """

    scheme = "http"

    def __init__(self) -> None:
        self.number = 0  # of the next picture
        self.size_wh = (64, 48)
        self.black = self.stalled = False
        self.port = 0

    @property
    def url(self) -> str:
        return f"{self.scheme}://127.0.0.1:{self.port}/stream"

    def start(self) -> None:
        camera, on = self, threading.Event()
        on.set()

        class Handler(socketserver.StreamRequestHandler):
            def handle(self) -> None:
                with contextlib.suppress(OSError):  # the other side is gone
                    camera.serve(self, on)

        class Server(socketserver.ThreadingTCPServer):
            allow_reuse_address = daemon_threads = True
            block_on_close = False

        self._on = on
        self._server = Server(("127.0.0.1", self.port), Handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def kill(self) -> None:
        self._on.clear()
        self._server.shutdown()
        self._server.server_close()

    def serve(self, client: socketserver.StreamRequestHandler, on: threading.Event) -> None:
        while client.rfile.readline().strip():
            pass
        self.wait(on)
        client.wfile.write(b"HTTP/1.0 200 OK\r\nContent-Type: multipart/x-mixed-replace; boundary=frame\r\n\r\n")
        self.stream(
            on,
            lambda jpeg: client.wfile.write(
                b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s\r\n" % (len(jpeg), jpeg)
            ),
        )

    def stream(self, on: threading.Event, send: Callable[[bytes], object]) -> None:
        while on.is_set():
            send(self.picture())
            time.sleep(0.01)
            self.wait(on)

    def wait(self, on: threading.Event) -> None:
        while self.stalled and on.is_set():
            time.sleep(0.01)

    def picture(self) -> bytes:
        level = 0 if self.black else self.number % 120 * 2
        self.number += not self.black
        width, height = self.size_wh
        return cv2.imencode(".jpg", np.full((height, width, 3), level, np.uint8))[1].tobytes()


class RtspCamera(NetworkCamera):
    """The same over RTSP (RFC 2326), in the TCP connection, as RTP with JPEG (RFC 2435)."""

    scheme = "rtsp"

    def serve(self, client: socketserver.StreamRequestHandler, on: threading.Event) -> None:
        while True:
            request = b"".join(iter(lambda: client.rfile.readline().strip() + b"\n", b"\n")).decode()
            if not request:
                return
            self.wait(on)
            method = request.split()[0]
            sdp = "v=0\r\ns=-\r\nt=0 0\r\nm=video 0 RTP/AVP 26\r\na=control:0\r\n" if method == "DESCRIBE" else ""
            answer = {
                "OPTIONS": "Public: DESCRIBE, SETUP, PLAY",
                "DESCRIBE": f"Content-Type: application/sdp\r\nContent-Length: {len(sdp)}",
                "SETUP": "Session: 1\r\nTransport: RTP/AVP/TCP;unicast;interleaved=0-1",
            }.get(method, "Session: 1")
            number = re.search(r"CSeq: *(\d+)", request)
            assert number
            client.wfile.write(f"RTSP/1.0 200 OK\r\nCSeq: {number[1]}\r\n{answer}\r\n\r\n{sdp}".encode())
            if method == "PLAY":
                break
        packets = 0

        def send(jpeg: bytes) -> None:
            nonlocal packets
            packets += 1
            width, height = self.size_wh
            # the two tables of quantization, each behind a marker, its length and its number
            tables = b"".join(
                jpeg[at + 5 : at + 69] for at in (found.start() for found in re.finditer(b"\xff\xdb\x00\x43", jpeg))
            )
            scan = jpeg[jpeg.index(b"\xff\xda") + 14 : -2]
            payload = struct.pack(">IBBBBBBH", 0, 1, 255, width // 8, height // 8, 0, 0, len(tables)) + tables + scan
            rtp = struct.pack(">BBHII", 0x80, 0x80 | 26, packets & 0xFFFF, packets * 900, 1) + payload
            client.wfile.write(struct.pack(">cBH", b"$", 0, len(rtp)) + rtp)

        self.stream(on, send)
