"""Every message that a mount sends or gets is cut at every byte, once each; every call succeeds, and happens once."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from harness.fault_proxy import Cut, Fault, FaultProxy, Message, no_fault, once
from harness.waiting import wait_until
from soak.stage import Stage, named

#: What each call makes before its message is cut, if anything; and the call. Both get a path of their own.
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
    "FSYNC": (None, lambda path: _with_file(path, os.fsync)),
    "SETXATTR": (Path.touch, lambda path: os.setxattr(path, "user.x", b"value", os.XATTR_CREATE)),
    "GETXATTR": (lambda path: _with_xattr(path), lambda path: os.getxattr(path, "user.x")),
    "REMOVEXATTR": (lambda path: _with_xattr(path), lambda path: os.removexattr(path, "user.x")),
    "FLUSH": (None, lambda path: path.write_bytes(b"some bytes")),
    "READDIR": (lambda path: (path / "below").mkdir(parents=True), os.listdir),
    "SETLK": (None, lambda path: _with_file(path, lambda fd: fcntl.flock(fd, fcntl.LOCK_EX))),
    "FALLOCATE": (None, lambda path: _with_file(path, lambda fd: os.posix_fallocate(fd, 0, 4096))),
    "HELLO": (Path.touch, os.stat),
    "ATTACH": (Path.touch, os.stat),
}


def _with_file(path: Path, call: Callable[[int], object]) -> None:
    fd = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        call(fd)
    finally:
        os.close(fd)


def _with_xattr(path: Path) -> None:
    path.touch()
    os.setxattr(path, "user.x", b"value")


def sweep(stage: Stage) -> int:
    """How many cuts there were."""
    proxy = stage.proxy
    assert proxy is not None, "no connection can be cut over shared memory"
    cuts = 0
    try:
        for operation in _CALLS:
            for where in ("request", "reply"):
                with named(stage.transport, f"sweep: {where} {operation}", 0):
                    cuts += _sweep_one(stage, proxy, where, operation)
    finally:
        proxy.fault = no_fault
    stage.faults["cut"] += cuts
    return cuts


def _sweep_one(stage: Stage, proxy: FaultProxy, where: str, operation: str) -> int:
    before, call = _CALLS[operation]
    place = f"{operation}-{where}"
    here, there = stage.engine.share / place, stage.mount.point / place
    here.mkdir()
    lengths = [0]
    at = 0
    while at <= lengths[-1]:
        if before is not None:
            before(here / f"{at:05}")
        proxy.fault = _cutter(where, operation, at, lengths)
        if operation in ("HELLO", "ATTACH"):
            proxy.cut_all()
        call(there / f"{at:05}")
        at += 1
        # RELEASE comes when close(2) has returned.
        wait_until(lambda expected=at + 1: len(lengths) >= expected, f"the cut at {at - 1}")  # type: ignore[misc]
    _judge(here, operation, at)
    shutil.rmtree(here)
    return at


def _cutter(where: str, operation: str, at: int, lengths: list[int]) -> Fault:
    """Cuts the first such message at a byte, and notes its length."""

    def strike(message: Message) -> Cut:
        lengths.append(message.length)
        return Cut(at)

    return once(where, operation, strike)


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
