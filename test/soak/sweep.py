"""Every message that a mount sends or gets is cut at every byte, once each; every call succeeds, and happens once.

Those of the event channel are in event_sweep.py.
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

from harness.fault_proxy import Action, Cut, Fault, FaultProxy, Garble, Message, no_fault, once
from harness.waiting import wait_until
from soak.stage import Stage, named

#: What each call makes before its message is cut, if anything; and the call. Both get a path of their own. The first
#: word of a key is the message's name.
_CALLS: dict[str, tuple[Callable[[Path], object] | None, Callable[[Path], object]]] = {
    "LOOKUP": (Path.touch, os.stat),
    "SETATTR": (Path.touch, lambda path: os.chmod(path, 0o600)),
    "READLINK": (lambda path: path.symlink_to("to"), os.readlink),
    "SYMLINK": (None, lambda path: path.symlink_to("to")),
    "MKNOD": (None, lambda path: os.mknod(path, 0o600)),
    "MKDIR": (None, os.mkdir),
    "UNLINK": (Path.touch, os.unlink),
    "RMDIR": (os.mkdir, os.rmdir),
    "RENAME": (Path.touch, lambda path: os.rename(path, f"{path}-renamed")),
    "LINK": (Path.touch, lambda path: os.link(path, f"{path}-linked")),
    "OPEN": (Path.touch, Path.read_bytes),
    "READ": (lambda path: path.write_bytes(b"some bytes"), Path.read_bytes),
    "CREATE": (None, lambda path: path.open("x").close()),
    "WRITE": (None, lambda path: path.write_bytes(b"some bytes")),
    "RELEASE": (None, Path.touch),
    "RELEASE later": (Path.touch, Path.read_bytes),  # of what was only read
    "FSYNC": (None, lambda path: _with_file(path, os.fsync)),
    "SETXATTR": (Path.touch, lambda path: os.setxattr(path, "user.x", b"value", os.XATTR_CREATE)),
    "GETXATTR": (lambda path: _with_xattr(path), lambda path: os.getxattr(path, "user.x")),
    "REMOVEXATTR": (lambda path: _with_xattr(path), lambda path: os.removexattr(path, "user.x")),
    "FLUSH": (None, lambda path: path.write_bytes(b"some bytes")),
    "READDIR": (lambda path: (path / "below").mkdir(parents=True), os.listdir),
    "SETLK": (None, lambda path: _with_file(path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))),
    "FALLOCATE": (None, lambda path: _with_file(path, lambda fd: os.posix_fallocate(fd, 0, 4096))),
    "HELLO": (Path.touch, os.stat),
    "AUTHENTICATE": (Path.touch, os.stat),
    "ATTACH": (Path.touch, os.stat),
    "MOUNT": (Path.touch, os.stat),
}
#: Those of a connection's beginning. MOUNT comes if the engine has forgotten the session.
_HANDSHAKE = ("HELLO", "AUTHENTICATE", "ATTACH", "MOUNT")
_ERROR_AT = 8  # in a header


def _with_file(path: Path, call: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        call(fd)
    finally:
        os.close(fd)


def _with_xattr(path: Path) -> None:
    path.touch()
    os.setxattr(path, "user.x", b"value")


def operations_of(stage: Stage) -> list[str]:
    """Whose messages there are: AUTHENTICATE with a key only, and a session that is left behind has to end soon."""
    left_out = {"AUTHENTICATE": not stage.has_key, "MOUNT": stage.grace_s > 1}
    return [operation for operation in _CALLS if not left_out.get(operation)]


def sweep(stage: Stage, every: int = 1, seed: int = 0, only: tuple[str, ...] = ()) -> int:
    """How many cuts there were. `every`: one byte of so many is drawn, by seed."""
    proxy = stage.proxy
    assert proxy is not None, "no connection can be cut over shared memory"
    operations = [operation for operation in operations_of(stage) if not only or operation in only]
    cuts = 0
    try:
        for operation in operations:
            for where in ("request", "reply"):
                with named(stage.transport, f"sweep: {where} {operation}", seed):
                    offsets = Offsets(every, f"{seed} {where} {operation}")
                    cuts += _sweep_one(stage, proxy, where, operation, offsets)
        if "MOUNT" not in operations:  # what was counted in an earlier session is no longer
            stage.check_nothing_is_open()
    finally:
        proxy.fault = no_fault
    stage.faults["cut"] += cuts
    return cuts


class Offsets:
    """Where a message is cut: in front of it, at all its bytes or some, and behind it.

    `lengths` has that of each message that was cut, to be added by whoever does it.
    """

    def __init__(self, every: int, seed: str) -> None:
        self.lengths: list[int] = []
        self._every = every
        self._draw = random.Random(seed)

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Pairs of a number, from 0, and an offset."""
        at = number = 0
        while True:
            yield number, at
            number += 1
            # RELEASE comes when close(2) has returned.
            wait_until(lambda expected=number: len(self.lengths) >= expected, f"the cut at {at}")  # type: ignore[misc]
            if at >= self.lengths[-1]:
                return
            at = min(at + self._draw.randrange(1, 2 * self._every), self.lengths[-1])


def _sweep_one(stage: Stage, proxy: FaultProxy, where: str, operation: str, offsets: Offsets) -> int:
    before, call = _CALLS[operation]
    place = f"{operation}-{where}"
    here, there = stage.engine.share / place, stage.mount.point / place
    here.mkdir()
    count = 0
    for number, at in offsets:
        if before is not None:
            before(here / f"{number:05}")
        cutter = _cutter(where, operation.partition(" ")[0], at, offsets.lengths)
        proxy.fault = _Forgotten(cutter) if operation == "MOUNT" else cutter
        if operation in _HANDSHAKE:
            proxy.cut_all()
        call(there / f"{number:05}")
        count = number + 1
    _judge(here, operation, count)
    shutil.rmtree(here)
    return count


def _cutter(where: str, operation: str, at: int, lengths: list[int]) -> Fault:
    """Cuts the first such message at a byte, and notes its length."""

    def strike(message: Message) -> Cut:
        lengths.append(message.length)
        return Cut(at)

    return once(where, operation, strike)


class _Forgotten:
    """A fault: the client hears that its session is over, until it has got another; `others` strikes meanwhile."""

    def __init__(self, others: Fault) -> None:
        self._others = others
        self._mounted = False

    def __call__(self, message: Message) -> Action | None:
        action = self._others(message)
        if action is not None:
            return action
        if (message.where, message.operation) == ("reply", "MOUNT"):
            self._mounted = True
        if (message.where, message.operation) == ("reply", "ATTACH") and not self._mounted:
            return Garble(_ERROR_AT, struct.pack("<i", errno.ESTALE))
        return None


def _judge(here: Path, operation: str, count: int) -> None:
    """Names that came or went each did so once: a second time would have been an error, or another name."""
    found = sorted(os.listdir(here))
    expected = [f"{number:05}" for number in range(count)]
    if operation in ("UNLINK", "RMDIR"):
        expected = []
    elif operation == "RENAME":
        expected = [f"{name}-renamed" for name in expected]
    elif operation == "LINK":
        expected = sorted([*expected, *(f"{name}-linked" for name in expected)])
    assert found == expected, f"{operation}: {found} instead of {expected}"
