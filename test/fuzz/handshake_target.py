"""What the client reads in a handshake, of an engine that says whatever it is given: QtfsError, or a connection.

An input is the bytes of the engine's replies.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from pathlib import Path

from harness import wire
from harness.wire import EVENT_SLOT

from qtfs_client.connection import Engine, Ticket
from qtfs_common.addresses import UnixAddress, listen_socket
from qtfs_common.errors import QtfsError
from qtfs_common.protocol import OPERATIONS

PATIENCE_S = 5.0


class HandshakeTarget:
    """`one` is an execution."""

    def __init__(self, area: Path) -> None:
        self.runs = 0
        address = UnixAddress(str(area / "peer.sock"))
        self._listening = listen_socket(address)
        self._engine = Engine(address, bytes(32), PATIENCE_S)
        self._data = b""
        self._thread = threading.Thread(target=self._answer, daemon=True)
        self._thread.start()

    def _answer(self) -> None:
        while True:
            try:
                connection, _ = self._listening.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(self._data)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(65536):
                    pass

    def one(self, data: bytes) -> None:
        self.runs += 1
        self._data = data
        ticket = Ticket(1, bytes(32), 4, 90)
        with contextlib.suppress(QtfsError):
            self._engine.mount("/srv")[0].close()
        with contextlib.suppress(QtfsError):
            self._engine.attach(ticket, EVENT_SLOT)[0].close()

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


def handshake_seeds() -> list[bytes]:
    def reply(op: str, body: bytes, error: int = 0) -> bytes:
        return wire.header(32 + len(body), OPERATIONS[op], 1, error) + body

    welcome = struct.pack("<HHIII32s", 1, 0, 0, 1 << 20, 64, bytes(32))
    demanding = struct.pack("<HHIII32s", 1, 1, 0, 1 << 20, 64, bytes(32))
    mounted = reply("MOUNT", struct.pack("<Q32sII", 1, bytes(32), 4, 90))
    attached = reply("ATTACH", struct.pack("<Q", 7))
    return [
        reply("HELLO", welcome) + mounted,
        reply("HELLO", welcome) + attached,
        reply("HELLO", demanding) + reply("AUTHENTICATE", bytes(32)) + mounted,
        reply("HELLO", welcome, 93),
        reply("HELLO", welcome) + reply("MOUNT", b"", 1),
        reply("HELLO", welcome) + reply("ATTACH", b"", 116),
        reply("PING", b""),
    ]
