"""A network camera for the tests: MJPEG over HTTP, as many sell them."""

from __future__ import annotations

import http.server
import threading
import time

import cv2
import numpy as np


class NetworkCamera:
    """Gives ten pictures in a tenth of a second, grey, each two levels brighter than the one before, up to 238.

    It may be killed and come back, and ``stalled`` it keeps its connections and gives nothing.
    """

    def __init__(self) -> None:
        self.number = 0  # of the next picture
        self.size_wh = (64, 48)
        self.black = self.stalled = False
        self.port = 0

    def start(self) -> None:
        camera, on = self, threading.Event()
        on.set()

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                if camera.stalled:
                    camera.wait(on)
                self.send_response(200)
                self.send_header("Content-Type", "multipart/x-mixed-replace; boundary=frame")
                self.end_headers()
                while on.is_set():
                    jpeg = camera.picture()
                    header = b"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n" % len(jpeg)
                    try:
                        self.wfile.write(header + jpeg + b"\r\n")
                    except OSError:
                        return
                    time.sleep(0.01)
                    camera.wait(on)

            def log_message(self, *arguments: object) -> None:
                pass

        self._on = on
        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self._server.block_on_close = False
        self.port = self._server.server_port
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/stream.mjpg"

    def kill(self) -> None:
        self._on.clear()
        self._server.shutdown()
        self._server.server_close()

    def wait(self, on: threading.Event) -> None:
        while self.stalled and on.is_set():
            time.sleep(0.01)

    def picture(self) -> bytes:
        level = 0 if self.black else self.number % 120 * 2
        self.number += not self.black
        width, height = self.size_wh
        return cv2.imencode(".jpg", np.full((height, width, 3), level, np.uint8))[1].tobytes()
