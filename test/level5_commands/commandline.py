"""The commands as a user runs them: the launchers that make wrote, their output, and the daemons they leave behind."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from harness.leaks import environment, our_processes
from harness.waiting import wait_until

CHECKOUT = Path(__file__).resolve().parents[2]
ENGINE = CHECKOUT / "qtfs_server/engine"
MOUNT = CHECKOUT / "qtfs_client/mount.qtfs"
TIMEOUT_S = 30.0

Word = str | bytes | os.PathLike[str]


@dataclass(frozen=True)
class Outcome:
    """How a command ended and what it said."""

    status: int
    stdout: str
    stderr: str

    def check(self) -> Outcome:
        assert self.status == 0, f"exit status {self.status}: {self.stderr}"
        return self

    def refused(self, status: int, *patterns: str) -> None:
        """It failed with this status and one line that matches all patterns, and never with a traceback."""
        assert "Traceback" not in self.stderr, self.stderr
        assert (self.status, self.stdout) == (status, ""), f"{self}"
        lines = self.stderr.splitlines()
        assert len(lines) == 1, f"not one line:\n{self.stderr}"
        for pattern in patterns:
            assert re.search(pattern, lines[0]), f"{pattern!r} is not in {lines[0]!r}"


def run(*words: Word, cwd: Path | None = None, timeout_s: float = TIMEOUT_S, **variables: str) -> Outcome:
    """Run a command to its end. It must not leave our pipes to a daemon, or this waits for that."""
    done = subprocess.run(
        words, cwd=cwd, env=environment(**variables), stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout_s,
        check=False,
    )
    return Outcome(done.returncode, done.stdout.decode(errors="replace"), done.stderr.decode(errors="replace"))


def mount(source: Word, directory: Word, options: str, *words: str, cwd: Path | None = None) -> Outcome:
    return run(MOUNT, source, directory, "-o", options, *words, cwd=cwd)


@contextlib.contextmanager
def mounted(source: Word, directory: Path, options: str, *words: str) -> Iterator[Path]:
    """A mount that is gone, daemon included, at the end."""
    mount(source, directory, options, *words).check()
    try:
        yield directory
    finally:
        subprocess.run(["umount", "-l", directory], check=False, capture_output=True)
        wait_until(lambda: not daemons(directory), f"the daemon of {directory} to end")


# --------------------------------------------------------------------------------------------------- what there is now


@dataclass(frozen=True)
class Mounted:
    """A line of /proc/PID/mountinfo, proc_pid_mountinfo(5)."""

    options: frozenset[str]
    type: str
    source: str
    super_options: frozenset[str]


def _plain(field: bytes) -> bytes:
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)


def mounts_at(directory: Word) -> list[Mounted]:
    """What is mounted there, the topmost last."""
    found = []
    for line in Path("/proc/self/mountinfo").read_bytes().splitlines():
        left, _, right = line.partition(b" - ")
        fields, (kind, source, supers) = left.split(b" "), right.split(b" ")
        if _plain(fields[4]) == os.fsencode(directory):
            options, super_options = (frozenset(field.decode().split(",")) for field in (fields[5], supers))
            found.append(Mounted(options, kind.decode(), os.fsdecode(_plain(source)), super_options))
    return found


def daemons(directory: Word) -> list[psutil.Process]:
    """Processes of mount.qtfs that serve a mount point, however it was called."""
    name = os.path.basename(os.fsdecode(directory))
    found = []
    for process in our_processes():
        with contextlib.suppress(psutil.Error):
            words = process.cmdline()
            if "qtfs_client.cli" in words and any(os.path.basename(word) == name for word in words):
                found.append(process)
    return found


def daemon_of(directory: Word) -> psutil.Process:
    (only,) = daemons(directory)
    return only


def kill_daemon_of(directory: Word) -> None:
    """SIGKILL, and wait until the kernel knows: what was on its way until then got ECONNABORTED."""
    daemon_of(directory).kill()

    def known() -> bool:
        try:
            os.stat(directory)
        except OSError as error:
            return error.errno == errno.ENOTCONN
        return False

    wait_until(known, "the kernel to notice that the daemon is dead")


# --------------------------------------------------------------------------------------------------- other shells


def as_nobody(words: Sequence[Word]) -> list[Word]:
    return ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", *words]
