"""Scenarios about open files: flags, data, holes, mappings, copies, times. Each runs in an empty directory."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import random
import select
import stat
import subprocess
import tempfile
from typing import Any

from kit import brief, fallocate, in_child, linkat_fd, outcome, syncfs

KEEP_SIZE, PUNCH_HOLE, ZERO = 1, 2, 16
EXTREMES = (1 << 31, 1 << 32, (1 << 40) + 5)


def fill(name: str, data: bytes = b"0123456789") -> int:
    """A file with that content, open both ways."""
    fd = os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
    os.write(fd, data)
    return fd


def content(name: str) -> bytes:
    with open(name, "rb") as file:
        return file.read()


def closed(fd: int) -> str:
    os.close(fd)
    return "opened"


def try_open(name: str, flags: int, mode: int = 0o644) -> Any:
    return outcome(lambda: closed(os.open(name, flags, mode)))


# ---- opening


def open_every_type_with_every_flag() -> Any:
    os.close(fill("file"))
    os.mkdir("d")
    os.symlink("file", "link")
    os.symlink("nowhere", "dangling")
    os.symlink("loop", "loop")
    modes = (os.O_RDONLY, os.O_WRONLY, os.O_RDWR)
    flags = (
        0,
        os.O_CREAT | os.O_EXCL,
        os.O_NOFOLLOW,
        os.O_DIRECTORY,
        os.O_PATH,
        os.O_PATH | os.O_NOFOLLOW,
        os.O_APPEND,
        os.O_NONBLOCK,
        os.O_SYNC,
        os.O_DSYNC,
        os.O_NOATIME,
        os.O_DIRECT,
    )
    names = (
        "file",
        "d",
        "link",
        "dangling",
        "loop",
        "missing",
        "file/",
        "d/",
        "d/missing",
        "file/x",
        ".",
        "",
        "x" * 256,
    )
    found = {}
    for mode in modes:
        for flag in flags:
            for name in names:
                found[name, mode, flag] = try_open(name, mode | flag)
                if name == "missing" and os.path.lexists(name):
                    os.unlink(name)
                if os.path.lexists("nowhere"):
                    os.unlink("nowhere")
    return found


def create_and_truncate() -> Any:
    found: list[Any] = [try_open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o640), brief("f")]
    found += [
        try_open("f", os.O_RDWR | os.O_CREAT | os.O_EXCL),
        try_open("f", os.O_RDWR | os.O_CREAT, 0o777),
        brief("f"),
    ]
    os.close(fill("f"))
    found += [try_open("f", os.O_RDONLY), content("f"), try_open("f", os.O_WRONLY | os.O_TRUNC), content("f")]
    os.mkdir("d")
    found += [try_open("d", os.O_RDWR | os.O_CREAT), try_open("d/", os.O_RDWR | os.O_CREAT), try_open("n/", 0o102)]
    os.symlink("target", "link")
    found += [try_open("link", os.O_RDWR | os.O_CREAT | os.O_EXCL), try_open("link", os.O_RDWR | os.O_CREAT)]
    return [*found, brief("target")]


def created_without_permission_bits() -> Any:
    """The creator may write, whatever the mode says."""
    found = []
    for mode in (0, 0o444, 0o200):
        fd = os.open(f"{mode:o}", os.O_RDWR | os.O_CREAT | os.O_EXCL, mode)
        found.append((os.write(fd, b"x"), os.pread(fd, 1, 0), brief(f"{mode:o}")))
        os.close(fd)
    return found


def path_descriptors() -> Any:
    os.close(fill("f"))
    fd = os.open("f", os.O_PATH)
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    return [
        outcome(os.read, fd, 1),
        outcome(os.fchmod, fd, 0o600),
        os.fstat(fd).st_size,
        os.read(again, 20),
        os.write(again, b"more"),
        content("f"),
    ]


def temporary_files_without_a_name() -> Any:
    fd = os.open(".", os.O_TMPFILE | os.O_RDWR, 0o640)
    os.write(fd, b"content")
    found = [
        os.listdir(),
        os.fstat(fd).st_nlink,
        oct(os.fstat(fd).st_mode),
        outcome(linkat_fd, fd, "named"),
        content("named"),
    ]
    never = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_EXCL, 0o640)
    found += [
        outcome(linkat_fd, never, "never"),
        try_open(".", os.O_TMPFILE),
        try_open("named", os.O_TMPFILE | os.O_RDWR),
    ]
    with tempfile.TemporaryFile(dir=".") as file:
        file.write(b"x" * 100000)
        file.seek(0)
        found.append(len(file.read()))
    return found


# ---- data


def read_and_write() -> Any:
    fd = fill("f")
    found: list[Any] = [os.pread(fd, 4, 3), os.pread(fd, 100, 8), os.pread(fd, 10, 10), os.pread(fd, 10, 1 << 40)]
    found += [os.pwrite(fd, b"AB", 4), os.pwrite(fd, b"end", 20), os.pread(fd, 100, 0)]
    found += [os.lseek(fd, -3, os.SEEK_END), os.read(fd, 100), os.read(fd, 100)]
    found += [os.writev(fd, [b"x", b"yz" * 10, b""]), os.preadv(fd, [bytearray(3), bytearray(50)], 0)]
    found += [outcome(os.pread, fd, 1, -1), outcome(os.lseek, fd, -1, os.SEEK_SET), outcome(os.pwrite, fd, b"", 5)]
    reading = os.open("f", os.O_RDONLY)
    writing = os.open("f", os.O_WRONLY)
    return [*found, outcome(os.write, reading, b"x"), outcome(os.read, writing, 1), content("f")]


def sizes_around_pages_and_payloads() -> Any:
    found: list[Any] = []
    for size in (1, 4095, 4096, 4097, 131071, 131072, 131073, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3_000_001):
        data = random.Random(size).randbytes(size)
        os.close(fill("f", data))
        fd = os.open("f", os.O_RDWR)
        middle = size // 2
        found.append((size, content("f") == data, os.pread(fd, 10, middle) == data[middle : middle + 10]))
        os.pwrite(fd, b"!", middle)
        found.append(content("f") == data[:middle] + b"!" + data[middle + 1 :])
        os.close(fd)
    return found


def far_offsets() -> Any:
    fd = fill("f", b"")
    found: list[Any] = []
    for offset in (*EXTREMES, (1 << 44), (1 << 62), (1 << 63) - 2, (1 << 63) - 1):
        found.append((offset, outcome(os.pwrite, fd, b"x", offset), outcome(os.ftruncate, fd, offset)))
        found.append((os.fstat(fd).st_size, outcome(os.pread, fd, 2, offset)))
    os.ftruncate(fd, EXTREMES[-1])
    return [*found, os.lseek(fd, 0, os.SEEK_END), outcome(os.truncate, "f", -1)]


def append_is_at_the_end_whoever_writes() -> Any:
    os.close(fill("f", b""))
    one = os.open("f", os.O_WRONLY | os.O_APPEND)
    two = os.open("f", os.O_RDWR | os.O_APPEND)
    for number in range(20):
        os.write(one if number % 2 else two, b"%d," % number)
    return content("f"), os.lseek(two, 0, os.SEEK_CUR), os.pwrite(two, b"tail", 0), os.pread(two, 3, 0), content("f")


def appending_can_be_switched_on() -> Any:
    fd = fill("f")
    os.lseek(fd, 0, os.SEEK_SET)
    fcntl.fcntl(fd, fcntl.F_SETFL, os.O_APPEND)
    return os.write(fd, b"end"), content("f")


def appending_does_not_concern_mappings() -> Any:
    os.close(fill("f", b"." * 4096))
    fd = os.open("f", os.O_RDWR | os.O_APPEND)
    with mmap.mmap(fd, 4096) as mapping:
        mapping[10:15] = b"hello"
        mapping.flush()
    os.write(fd, b"end")
    fcntl.fcntl(fd, fcntl.F_SETFL, 0)
    os.pwrite(fd, b"begin", 0)
    return content("f")


def truncation() -> Any:
    fd = fill("f")
    found = [outcome(os.ftruncate, fd, 4), content("f"), outcome(os.truncate, "f", 8), content("f")]
    found += [outcome(os.truncate, "f", 1 << 33), os.stat("f").st_size, os.stat("f").st_blocks < 100]
    reading = os.open("f", os.O_RDONLY)
    os.mkdir("d")
    os.symlink("f", "link")
    found += [outcome(os.ftruncate, reading, 1), outcome(os.truncate, "d", 0), outcome(os.truncate, "missing", 0)]
    return [*found, outcome(os.truncate, "link", 2), content("f"), outcome(os.truncate, "f/x", 0)]


def an_unlinked_file_stays_usable() -> Any:
    fd = fill("f")
    os.unlink("f")
    found = [os.fstat(fd).st_nlink, os.pread(fd, 4, 0), os.pwrite(fd, b"new", 0), outcome(os.ftruncate, fd, 5)]
    found += [
        outcome(os.fchmod, fd, 0o600),
        oct(os.fstat(fd).st_mode),
        outcome(os.fchown, fd, 1, 2),
        os.fstat(fd).st_uid,
    ]
    found += [outcome(os.utime, fd, ns=(5, 6)), os.fstat(fd).st_mtime_ns, os.pread(fd, 10, 0), outcome(os.fsync, fd)]
    other = fill("f", b"other")
    return [*found, os.pread(fd, 10, 0), os.pread(other, 10, 0), os.listdir()]


def direct_and_synchronous_writes() -> Any:
    found = []
    aligned = mmap.mmap(-1, 8192)
    aligned.write(b"d" * 8192)
    for name, flag in (("direct", os.O_DIRECT), ("sync", os.O_SYNC), ("dsync", os.O_DSYNC)):
        fd = os.open(name, os.O_RDWR | os.O_CREAT | flag, 0o644)
        found += [os.pwrite(fd, aligned, 0), os.preadv(fd, [aligned], 0), content(name) == b"d" * 8192]
        found.append(bool(fcntl.fcntl(fd, fcntl.F_GETFL) & flag))
    return found


def syncing() -> Any:
    fd = fill("f")
    directory = os.open(".", os.O_RDONLY)
    return [outcome(call, x) for call in (os.fsync, os.fdatasync, syncfs) for x in (fd, directory)]


# ---- holes, allocation, copies


def holes() -> Any:
    fd = fill("f", b"")
    os.pwrite(fd, b"x" * 4096, 65536)
    os.pwrite(fd, b"y" * 4096, 1 << 21)
    os.ftruncate(fd, 1 << 22)
    places = (0, 65536, 65537, 70000, 1 << 21, (1 << 21) + 5000, (1 << 22) - 1, 1 << 22, 1 << 23)
    data = [outcome(os.lseek, fd, place, os.SEEK_DATA) for place in places]
    return data, [outcome(os.lseek, fd, place, os.SEEK_HOLE) for place in places], os.fstat(fd).st_size


def allocation_in_all_modes() -> Any:
    found: list[Any] = []
    modes = (
        0,
        KEEP_SIZE,
        PUNCH_HOLE | KEEP_SIZE,
        PUNCH_HOLE,
        ZERO,
        ZERO | KEEP_SIZE,
        1 << 20,
    )
    for mode in modes:
        fd = fill("f", b"abcdefgh" * 4096)
        for offset, length in ((4096, 8192), (100, 50), (30000, 100000), (1 << 20, 10), (0, 0), (-1, 5)):
            found.append((mode, offset, outcome(fallocate, fd, mode, offset, length), os.fstat(fd).st_size))
        found.append(content("f"))
        os.close(fd)
    reading = os.open("f", os.O_RDONLY)
    return [*found, outcome(fallocate, reading, 0, 0, 10), outcome(os.posix_fallocate, reading, 0, 10)]


def copies_on_the_file_system() -> Any:
    source = fill("from", bytes(range(256)) * 2000)
    target = fill("to", b"")
    found: list[Any] = [
        os.copy_file_range(source, target, 300000),
        content("to") == bytes(range(256)) * 1171 + bytes(range(224)),
    ]
    found += [os.copy_file_range(source, target, 100, 5, 10), content("to")[:120]]
    found += [os.copy_file_range(source, target, 10, 1 << 30), outcome(os.copy_file_range, source, source, 100, 0, 50)]
    found += [os.copy_file_range(source, source, 100, 0, 1000), content("from")[1000:1100]]
    reading = os.open("to", os.O_RDONLY)
    found += [
        outcome(os.copy_file_range, source, reading, 10),
        os.sendfile(target, source, 0, 5000),
        os.fstat(target).st_size,
    ]
    return [*found, os.splice is not None]


# ---- mappings


def shared_mappings() -> Any:
    fd = fill("f", b"a" * 10000)
    other = os.open("f", os.O_RDWR)
    with mmap.mmap(fd, 10000) as view:
        view[0:5] = b"HELLO"
        view.flush()
        found: list[Any] = [os.pread(other, 6, 0), content("f")[:6]]
        os.pwrite(other, b"WORLD", 5000)
        found.append(view[4999:5006])
        view[9999] = ord("Z")
    found += [content("f")[-2:], os.fstat(fd).st_size]
    os.ftruncate(fd, 20000)
    with mmap.mmap(fd, 20000) as view:
        view[19000:19003] = b"far"
    return [*found, content("f")[18999:19004]]


def private_mappings() -> Any:
    fd = fill("f")
    with mmap.mmap(fd, 10, mmap.MAP_PRIVATE) as view:
        view[0:3] = b"xyz"
        return view[:], content("f")


def mappings_after_the_file_is_closed_and_gone() -> Any:
    fd = fill("f", b"b" * 8192)
    view = mmap.mmap(fd, 8192)
    os.close(fd)
    os.unlink("f")
    view[4096:4099] = b"new"
    view.flush()
    return view[4095:4100]


def mappings_by_what_was_opened() -> Any:
    os.close(fill("f"))
    reading = os.open("f", os.O_RDONLY)
    writing = os.open("f", os.O_WRONLY)
    return [
        outcome(lambda: mmap.mmap(reading, 10).close()),
        outcome(lambda: mmap.mmap(reading, 10, prot=mmap.PROT_READ).close()),
        outcome(lambda: mmap.mmap(writing, 10, prot=mmap.PROT_READ).close()),
    ]


# ---- times and statistics


def times() -> Any:
    os.close(fill("f"))
    os.symlink("f", "link")
    os.mkdir("d")
    found: list[Any] = []
    for ns in ((1, 2), (10**18 + 123456789, 10**18 + 987654321), (-(10**9) + 5, -5), (0, (1 << 33) * 10**9)):
        for name in ("f", "d"):
            os.utime(name, ns=ns)
            found.append((os.stat(name).st_atime_ns, os.stat(name).st_mtime_ns))
    os.utime("link", ns=(7, 8), follow_symlinks=False)
    found += [os.lstat("link").st_mtime_ns, os.stat("f").st_mtime_ns]
    before = os.stat("f").st_ctime_ns
    os.utime("f", ns=(3, 4))
    found.append(os.stat("f").st_ctime_ns >= before)
    os.utime("f")
    found.append(os.stat("f").st_mtime_ns > 10**18)
    return [*found, outcome(os.utime, "missing")]


def times_move_when_they_must() -> Any:
    """mtime and ctime after each change are later than a time long past, or still that."""
    fd = fill("f")
    os.mkdir("d")
    found = []

    def moved(name: str, change: Any) -> tuple[bool, bool]:
        os.utime(name, ns=(10**18, 10**18))
        change()
        st = os.stat(name)
        return st.st_mtime_ns > 10**18, st.st_ctime_ns > 10**18

    found.append(moved("f", lambda: os.pwrite(fd, b"x", 0)))
    found.append(moved("f", lambda: os.ftruncate(fd, 3)))
    found.append(moved("f", lambda: os.chmod("f", 0o600)))
    found.append(moved("f", lambda: os.link("f", "g")))
    found.append(moved("f", lambda: os.pread(fd, 1, 0)))
    found.append(moved("d", lambda: os.mkdir("d/x")))
    found.append(moved("d", lambda: os.rename("d/x", "d/y")))
    found.append(moved("d", lambda: os.rmdir("d/y")))
    return found


def statfs() -> Any:
    fs = os.statvfs(".")
    return fs.f_bsize, fs.f_frsize, fs.f_blocks, fs.f_files, fs.f_namemax


# ---- the rest


def polling_says_ready() -> Any:
    poll = select.poll()
    poll.register(fill("f"), select.POLLIN | select.POLLOUT | select.POLLPRI)
    return [event for _, event in poll.poll(1000)]


def running_programs() -> Any:
    with open("/bin/true", "rb") as program:
        os.close(fill("true", program.read()))
    os.close(fill("script", b"#!/bin/sh\necho from a script $1\n"))
    found = [outcome(subprocess.call, ["./true"])]
    os.chmod("true", 0o755)
    os.chmod("script", 0o711)
    found += [subprocess.call(["./true"]), subprocess.check_output(["./script", "x"])]
    with open("/bin/sleep", "rb") as program:
        os.close(fill("sleep", program.read()))
    os.chmod("sleep", 0o755)
    running = subprocess.Popen(["./sleep", "60"])
    found += [try_open("sleep", os.O_WRONLY), outcome(os.truncate, "sleep", 0)]
    running.kill()
    running.wait()
    return found


def locks_between_processes() -> Any:
    fd = fill("f")
    found: list[Any] = []

    def other(call: Any, how: int) -> Any:
        return in_child(lambda: outcome(call, os.open("f", os.O_RDWR), how | fcntl.LOCK_NB))

    for call in (fcntl.flock, fcntl.lockf):
        for mine in (fcntl.LOCK_SH, fcntl.LOCK_EX):
            call(fd, mine)
            found += [other(call, fcntl.LOCK_SH), other(call, fcntl.LOCK_EX)]
        call(fd, fcntl.LOCK_UN)
        found.append(other(call, fcntl.LOCK_EX))
    fcntl.lockf(fd, fcntl.LOCK_EX)
    os.close(os.open("f", os.O_RDONLY))
    found.append(other(fcntl.lockf, fcntl.LOCK_EX))
    reading = os.open("f", os.O_RDONLY)
    return [*found, outcome(fcntl.lockf, reading, fcntl.LOCK_EX | fcntl.LOCK_NB), errno.errorcode[errno.EAGAIN]]


def inode_flags() -> Any:
    get, set_ = 0x80086601, 0x40086602
    fd = fill("f")
    kept = 0x40 | 0x20 | 0x80  # nodump, append-only, noatime

    def flags() -> int:
        return int.from_bytes(fcntl.ioctl(fd, get, bytes(8))[:4], "little")

    def change(on: int) -> Any:
        value = flags() & ~kept | on
        return outcome(fcntl.ioctl, fd, set_, value.to_bytes(8, "little")) == value.to_bytes(
            8, "little"
        ), flags() & kept

    found: list[Any] = [outcome(flags), change(0x40), change(0x60), try_open("f", os.O_WRONLY)]
    found += [outcome(os.unlink, "f"), change(0), outcome(os.unlink, "f")]
    return [*found, outcome(fcntl.ioctl, fd, 0x5401, bytes(60))]


def stat_of_everything_agrees() -> Any:
    """By path, by descriptor and in a listing a file is the same."""
    fd = fill("f", b"x" * 5000)
    by_path, by_fd = os.stat("f"), os.fstat(fd)
    with os.scandir() as entries:
        (entry,) = list(entries)
    inodes = {by_path.st_ino, by_fd.st_ino, entry.inode(), entry.stat().st_ino}
    return (
        by_path.st_size,
        by_fd.st_size,
        len(inodes),
        stat.filemode(by_path.st_mode),
        by_path.st_blocks,
        by_path.st_blksize,
    )


_HELPERS = (fill, content, closed, try_open)
#: All of this module, in its order.
SCENARIOS = [x for x in list(globals().values()) if getattr(x, "__module__", "") == __name__ and x not in _HELPERS]
