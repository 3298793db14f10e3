"""qtfs: an engine for each transport, and what mounts through it."""

from __future__ import annotations

import contextlib
import os
import select
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from daemons import TIMEOUT_S, Daemon, Daemons, Unavailable, start, wait_mounted

CHECKOUT = Path(__file__).resolve().parents[2]
TRANSPORTS = ("shm", "unix", "tcp")
_READY = "listening on "
_MEMORY = Path("/dev/shm")
_WHITELIST = (
    *("Mount", "Open", "Read", "Write", "Readdir", "Mkdir"),
    *("Rmdir", "Create", "Unlink", "Rename", "Setattr", "Setxattr"),
)


class Engine:
    """One engine, for one transport: one that cannot be had here does not take the others with it.

    Nobody's configuration counts but the defaults.
    """

    def __init__(self, area: Path, transport: str) -> None:
        self._area = area
        self._transport = transport
        self._run_dir = area / f"run-{transport}"
        self._daemon: Daemon | None = None
        self._address = ""
        self._refusal = ""

    def mounter(self, *options: str) -> Callable[[Path, Path, contextlib.ExitStack], Daemons]:
        """Mounts with these options; the first mount starts the engine."""

        def mount(backing: Path, top: Path, stack: contextlib.ExitStack) -> Daemons:
            engine = self.started(stack)
            ours = (f"server={self._address}", f"config={self._nothing()}", f"run_dir={self._run_dir}", "foreground")
            program = CHECKOUT / "qtfs_client/mount.qtfs"
            command: list[str | Path] = [program, backing, top, "-o", ",".join((*ours, *options))]
            daemon = start(stack, command, top.parent / f"{top.name}.log")
            wait_mounted(stack, daemon, top)
            return Daemons((daemon.process.pid,), (engine,))

        return mount

    def started(self, stack: contextlib.ExitStack) -> int:
        """Its process. Raises Unavailable, with the same reason for all who ask."""
        if self._refusal:
            raise Unavailable(self._refusal)
        if self._daemon is None:
            try:
                self._daemon = self._start(stack)
            except Unavailable as reason:
                self._refusal = str(reason)
                raise
        return self._daemon.process.pid

    def _start(self, stack: contextlib.ExitStack) -> Daemon:
        command: list[str | Path] = [
            *(CHECKOUT / "qtfs_server/engine", "--config", self._nothing(), "--special", self._nothing()),
            *("--listen", self._where_to_listen(stack), "--whitelist", self._write_whitelist()),
            *("--run-dir", self._run_dir),
        ]
        daemon = start(stack, command, self._area / f"engine-{self._transport}.log", stdout=subprocess.PIPE)
        stack.callback(daemon.process.terminate)
        assert daemon.process.stdout is not None
        with daemon.process.stdout as output:
            ready = select.select([output], [], [], TIMEOUT_S)[0] and output.readline().decode().strip()
        if not ready or _READY not in ready:
            raise Unavailable(daemon.take_complaint())
        self._address = ready.partition(_READY)[2]
        return daemon

    def _where_to_listen(self, stack: contextlib.ExitStack) -> str:
        if self._transport == "tcp":
            return "tcp://127.0.0.1:0"
        if self._transport == "unix":
            return f"unix://{self._area}/engine.sock"
        # Not on a disk, whose cache would be written back all the time.
        memory = _MEMORY if os.access(_MEMORY, os.W_OK) else self._area
        directory = tempfile.mkdtemp(prefix="qtfs-bench.", dir=memory)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        return f"shm://{directory}/rings"

    def _nothing(self) -> Path:
        """An empty file, in place of this machine's configuration."""
        path = self._area / "nothing.toml"
        path.touch()
        return path

    def _write_whitelist(self) -> Path:
        path = self._area / "whitelist"
        path.write_text("".join(f"[{kind}]\nPath={self._area};/proc;\n" for kind in _WHITELIST))
        return path
