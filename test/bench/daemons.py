"""Processes and mounts that a stack takes down again, whatever happens."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

TIMEOUT_S = 20.0
# Should we be killed, they end as well, and unmount what they serve: prctl(2), PR_SET_PDEATHSIG.
_DIE_WITH_US = ("setpriv", "--pdeathsig", "TERM", "--")


class Unavailable(Exception):
    """A peer cannot be measured here; says why."""


@dataclass(frozen=True)
class Daemons:
    """The processes behind a mount, on the client's side and on the server's."""

    clients: tuple[int, ...] = ()
    servers: tuple[int, ...] = ()

    def __add__(self, other: Daemons) -> Daemons:
        return Daemons(self.clients + other.clients, self.servers + other.servers)


@dataclass(frozen=True)
class Daemon:
    """A process of ours; what it says on stderr goes to a file."""

    process: subprocess.Popen[bytes]
    log: Path

    def take_complaint(self) -> str:
        """The last thing it said; complaints() no longer has it."""
        lines = self.log.read_text(errors="replace").strip().splitlines() or ["it said nothing"]
        self.log.unlink()
        return lines[-1]


def start(
    stack: contextlib.ExitStack,
    command: Sequence[str | Path],
    log: Path,
    stdin: int | IO[bytes] = subprocess.DEVNULL,
    stdout: int | IO[bytes] = subprocess.DEVNULL,
) -> Daemon:
    """A process that the stack ends. In a session of its own: Ctrl-C is for us, who then unmount."""
    with log.open("ab") as errors:
        process = subprocess.Popen(
            [*_DIE_WITH_US, *command], start_new_session=True, stdin=stdin, stdout=stdout, stderr=errors
        )
    stack.callback(_end, process)
    return Daemon(process, log)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Wait for what unmounting ends, or make it end."""
    for signal in (process.terminate, process.kill):
        try:
            process.wait(TIMEOUT_S / 4)
            return
        except subprocess.TimeoutExpired:
            signal()
    process.wait()


def wait_mounted(stack: contextlib.ExitStack, daemon: Daemon, top: Path) -> None:
    """Until that daemon has mounted on `top`, which the stack unmounts. Raises Unavailable."""
    stack.callback(_unmount, top)
    deadline = time.monotonic() + TIMEOUT_S
    while not _is_mounted(top):
        if daemon.process.poll() is not None:
            raise Unavailable(daemon.take_complaint())
        if time.monotonic() > deadline:
            raise Unavailable(f"not mounted after {TIMEOUT_S:g} s")
        time.sleep(0.01)


def mount_points() -> list[Path]:
    return [Path(line.split(" ")[4]) for line in Path("/proc/self/mountinfo").read_text().splitlines()]


def _is_mounted(top: Path) -> bool:
    return top in mount_points()


def _unmount(top: Path) -> None:
    """Also when the mount is busy or its daemon dead: nothing must stay."""
    if _is_mounted(top) and subprocess.run(["umount", top], check=False, stderr=subprocess.DEVNULL).returncode:
        subprocess.run(["umount", "-l", top], check=False)


def complaints(area: Path) -> Iterator[str]:
    """The last line of each daemon that said something."""
    for log in sorted(area.glob("*.log")):
        lines = log.read_text(errors="replace").strip().splitlines()
        if lines:
            yield f"{log.stem} said: {lines[-1]}"
