"""What a qtfs mount has to do, in short: run in the guest by inside.sh, with nothing but Python's own library.

    checks.py SHARE MOUNT UNCACHED_MOUNT

The first is the directory as the server sees it; the others are mounts of it. Prints a line for every check, and ends
with 1 if one failed. The full set is test/level4_mount; this one shows that it is the same over vsock.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import mmap
import os
import select
import socket
import stat
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

Check = Callable[["Places"], None]
CHECKS: list[Check] = []
BIG_BYTES = 20 << 20


class Places:
    """One directory, seen from three sides, made anew for each check."""

    def __init__(self, sides: list[Path], name: str) -> None:
        self.server, self.mount, self.uncached = (side / name for side in sides)
        self.server.mkdir()


def check(function: Check) -> Check:
    CHECKS.append(function)
    return function


@contextlib.contextmanager
def raises(number: int) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        assert error.errno == number, f"{error}, not {errno.errorcode[number]}"
    else:
        raise AssertionError(f"no {errno.errorcode[number]}")


@contextlib.contextmanager
def opened(path: Path, flags: int, mode: int = 0o644) -> Iterator[int]:
    fd = os.open(path, flags, mode)
    try:
        yield fd
    finally:
        os.close(fd)


# --------------------------------------------------------------------------------------------------------------- files


@check
def files_are_the_same_on_all_sides(at: Places) -> None:
    (at.mount / "file").write_text("one")
    assert (at.server / "file").read_text() == (at.uncached / "file").read_text() == "one"
    with (at.server / "file").open("a") as file:
        file.write(" two")
    assert (at.uncached / "file").read_text() == "one two"
    assert (at.mount / "file").read_text() == "one two"


@check
def attributes(at: Places) -> None:
    with opened(at.mount / "file", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o640) as fd:
        os.fchown(fd, 1234, 4321)
        os.ftruncate(fd, 10_000_000_000)
    os.utime(at.mount / "file", ns=(1_111_111_111_111_111_111, 999_999_999_123_456_789))
    ours, theirs = os.stat(at.mount / "file"), os.stat(at.server / "file")
    for field in ("st_mode", "st_uid", "st_gid", "st_size", "st_blocks", "st_nlink", "st_ino", "st_mtime_ns"):
        assert getattr(ours, field) == getattr(theirs, field), field
    assert ours.st_mtime_ns == 999_999_999_123_456_789 and ours.st_uid == 1234
    with raises(errno.EEXIST):
        os.close(os.open(at.uncached / "file", os.O_CREAT | os.O_EXCL | os.O_WRONLY))


@check
def every_type(at: Places) -> None:
    os.mkfifo(at.mount / "fifo", 0o600)
    os.mknod(at.mount / "device", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    (at.mount / "link").symlink_to("somewhere/else")
    os.link(at.mount / "fifo", at.mount / "same")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(at.server / "socket"))
    assert stat.S_ISFIFO(os.lstat(at.uncached / "fifo").st_mode) and os.lstat(at.uncached / "fifo").st_nlink == 2
    assert os.lstat(at.server / "device").st_rdev == os.makedev(1, 3)
    assert stat.S_ISSOCK(os.lstat(at.mount / "socket").st_mode)
    assert os.readlink(at.server / "link") == "somewhere/else"


@check
def appending_from_everywhere(at: Places) -> None:
    """O_APPEND is atomic on the server: nothing is overwritten."""
    with contextlib.ExitStack() as stack:
        flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
        fds = [stack.enter_context(opened(side / "log", flags)) for side in (at.mount, at.uncached, at.server)]
        for number in range(30):
            os.write(fds[number % 3], b"%09d\n" % number)
    lines = (at.server / "log").read_text().split()
    assert lines == [f"{number:09d}" for number in range(30)]


@check
def holes_and_fallocate(at: Places) -> None:
    with opened(at.mount / "sparse", os.O_CREAT | os.O_RDWR) as fd:
        os.pwrite(fd, b"x" * 4096, 1 << 33)
        assert os.lseek(fd, 0, os.SEEK_DATA) == 1 << 33
        assert os.lseek(fd, 0, os.SEEK_HOLE) == 0
        os.posix_fallocate(fd, 0, 1 << 16)
    assert os.stat(at.server / "sparse").st_blocks * 512 >= 1 << 16


@check
def mapped_files(at: Places) -> None:
    (at.server / "mapped").write_bytes(bytes(8192))
    for side in (at.mount, at.uncached):
        with opened(side / "mapped", os.O_RDWR) as fd, mmap.mmap(fd, 8192) as memory:
            before = memory[4096]
            memory[4096] = before + 1
            memory.flush()
    assert (at.server / "mapped").read_bytes() == bytes(4096) + b"\2" + bytes(4095)


@check
def unlinked_files_stay(at: Places) -> None:
    with opened(at.mount / "gone", os.O_CREAT | os.O_RDWR) as fd:
        os.write(fd, b"still here")
        os.unlink(at.mount / "gone")
        assert not (at.server / "gone").exists()
        assert os.pread(fd, 100, 0) == b"still here" and os.fstat(fd).st_nlink == 0


@check
def extended_attributes(at: Places) -> None:
    (at.mount / "file").touch()
    for name, value in (("user.text", b"value"), ("trusted.binary", bytes(range(256))), ("user.empty", b"")):
        os.setxattr(at.mount / "file", name, value)
        assert os.getxattr(at.server / "file", name) == value
    with raises(errno.EEXIST):
        os.setxattr(at.uncached / "file", "user.text", b"", os.XATTR_CREATE)
    os.removexattr(at.uncached / "file", "user.text")
    assert sorted(os.listxattr(at.mount / "file")) == ["trusted.binary", "user.empty"]
    with raises(errno.ENODATA):
        os.getxattr(at.mount / "file", "user.text")


@check
def twenty_mebibytes(at: Places) -> None:
    block = os.urandom(1 << 20)
    digest = hashlib.sha256()
    with (at.mount / "big").open("wb") as file:
        for number in range(BIG_BYTES >> 20):
            piece = block[number:] + block[:number]
            digest.update(piece)
            file.write(piece)
        os.fsync(file.fileno())
    for side in (at.server, at.uncached):
        with (side / "big").open("rb") as file:
            assert hashlib.file_digest(file, "sha256").digest() == digest.digest(), side


# --------------------------------------------------------------------------------------------------------- directories


@check
def directories(at: Places) -> None:
    (at.mount / "a/b/c").mkdir(parents=True)
    assert (at.server / "a/b/c").is_dir() and os.stat(at.mount / "a").st_nlink == 3
    with raises(errno.ENOTEMPTY):
        os.rmdir(at.uncached / "a/b")
    os.rmdir(at.uncached / "a/b/c")
    assert os.listdir(at.server / "a/b") == []


@check
def many_entries(at: Places) -> None:
    names = {f"{number:04d}-" + "n" * (number % 200) for number in range(2000)}
    for name in names:
        (at.server / name).touch()
    for side in (at.mount, at.uncached):
        found = os.listdir(side)
        assert len(found) == len(names) and set(found) == names


@check
def any_name(at: Places) -> None:
    names = {b"n" * 255, b"\xff\xfe", b"new\nline", "\N{SNOWMAN}".encode(), b" ", b"-rf", b"a\\b"}
    for name in names:
        os.close(os.open(os.path.join(os.fsencode(at.mount), name), os.O_CREAT | os.O_WRONLY))
    assert set(os.listdir(os.fsencode(at.server))) == set(os.listdir(os.fsencode(at.uncached))) == names
    with raises(errno.ENAMETOOLONG):
        os.stat(at.mount / ("n" * 256))


@check
def renaming(at: Places) -> None:
    (at.mount / "old").write_text("content")
    (at.mount / "directory").mkdir()
    (at.mount / "victim").write_text("to be replaced")
    os.rename(at.mount / "old", at.mount / "victim")
    os.rename(at.uncached / "victim", at.uncached / "directory/new")
    assert (at.mount / "directory/new").read_text() == "content"
    assert sorted(os.listdir(at.server)) == ["directory"]
    with raises(errno.EXDEV):
        os.rename(at.mount / "directory", at.uncached / "other")


# --------------------------------------------------------------------------------------------------------------- locks


def _is_locked(path: Path, kind: int = fcntl.LOCK_EX) -> bool:
    """Whether a record lock of another client or of the server forbids this one."""
    with opened(path, os.O_RDWR) as fd:
        try:
            fcntl.lockf(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@check
def record_locks_between_two_mounts(at: Places) -> None:
    (at.server / "file").touch()
    with opened(at.mount / "file", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_SH)
        assert _is_locked(at.uncached / "file") and _is_locked(at.server / "file")
        assert not _is_locked(at.uncached / "file", fcntl.LOCK_SH)
    assert not _is_locked(at.uncached / "file")


@check
def whole_file_locks_between_two_mounts(at: Places) -> None:
    (at.server / "file").touch()
    with opened(at.mount / "file", os.O_RDWR) as ours, opened(at.uncached / "file", os.O_RDWR) as theirs:
        fcntl.flock(ours, fcntl.LOCK_EX)
        with raises(errno.EWOULDBLOCK):
            fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(ours, fcntl.LOCK_UN)
        fcntl.flock(theirs, fcntl.LOCK_EX | fcntl.LOCK_NB)


@check
def waiting_for_a_lock(at: Places) -> None:
    """The one that waits gets it once it is free, and not before."""
    (at.server / "file").touch()
    read_end, write_end = os.pipe()
    with opened(at.mount / "file", os.O_RDWR) as fd:
        fcntl.lockf(fd, fcntl.LOCK_EX)
        child = os.fork()
        if child == 0:
            with opened(at.uncached / "file", os.O_RDWR) as other:
                fcntl.lockf(other, fcntl.LOCK_EX)
                os.write(write_end, b"!")
            os._exit(0)
        assert not select.select([read_end], [], [], 0.5)[0], "it did not wait"
    assert select.select([read_end], [], [], 10)[0], "it was never woken"
    os.waitpid(child, 0)
    os.close(read_end)
    os.close(write_end)


# --------------------------------------------------------------------------------------------------------------- FIFOs


def _write_and_leave(path: Path, data: bytes) -> int:
    child = os.fork()
    if child == 0:
        with opened(path, os.O_WRONLY) as fd:
            os._exit(0 if os.write(fd, data) == len(data) else 1)
    return child


def _wait_for_no_reader(fifo: Path) -> None:
    """The other side learns of a close a moment late; until then a writer would not wait for the next reader."""
    for _ in range(1000):
        try:
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))
        except OSError as error:
            assert error.errno == errno.ENXIO
            return
        time.sleep(0.01)
    raise AssertionError("the reader is still there")


@check
def fifos_join_all_sides(at: Places) -> None:
    os.mkfifo(at.mount / "fifo")
    with raises(errno.ENXIO):
        os.open(at.uncached / "fifo", os.O_WRONLY | os.O_NONBLOCK)
    for reader in (at.server, at.mount, at.uncached):
        for writer in (at.server, at.mount, at.uncached):
            child = _write_and_leave(writer / "fifo", b"x" * 100_000)
            assert (reader / "fifo").read_bytes() == b"x" * 100_000
            assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
            _wait_for_no_reader(at.server / "fifo")


@check
def fifos_can_be_polled(at: Places) -> None:
    os.mkfifo(at.server / "fifo")
    with opened(at.mount / "fifo", os.O_RDONLY | os.O_NONBLOCK) as reader, select.epoll() as poll:
        writer = os.open(at.uncached / "fifo", os.O_WRONLY)
        poll.register(reader, select.EPOLLIN | select.EPOLLET)
        assert poll.poll(0) == []
        for _ in range(3):
            os.write(writer, b"something")
            assert poll.poll(10) == [(reader, select.EPOLLIN)] and poll.poll(0.2) == []
        os.close(writer)
        assert poll.poll(10) == [(reader, select.EPOLLIN | select.EPOLLHUP)]
        assert os.read(reader, 100) == b"something" * 3 and os.read(reader, 100) == b""


# ---------------------------------------------------------------------------------------------------------------- main


def _passes(function: Check, sides: list[Path]) -> bool:
    begin = time.monotonic()
    try:
        function(Places(sides, function.__name__))
    except Exception:
        print(f"FAILED {function.__name__}", flush=True)
        traceback.print_exc(file=sys.stdout)
        return False
    print(f"passed {function.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
    return True


def main() -> int:
    sides = [Path(name) for name in sys.argv[1:4]]
    failed = [function.__name__ for function in CHECKS if not _passes(function, sides)]
    print(f"{len(CHECKS) - len(failed)} checks passed, {len(failed)} failed", *failed)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
