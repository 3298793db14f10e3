"""Mounts whose daemons need not load their program, for tests that mount again and again.

    with MountNursery().open() as nursery:
        with nursery.mount(engine, source, point, "driver=fuse3").running():
            ...

It is a process that has loaded `mount.qtfs` and forks for each; one mount at a time.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from harness.engine_process import CHECKOUT, EngineProcess
from harness.leaks import environment
from harness.mounts import MountProcess

_FORK_S = 20.0
_PROGRAM = """
import os, sys
import qtfs_client.drivers.fuse3.driver
from qtfs_client import cli
for line in sys.stdin:
    log, *sys.argv[1:] = line.rstrip("\\n").split("\\0")
    pid = os.fork()
    if pid == 0:
        for target, path, flags in ((0, os.devnull, os.O_RDONLY), (1, log, os.O_WRONLY | os.O_APPEND)):
            fd = os.open(path, flags)
            os.dup2(fd, target)
            os.close(fd)
        os.dup2(1, 2)
        raise SystemExit(cli.main())
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class MountNursery:
    """The process that forks."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""

    @contextlib.contextmanager
    def open(self) -> Iterator[MountNursery]:
        with subprocess.Popen(
            [sys.executable, "-c", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            bufsize=0,
            env=environment(PYTHONPATH=str(CHECKOUT)),
        ) as process:
            self._process = process
            yield self

    def mount(self, engine: EngineProcess, source: Path, point: Path, options: str) -> MountProcess:
        return _NurseryMount(self, engine, source, point, options)

    def fork(self, log: Path, arguments: list[str]) -> _Forked:
        assert self._process is not None and self._process.stdin is not None
        self._process.stdin.write(("\0".join([str(log), *arguments]) + "\n").encode())
        return _Forked(self)

    def number(self, timeout_s: float | None) -> int | None:
        """What the process says next, on a line of its own; None: it takes longer."""
        assert self._process is not None and self._process.stdout is not None
        while b"\n" not in self._said:
            ready, _, _ = select.select([self._process.stdout], [], [], timeout_s)
            if not ready:
                return None
            said = os.read(self._process.stdout.fileno(), 100)
            assert said, "the nursery has ended"
            self._said += said
        line, _, self._said = self._said.partition(b"\n")
        return int(line)


class _Forked:
    """A daemon, as far as MountProcess needs a Popen."""

    def __init__(self, nursery: MountNursery) -> None:
        self._nursery = nursery
        pid = nursery.number(_FORK_S)
        assert pid, "the nursery does not fork"
        self.pid = pid
        self._status: int | None = None

    def poll(self) -> int | None:
        return self._wait(0)

    def wait(self, timeout: float | None = None) -> int:
        status = self._wait(timeout)
        if status is None:
            raise subprocess.TimeoutExpired("mount.qtfs", timeout or 0)
        return status

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)

    def _wait(self, timeout_s: float | None) -> int | None:
        if self._status is None:
            self._status = self._nursery.number(timeout_s)
        return self._status


class _NurseryMount(MountProcess):
    def __init__(self, nursery: MountNursery, engine: EngineProcess, source: Path, point: Path, options: str) -> None:
        super().__init__(engine, source, point, options)
        self._nursery = nursery

    def _spawn(self) -> _Forked:
        self.log_path.touch()
        return self._nursery.fork(self.log_path, self._arguments())
