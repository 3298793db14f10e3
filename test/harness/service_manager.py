"""What systemd does for a service with a file descriptor store: sd_notify(3), sd_listen_fds(3).

It hears the service on a real datagram socket, keeps what it is given, and starts the next one with that.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from pathlib import Path

#: Becomes the service, with the descriptors of its first arguments from 3 on, as systemd has it.
_EXEC = """
import fcntl, os, sys
count = int(sys.argv[1])
given = [fcntl.fcntl(int(fd), fcntl.F_DUPFD_CLOEXEC, 500) for fd in sys.argv[3:3 + count]]
for at, fd in enumerate(given, 3):
    os.dup2(fd, at)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(count), LISTEN_FDNAMES=sys.argv[2])
os.closerange(3 + count, 500)
os.execvp(sys.argv[3 + count], sys.argv[3 + count:])
"""
_MOST_DESCRIPTORS = 250


class ServiceManager:
    """`most` descriptors are kept, with what names they came."""

    def __init__(self, path: Path, most: int) -> None:
        self._path = path
        self._most = most
        self._guard = threading.Lock()
        self._kept: list[tuple[str, int]] = []
        self._heard: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(path))
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    @property
    def environment(self) -> dict[str, str]:
        return {"NOTIFY_SOCKET": str(self._path), "FDSTORE": str(self._most)}

    def names(self) -> list[str]:
        with self._guard:
            return [name for name, _ in self._kept]

    def heard(self, text: str) -> bool:
        with self._guard:
            return any(text in message for message in self._heard)

    def start_with_kept(self, command: list[str]) -> tuple[list[str], list[int]]:
        """The command that becomes `command` with what is kept, and the descriptors that it must inherit."""
        with self._guard:
            kept = list(self._kept)
        if not kept:
            return command, []
        fds = [fd for _, fd in kept]
        names = ":".join(name for name, _ in kept)
        return [sys.executable, "-c", _EXEC, str(len(fds)), names, *map(str, fds), *command], fds

    def close(self) -> None:
        # A datagram to ourselves: shutdown(2) does not wake a reader of an unconnected datagram socket.
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"", str(self._path))
        self._thread.join()
        self._sock.close()
        for _, fd in self._kept:
            os.close(fd)
        self._kept.clear()

    def _listen(self) -> None:
        while True:
            data, fds, _, _ = socket.recv_fds(self._sock, 65536, _MOST_DESCRIPTORS)
            if not data:
                return
            with self._guard:
                self._heard.append(data.decode())
                self._obey(dict(line.split("=", 1) for line in data.decode().splitlines()), fds)

    def _obey(self, said: dict[str, str], fds: list[int]) -> None:
        name = said.get("FDNAME", "stored")
        if said.get("FDSTORE") == "1" and len(self._kept) + len(fds) <= self._most:
            self._kept += [(name, fd) for fd in fds]
            return
        for fd in fds:
            os.close(fd)
        if said.get("FDSTOREREMOVE") == "1":
            for _, fd in (one for one in self._kept if one[0] == name):
                with contextlib.suppress(OSError):
                    os.close(fd)
            self._kept = [one for one in self._kept if one[0] != name]
