"""A file system whose files fail: `faulty_fs.py POINT` serves it until it is unmounted.

A file is called CALL-ERRNO: "fsync-EDQUOT" fails with EDQUOT when it is fsynced, and takes everything else. CALL is one
of `CALLS`; "short" takes LIMIT bytes and fails beyond, as a disk that is full.

    with faulty_fs(point):
        (point / "write-EIO").write_bytes(b"x")     # OSError
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import llfuse

CALLS = ("write", "short", "fsync", "close", "truncate")
ERRORS = ("EIO", "ENOSPC", "EDQUOT", "EROFS")
LIMIT = 5000
_NAMES = [f"{call}-{error}" for call in CALLS for error in ERRORS]
_FIRST = llfuse.ROOT_INODE + 1


class Faulty(llfuse.Operations):  # type: ignore[misc]
    """Inode numbers are places in `_NAMES`; contents are kept in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._data = [bytearray() for _ in _NAMES]

    def _fail(self, inode: int, call: str) -> None:
        wanted, _, name = _NAMES[inode - _FIRST].partition("-")
        if wanted == call:
            raise llfuse.FUSEError(getattr(errno, name))

    def getattr(self, inode: int, ctx: object = None) -> llfuse.EntryAttributes:
        entry = llfuse.EntryAttributes()
        entry.st_ino = inode
        entry.st_mode = stat.S_IFDIR | 0o755 if inode < _FIRST else stat.S_IFREG | 0o644
        entry.st_nlink = 1
        entry.st_size = 0 if inode < _FIRST else len(self._data[inode - _FIRST])
        entry.entry_timeout = entry.attr_timeout = 0
        return entry

    def lookup(self, parent: int, name: bytes, ctx: object = None) -> llfuse.EntryAttributes:
        if name.decode() not in _NAMES:
            raise llfuse.FUSEError(errno.ENOENT)
        return self.getattr(_FIRST + _NAMES.index(name.decode()))

    def opendir(self, inode: int, ctx: object) -> int:
        return int(inode)

    def readdir(self, handle: int, offset: int) -> Iterator[tuple[bytes, llfuse.EntryAttributes, int]]:
        for number in range(offset, len(_NAMES)):
            yield _NAMES[number].encode(), self.getattr(_FIRST + number), number + 1

    def setattr(self, inode: int, attr: object, fields: object, handle: object, ctx: object) -> llfuse.EntryAttributes:
        if fields.update_size:  # type: ignore[attr-defined]
            self._fail(inode, "truncate")
            data, size = self._data[inode - _FIRST], attr.st_size  # type: ignore[attr-defined]
            del data[size:]
            data.extend(bytes(size - len(data)))
        return self.getattr(inode)

    def open(self, inode: int, flags: int, ctx: object) -> int:
        return int(inode)

    def read(self, inode: int, offset: int, size: int) -> bytes:
        return bytes(self._data[inode - _FIRST][offset : offset + size])

    def write(self, inode: int, offset: int, data: bytes) -> int:
        self._fail(inode, "write")
        if _NAMES[inode - _FIRST].startswith("short"):
            data = data[: max(0, LIMIT - offset)]
            if not data:
                self._fail(inode, "short")
        self._data[inode - _FIRST][offset : offset + len(data)] = data
        return len(data)

    def fsync(self, inode: int, only_data: bool) -> None:
        self._fail(inode, "fsync")

    def flush(self, inode: int) -> None:
        self._fail(inode, "close")


@contextlib.contextmanager
def faulty_fs(point: Path) -> Iterator[None]:
    """Mounted there; gone at the end."""
    # Imported here: the process that serves has only llfuse.
    from harness.leaks import environment
    from harness.waiting import wait_until

    point.mkdir()
    process = subprocess.Popen([sys.executable, __file__, str(point)], env=environment())
    try:
        wait_until(lambda: os.path.ismount(point), "the faulty file system", 20)
        yield
    finally:
        subprocess.run(["umount", "-l", point], check=False)
        process.wait(20)


def main() -> None:
    llfuse.init(Faulty(), sys.argv[1], ["fsname=faulty", "default_permissions", "allow_other"])
    try:
        llfuse.main(workers=1)
    finally:
        llfuse.close(unmount=False)


if __name__ == "__main__":
    main()
