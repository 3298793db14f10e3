"""sshfs, straight on an sftp-server over TCP: no ssh, no encryption."""

from __future__ import annotations

import contextlib
import shutil
import socket
import sys
from collections.abc import Callable
from pathlib import Path

from daemons import TIMEOUT_S, Daemons, Unavailable, start, wait_mounted

UNCACHED = ("dir_cache=no", "attr_timeout=0", "entry_timeout=0")
_SERVERS = ("/usr/lib/openssh/sftp-server", "/usr/libexec/openssh/sftp-server", "/usr/lib/ssh/sftp-server")


def mounter(*options: str) -> Callable[[Path, Path, contextlib.ExitStack], Daemons]:
    return lambda backing, top, stack: _mount(backing, top, stack, options)


def _mount(backing: Path, top: Path, stack: contextlib.ExitStack, options: tuple[str, ...]) -> Daemons:
    sshfs, server = shutil.which("sshfs"), next(filter(Path.exists, map(Path, _SERVERS)), None)
    if sshfs is None or server is None:
        raise Unavailable(f"{'no sftp-server' if sshfs else 'no sshfs'} here (run: scripts/deps.sh bench)")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        text = ",".join((f"directport={listener.getsockname()[1]}", *options))
        client = start(stack, [sshfs, "-f", f"localhost:{backing}", top, "-o", text], _log(top))
        with _accept(listener) as connection:
            behind = start(stack, [server], _log(top, "-server"), stdin=connection.fileno(), stdout=connection.fileno())
    wait_mounted(stack, client, top)
    return Daemons((client.process.pid,), (behind.process.pid,))


def _log(top: Path, which: str = "") -> Path:
    return top.parent / f"{top.name}{which}.log"


def _accept(listener: socket.socket) -> socket.socket:
    """The connection of our own user: whoever reached an sftp-server of ours could read and write our files."""
    listener.settimeout(TIMEOUT_S)
    while True:
        try:
            connection, address = listener.accept()
        except TimeoutError:
            raise Unavailable("sshfs did not connect") from None
        if _owner_of(address) == _owner_of(listener.getsockname()):
            connection.setblocking(True)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return connection
        connection.close()


def _owner_of(address: tuple[str, int]) -> str:
    """The user id that owns the TCP socket bound to an IPv4 address of this machine: proc_pid_net(5), tcp."""
    number = int.from_bytes(socket.inet_aton(address[0]), sys.byteorder)
    wanted = f"{number:08X}:{address[1]:04X}"
    rows = (line.split() for line in Path("/proc/net/tcp").read_text().splitlines()[1:])
    return next((row[7] for row in rows if row[1] == wanted), "nobody's")
