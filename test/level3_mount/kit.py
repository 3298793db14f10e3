"""Tools of the scenarios: errno names, system calls that Python lacks, work as another user, pictures of trees."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import pickle
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from typing import Any

_libc = ctypes.CDLL(None, use_errno=True)
#: x86-64 and the architectures with generic numbers, <asm/unistd.h>.
_SYS_GETDENTS64 = 217 if os.uname().machine == "x86_64" else 61
AT_FDCWD = -100
CHILD_TIMEOUT_S = 60
#: By how much many() makes less of everything. The guest's run sets it: a request takes milliseconds there.
less = 1


def many(number: int) -> int:
    """How many files a scenario makes that is about many."""
    return number // less



def outcome(call: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
    """What a call returns, or the name of its errno."""
    try:
        return call(*arguments, **options)
    except OSError as error:
        return errno.errorcode[error.errno] if error.errno is not None else repr(error)


def _checked(result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return result


def renameat2(old: str, new: str, flags: int) -> int:
    return _checked(_libc.renameat2(AT_FDCWD, os.fsencode(old), AT_FDCWD, os.fsencode(new), flags))


def fallocate(fd: int, mode: int, offset: int, length: int) -> int:
    return _checked(_libc.fallocate(fd, mode, ctypes.c_int64(offset), ctypes.c_int64(length)))


def linkat_fd(fd: int, new: str) -> int:
    """Give an O_TMPFILE file its name, open(2)."""
    return _checked(_libc.linkat(AT_FDCWD, b"/proc/self/fd/%d" % fd, AT_FDCWD, os.fsencode(new), 0x400))


def syncfs(fd: int) -> int:
    return _checked(_libc.syncfs(fd))


def getdents(fd: int, size: int) -> Iterator[tuple[int, int, int, bytes]]:
    """The records (inode, offset, type, name) of one getdents64(2) with a buffer of so many bytes."""
    buffer = ctypes.create_string_buffer(size)
    length = _checked(_libc.syscall(_SYS_GETDENTS64, fd, buffer, size))
    at = 0
    while at < length:
        ino, offset, record, kind = struct.unpack_from("<QqHB", buffer.raw, at)
        name = buffer.raw[at + 19 : at + record].partition(b"\0")[0]
        yield ino, offset, kind, name
        at += record


def listing(path: str, size: int = 32768) -> list[tuple[int, int, int, bytes]]:
    """A whole directory, read with a buffer of so many bytes."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        found = []
        while block := list(getdents(fd, size)):
            found += block
        return found
    finally:
        os.close(fd)


# ---- in a child


def _tell(pipe: int, function: Callable[[], Any]) -> None:
    try:
        answer: tuple[bool, Any] = (True, function())
    except BaseException as error:
        answer = (False, f"{type(error).__name__}: {error} at line {_line(error)}")
    with os.fdopen(pipe, "wb") as out:
        pickle.dump(answer, out)


def _line(error: BaseException) -> str:
    places = []
    trace = error.__traceback__
    while trace is not None:
        places.append(f"{os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}")
        trace = trace.tb_next
    return " > ".join(places[-4:])


def in_child(
    function: Callable[[], Any], directory: str = ".", uid: int = 0, gid: int = 0, groups: tuple[int, ...] = ()
) -> Any:
    """What a function returns in a process of its own, in a directory, as somebody.

    The directory is entered first: others may not search the way to it.
    """
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(readable)
            signal.alarm(CHILD_TIMEOUT_S)
            os.chdir(directory)
            os.umask(0o022)
            if (uid, gid, groups) != (0, 0, ()):
                os.setgroups(groups)
                os.setresgid(gid, gid, gid)
                os.setresuid(uid, uid, uid)
            _tell(writable, function)
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as pipe:
        data = pipe.read()
    _, status = os.waitpid(child, 0)
    if not data:
        raise AssertionError(f"the child died: {os.waitstatus_to_exitcode(status)}")
    good, answer = pickle.loads(data)
    assert good, answer
    return answer


def as_user(function: Callable[[], Any], uid: int = 1001, gid: int = 2001, groups: tuple[int, ...] = ()) -> Any:
    return in_child(function, ".", uid, gid, groups)


# ---- pictures


def brief(path: str = ".", follow: bool = False) -> tuple[Any, ...]:
    """What must be equal on both sides of a file's attributes: not inode, device and the times of the run."""
    st = os.stat(path) if follow else os.lstat(path)
    size = st.st_size if not stat.S_ISDIR(st.st_mode) else 0
    return (oct(st.st_mode), st.st_nlink, st.st_uid, st.st_gid, size, st.st_rdev)


def tree(top: str | os.PathLike[str]) -> dict[str, Any]:
    """Everything below a directory: attributes, contents, targets, extended attributes, which names are one file."""
    found: dict[str, Any] = {}
    first: dict[tuple[int, int], str] = {}
    for directory, names, files, fd in os.fwalk(os.fspath(top)):
        for name in sorted(names + files):
            path = f"/proc/self/fd/{fd}/{name}"  # however deep the directory is
            st = os.lstat(path)
            relative = os.path.relpath(os.path.join(directory, name), top)
            same = first.setdefault((st.st_dev, st.st_ino), relative)
            xattrs = {x: os.getxattr(path, x, follow_symlinks=False) for x in os.listxattr(path, follow_symlinks=False)}
            found[relative] = (*brief(path), _content(path, st), xattrs, same)
    return found


def _content(path: str, st: os.stat_result) -> Any:
    if stat.S_ISLNK(st.st_mode):
        return os.readlink(path)
    if not stat.S_ISREG(st.st_mode):
        return None
    if st.st_size > 1 << 24:
        return "large"
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
