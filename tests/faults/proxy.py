"""A TCP proxy on loopback that spoils what passes through it: the wire between daemon and S3."""

from __future__ import annotations

import contextlib
import socket
import threading
from typing import Literal, Self

Mode = Literal["pass", "refuse", "hang", "cut", "garble"]
_HEADER_END = b"\r\n\r\n"
_CUT_AFTER_BYTES = 1000


class Proxy:
    """Forwards to a port of this machine; `mode` says how well, from the next bytes on.

    - `refuse`: connections are closed as soon as they are made, open ones at their next bytes;
    - `hang`: taken, and never answered;
    - `cut`: an answer's connection is closed after its first `_CUT_AFTER_BYTES` bytes;
    - `garble`: one bit of each answer's body is flipped, in every segment.
    """

    def __init__(self, target_port: int) -> None:
        self._target = ("127.0.0.1", target_port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._listener.getsockname()[1])
        self.mode: Mode = "pass"
        self.spoilt = 0  # how often a fault was really made
        self._open: set[socket.socket] = set()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._accept, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.sever()
        self._thread.join()

    def sever(self) -> None:
        """End every connection there is."""
        with self._lock:
            for sock in self._open:
                with contextlib.suppress(OSError):
                    sock.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            if self.mode == "refuse":
                self.spoilt += 1
                client.close()
                continue
            server = socket.create_connection(self._target)
            with self._lock:
                self._open |= {client, server}
            for source, target, is_answer in ((client, server, False), (server, client, True)):
                threading.Thread(
                    target=self._forward, args=(source, target, is_answer), daemon=True
                ).start()

    def _forward(self, source: socket.socket, target: socket.socket, is_answer: bool) -> None:
        passed = 0
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                if self.mode == "refuse":
                    self.spoilt += 1
                    break
                if self.mode == "hang":
                    self.spoilt += 1
                    continue
                if is_answer and self.mode == "garble":
                    data = self._garbled(data)
                if is_answer and self.mode == "cut":
                    passed += len(data)
                    if passed > _CUT_AFTER_BYTES:
                        self.spoilt += 1
                        target.sendall(data[:_CUT_AFTER_BYTES])
                        break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
        with self._lock:
            self._open.discard(source)
        source.close()

    def _garbled(self, data: bytes) -> bytes:
        """One bit of the body; headers pass, so that only the bytes lie."""
        start = data.find(_HEADER_END) + len(_HEADER_END) if data.startswith(b"HTTP/") else 0
        if len(data) - start < 64:  # no piece of a chunk
            return data
        self.spoilt += 1
        at = start + (len(data) - start) // 2
        return data[:at] + bytes([data[at] ^ 0x04]) + data[at + 1 :]
