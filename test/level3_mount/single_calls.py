"""One system call of each kind, in a process of its own: `single_calls.py NAME DIRECTORY [catches]`.

It prepares what the call needs, says "ready", waits for a line, makes the call, and says what came of it: "done" or an
errno. It is made directly: Python would repeat it after EINTR. With "catches", SIGINT has a handler that does not
restart calls; else it is as deadly as it is by default.

DIRECTORY is what `furnish` made, by way of the mount.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import signal
import struct
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeAlias

_libc = ctypes.CDLL(None, use_errno=True)
_AT_EMPTY_PATH, _AT_STATX_FORCE_SYNC, _STATX_SIZE = 0x1000, 0x2000, 0x200
_SEEK_DATA = 3
_FS_IOC_GETFLAGS = 0x80086601
_SIZE = 1 << 20

#: Prepares in a directory; what it returns makes the call, and is negative if that failed.
Preparation: TypeAlias = Callable[[str], Callable[[], int]]


def furnish(directory: Path) -> None:
    """What every call finds, made on the server."""
    directory.mkdir()
    for name in ("f", "g"):
        (directory / name).write_bytes(bytes(_SIZE))
    (directory / "d").mkdir()
    (directory / "link").symlink_to("f")
    os.setxattr(directory / "f", "user.a", b"value")
    (directory / "program").write_text("#!/bin/true\n")
    (directory / "program").chmod(0o755)
    os.mkfifo(directory / "fifo")


# ---- calls by name


def _by_name(call: str, *arguments: object) -> Preparation:
    """Texts among the arguments are paths in the directory, bytes stay as they are."""

    def prepare(directory: str) -> Callable[[], int]:
        values = [os.fsencode(f"{directory}/{value}") if isinstance(value, str) else value for value in arguments]
        return lambda: int(getattr(_libc, call)(*values))

    return prepare


def _execute(directory: str) -> Callable[[], int]:
    path = os.fsencode(f"{directory}/program")
    words = (ctypes.c_char_p * 2)(path, None)
    return lambda: int(_libc.execv(path, words))


# ---- calls by descriptor


def _by_descriptor(call: str, *arguments: object, name: str = "f", flags: int = os.O_RDWR) -> Preparation:
    def prepare(directory: str) -> Callable[[], int]:
        fd = os.open(f"{directory}/{name}", flags)
        return lambda: int(getattr(_libc, call)(fd, *arguments))

    return prepare


def _room() -> ctypes.Array[ctypes.c_char]:
    return ctypes.create_string_buffer(65536)


def _listing(directory: str) -> Callable[[], int]:
    fd = os.open(f"{directory}/d", os.O_RDONLY | os.O_DIRECTORY)
    return lambda: int(_libc.getdents64(fd, _room(), 65536))


def _lock(command: int) -> Preparation:
    what = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
    return _by_descriptor("fcntl", command, ctypes.create_string_buffer(what, len(what)))


def _copy(directory: str) -> Callable[[], int]:
    source, target = os.open(f"{directory}/f", os.O_RDONLY), os.open(f"{directory}/g", os.O_WRONLY)
    return lambda: int(_libc.copy_file_range(source, None, target, None, ctypes.c_size_t(4096), 0))


def _touch_page(directory: str) -> Callable[[], int]:
    """A page fault. An error is SIGBUS, which the process dies of."""
    fd = os.open(f"{directory}/f", os.O_RDONLY)
    pages = mmap.mmap(fd, 4096, prot=mmap.PROT_READ)
    return lambda: pages[0]


def _poll(directory: str) -> Callable[[], int]:
    fd = os.open(f"{directory}/fifo", os.O_RDWR | os.O_NONBLOCK)
    asked = ctypes.create_string_buffer(struct.pack("ihh", fd, 1, 0), 8)
    return lambda: int(_libc.poll(asked, 1, 60_000))


def _read_fifo(directory: str) -> Callable[[], int]:
    fd = os.open(f"{directory}/fifo", os.O_RDWR)
    return lambda: int(_libc.read(fd, _room(), 1))


_NUMBER = ctypes.c_int64
#: By name: the operation whose request the call waits in, and how to prepare it.
CALLS: dict[str, tuple[str, Preparation]] = {
    "stat": ("LOOKUP", _by_name("stat", "absent", _room())),
    "statx": ("GETATTR", _by_descriptor("statx", b"", _AT_EMPTY_PATH | _AT_STATX_FORCE_SYNC, _STATX_SIZE, _room())),
    "chmod": ("SETATTR", _by_name("chmod", "f", 0o600)),
    "truncate": ("SETATTR", _by_name("truncate", "f", _NUMBER(5))),
    "readlink": ("READLINK", _by_name("readlink", "link", _room(), 100)),
    "mkdir": ("MKDIR", _by_name("mkdir", "new", 0o755)),
    "rmdir": ("RMDIR", _by_name("rmdir", "d")),
    "mknod": ("MKNOD", _by_name("mknod", "new", 0o100644, 0)),
    "symlink": ("SYMLINK", _by_name("symlink", b"f", "new")),
    "link": ("LINK", _by_name("link", "f", "new")),
    "unlink": ("UNLINK", _by_name("unlink", "g")),
    "rename": ("RENAME", _by_name("rename", "f", "g")),
    "open": ("OPEN", _by_name("open", "f", os.O_RDONLY)),
    "create": ("CREATE", _by_name("open", "new", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)),
    "tmpfile": ("TMPFILE", _by_name("open", "d", os.O_RDWR | os.O_TMPFILE, 0o644)),
    "opendir": ("OPENDIR", _by_name("open", "d", os.O_RDONLY | os.O_DIRECTORY)),
    "statfs": ("STATFS", _by_name("statfs", "f", _room())),
    "setxattr": ("SETXATTR", _by_name("setxattr", "f", b"user.b", b"x", 1, 0)),
    "getxattr": ("GETXATTR", _by_name("getxattr", "f", b"user.a", _room(), 100)),
    "listxattr": ("LISTXATTR", _by_name("listxattr", "f", _room(), 100)),
    "removexattr": ("REMOVEXATTR", _by_name("removexattr", "f", b"user.a")),
    "execve": ("READ", _execute),
    "read": ("READ", _by_descriptor("pread", _room(), 4096, _NUMBER(0))),
    "fault": ("READ", _touch_page),
    "write": ("WRITE", _by_descriptor("pwrite", b"x", 1, _NUMBER(0))),
    "append": ("WRITE", _by_descriptor("write", b"x", 1, flags=os.O_WRONLY | os.O_APPEND)),
    "fsync": ("FSYNC", _by_descriptor("fsync")),
    "fsyncdir": ("FSYNCDIR", _by_descriptor("fsync", name="d", flags=os.O_RDONLY)),
    "close": ("FLUSH", _by_descriptor("close")),
    "getdents": ("READDIR", _listing),
    "getlk": ("GETLK", _lock(fcntl.F_GETLK)),
    "setlk": ("SETLK", _lock(fcntl.F_SETLK)),
    "setlkw": ("SETLK", _lock(fcntl.F_SETLKW)),
    "flock": ("SETLK", _by_descriptor("flock", fcntl.LOCK_EX)),
    "ioctl": ("IOCTL", _by_descriptor("ioctl", ctypes.c_ulong(_FS_IOC_GETFLAGS), _room())),
    "poll": ("POLL", _poll),
    "fallocate": ("FALLOCATE", _by_descriptor("fallocate", 0, _NUMBER(0), _NUMBER(2 * _SIZE))),
    "lseek": ("LSEEK", _by_descriptor("lseek", _NUMBER(0), _SEEK_DATA)),
    "copy": ("COPY_FILE_RANGE", _copy),
    "fifo": ("READ", _read_fifo),
}


def main(name: str, directory: str, catches: str = "") -> None:
    signal.signal(signal.SIGINT, (lambda number, frame: None) if catches else signal.SIG_DFL)
    signal.siginterrupt(signal.SIGINT, True)
    call = CALLS[name][1](directory)
    print("ready", flush=True)
    sys.stdin.readline()
    result = call()
    print("done" if result >= 0 else errno.errorcode[ctypes.get_errno()], flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
