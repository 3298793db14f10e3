"""A qtfs mount for tests: `mount.qtfs` in the foreground, so that its log and its exit status can be judged.

    with MountProcess(engine, source, point, "driver=fuse3,cache=none").running() as mount:
        os.listdir(mount.point)

It is ready when the mount answers. It ends by umount(8), or lazily if that fails, and must then have exited with 0 and
have logged no error. Whatever happens in between, nothing is left mounted and no process stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from harness.engine_process import CHECKOUT, EngineProcess
from harness.leaks import environment, mounts_below
from harness.waiting import wait_until

from qtfs_common.addresses import Address

START_TIMEOUT_S = 20.0
STOP_TIMEOUT_S = 20.0
_MAIN = "from qtfs_client import cli\nraise SystemExit(cli.main())"
_BAD_LINE = re.compile(r"ERROR|CRITICAL|Traceback|Fatal Python error|AddressSanitizer|Unraisable|Exception ignored")


class Daemon(Protocol):
    """What is asked of the process: a Popen."""

    pid: int

    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def kill(self) -> None: ...


class MountProcess:
    """`source` of an engine's machine mounted at `point`."""

    def __init__(
        self, engine: EngineProcess, source: Path, point: Path, options: str = "", *, through: Address | None = None,
        script: str = "",
    ) -> None:  # fmt: skip
        """`through`: where to connect instead of the engine itself, a proxy. `script`: Python to execute first."""
        self.engine = engine
        self.source = source
        self.point = point
        self.options = ",".join(filter(None, (f"server={through or engine.address}", "foreground", options)))
        #: What its point is unmounted with.
        self.umount = ["umount", *(["-R"] if "propagate" in options.split(",") else [])]
        self.log_path = point.with_name(point.name + ".log")
        self.process: Daemon | None = None
        self._program = ["-c", f"{script}\n{_MAIN}"] if script else ["-m", "qtfs_client.cli"]

    @contextlib.contextmanager
    def running(self) -> Iterator[MountProcess]:
        """Mounted; unmounted and judged at the end, or taken away if the body fails."""
        try:
            self.start()
            yield self
        except BaseException:
            self.take_away()
            raise
        self.stop()
        self.check_log()

    def start(self) -> None:
        with contextlib.suppress(FileExistsError):  # not exist_ok: that asks the mount, and it may be dead
            self.point.mkdir()
        left_behind = self._is_mounted()
        self.process = self._spawn()

        def ready() -> bool:
            assert self.process is not None
            assert self.process.poll() is None, f"mount.qtfs ended:\n{self.log()}"
            # In this order: what a dead daemon left goes before the new mount comes.
            return not (left_behind and self._is_dead()) and self._is_mounted()

        wait_until(ready, "the mount", START_TIMEOUT_S)
        os.stat(self.point)

    def _arguments(self) -> list[str]:
        return [str(self.source), str(self.point), "-o", self.options]

    def _spawn(self) -> Daemon:
        command = [sys.executable, *self._program, *self._arguments()]
        with self.log_path.open("ab") as log:
            return subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=environment(PYTHONPATH=str(CHECKOUT))
            )

    def _is_mounted(self) -> bool:
        return str(self.point) in mounts_below(str(self.point))

    def _is_dead(self) -> bool:
        """Whether a daemon that was killed has left the mount. Attributes might still be cached, this is not."""
        try:
            os.statvfs(self.point)
        except OSError as error:
            if error.errno not in (errno.ENOTCONN, errno.ECONNABORTED):
                raise
            return True
        return False

    def stop(self) -> None:
        """Unmount; the daemon must end with status 0. Harmless if it is not mounted."""
        if self.process is None:
            return
        try:
            # Somebody who looks around on this machine (df, updatedb) may have it open for a moment.
            wait_until(self._unmounted, "umount to succeed", period_s=0.1)
            status = self.process.wait(STOP_TIMEOUT_S)
        except (AssertionError, subprocess.TimeoutExpired) as failure:
            self.take_away()
            raise AssertionError(f"the mount did not end: {failure}\n{self.log()}") from None
        self.process = None
        assert status == 0, f"mount.qtfs ended with {status}\n{self.log()}"

    def _unmounted(self) -> bool:
        done = subprocess.run([*self.umount, self.point], capture_output=True, text=True, check=False)
        assert done.returncode == 0 or "busy" in done.stderr, done.stderr
        return done.returncode == 0

    def take_away(self) -> None:
        """End it by whatever means. Harmless if it is not mounted."""
        subprocess.run(["umount", "-l", self.point], capture_output=True, check=False)
        if self.process is not None:
            try:
                self.process.wait(2)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.process = None

    def kill(self) -> None:
        """SIGKILL to the daemon; the dead mount stays."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def check_log(self) -> None:
        """No error, no traceback."""
        lines = [line for line in self.log().splitlines() if _BAD_LINE.search(line)]
        assert not lines, f"mount.qtfs logged:\n{self.log()}"
