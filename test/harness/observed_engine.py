"""The engine as `qtfs_server.cli` runs it, whose counters a test can read: argv[1] is the path of their socket.

A connection to the socket gets `Server.figures()`, the whitelist's denials and how often it was read, as JSON, and is
closed.
"""

from __future__ import annotations

import json
import socket
import sys
import threading
from pathlib import Path
from typing import Any

from qtfs_server import cli, engine, policy

_reloads = 0


def _count_reloads() -> None:
    plain = engine._load_rules

    def counted(options: engine.EngineOptions) -> None:
        global _reloads
        try:
            plain(options)
        finally:
            _reloads += 1

    engine._load_rules = counted


def _serve(listening: socket.socket, server: Any) -> None:
    while True:
        connection, _ = listening.accept()
        with connection:
            figures = server.figures() | {"denials": policy.denials(), "reloads": _reloads}
            connection.sendall(json.dumps(figures).encode())


def _observe(listening: socket.socket) -> None:
    plain = vars(engine)["Server"]

    def observed(*args: Any, **options: Any) -> Any:
        # Begun here, behind the engine's pthread_sigmask: signals must not come to this thread.
        server = plain(*args, **options)
        threading.Thread(target=_serve, args=(listening, server), daemon=True).start()
        return server

    vars(engine)["Server"] = observed


def main() -> int:
    Path(sys.argv[1]).unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listening.bind(sys.argv[1])
    listening.listen(16)
    _count_reloads()
    _observe(listening)
    return cli.main(sys.argv[2:])


if __name__ == "__main__":
    sys.exit(main())
