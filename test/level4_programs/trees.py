"""Trees with everything a file system can hold, and how two of them are compared."""

from __future__ import annotations

import errno
import hashlib
import os
import stat
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

#: vfs_cap_data of linux/capability.h, revision 2: CAP_NET_BIND_SERVICE permitted and effective.
CAPABILITY = struct.pack("<5I", 0x02000001, 1 << 10, 0, 0, 0)
#: posix_acl_xattr of the kernel: (tag, permissions, id) with u::rwx, u:1234:rw-, g::r-x, g:4321:--x, mask, other.
_ENTRIES = [(1, 7, -1), (2, 6, 1234), (4, 5, -1), (8, 1, 4321), (16, 7, -1), (32, 4, -1)]
ACL = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in _ENTRIES)
HOLE = 1 << 20


@dataclass(frozen=True)
class Entry:
    """What is known of one name: everything but inode number, atime, ctime and device, which no copy can keep."""

    mode: int
    owner: tuple[int, int]
    links: int
    first_name: bytes
    mtime_ns: int
    size: int
    device: int
    holes: bool
    xattrs: dict[str, bytes]
    content: str


def _content(path: bytes, status: os.stat_result) -> str:
    if stat.S_ISLNK(status.st_mode):
        return os.fsdecode(os.readlink(path))
    if not stat.S_ISREG(status.st_mode):
        return ""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def xattrs_of(path: bytes) -> dict[str, bytes]:
    """All extended attributes, of a link itself if it is one."""
    found = {}
    for name in os.listxattr(path, follow_symlinks=False):
        try:
            found[name] = os.getxattr(path, name, follow_symlinks=False)
        except OSError as error:
            if error.errno != errno.ENODATA:
                raise
    return found


def _walk(top: bytes) -> Iterator[bytes]:
    yield top
    for directory, directories, files in os.walk(top, onerror=_fail):
        for name in sorted(directories + files):
            yield os.path.join(directory, name)


def _fail(error: OSError) -> None:
    raise error


def snapshot(top: Path, *, times: bool = True, without: frozenset[bytes] = frozenset()) -> dict[bytes, Entry]:
    """Every name below `top`, itself included, with what `lstat`, `listxattr` and the content say of it.

    `times=False` leaves the times out, `without` top-level names.
    """
    found: dict[bytes, Entry] = {}
    first_names: dict[tuple[int, int], bytes] = {}
    for path in sorted(_walk(os.fsencode(top))):
        name = os.path.relpath(path, os.fsencode(top))
        if name.split(b"/")[0] in without:
            continue
        status = os.lstat(path)
        directory = stat.S_ISDIR(status.st_mode)
        first = name if directory else first_names.setdefault((status.st_dev, status.st_ino), name)
        found[name] = Entry(
            mode=status.st_mode,
            owner=(status.st_uid, status.st_gid),
            links=status.st_nlink,
            first_name=first,
            mtime_ns=status.st_mtime_ns if times else 0,
            size=0 if directory else status.st_size,
            device=status.st_rdev,
            holes=not directory and status.st_blocks * 512 < status.st_size - HOLE // 2,
            xattrs=xattrs_of(path),
            content=_content(path, status),
        )
    return found


def assert_same(left: dict[bytes, Entry], right: dict[bytes, Entry]) -> None:
    """Two snapshots are equal; the failure names what differs, and no more."""
    names = sorted(left.keys() | right.keys())
    different = [(name, left.get(name), right.get(name)) for name in names if left.get(name) != right.get(name)]
    assert not different, "\n".join(f"{name!r}:\n  {one}\n  {other}" for name, one, other in different[:10])


# ------------------------------------------------------------------------------------------------------ one to copy


def plant(top: Path) -> None:
    """Grow a tree of everything that tar and rsync can carry."""
    top.mkdir()
    _plant_files(top)
    _plant_names(os.fsencode(top / "names"))
    _plant_specials(top)
    _plant_attributes(top)
    _plant_directories(top)
    _set_times(top)


def _plant_files(top: Path) -> None:
    for number, mode in enumerate([0o644, 0o600, 0o755, 0o4755, 0o2711, 0o444, 0o000]):
        path = top / f"file-{mode:o}"
        path.write_bytes(f"{number}\n".encode() * (number * 1000 + 1))
        os.chown(path, 1000 + number, 2000 + number)
        path.chmod(mode)
    (top / "empty").touch()
    (top / "links").mkdir()
    for number in range(3):
        (top / f"links/hard-{number}").hardlink_to(top / "file-644")
    (top / "links/soft").symlink_to("../file-644")
    (top / "links/dangling").symlink_to("/no/where/" + "x" * 200)
    os.lchown(top / "links/dangling", 1234, 4321)
    with (top / "sparse").open("wb") as file:
        file.seek(2 * HOLE)
        file.write(b"in the middle")
        file.truncate(5 * HOLE)
    with (top / "big").open("wb") as file:
        file.write(os.urandom(3 * HOLE + 4321))


def _plant_names(top: bytes) -> None:
    os.mkdir(top)
    longest = [b"n" * 255, "\u6587".encode() * 85]
    for name in [*longest, b"\xff\xfe\x80", b"new\nline", b" ", b"-rf", b"tab\tback\\slash", b"*?"]:
        with open(os.path.join(top, name), "wb") as file:
            file.write(name)
    deep = top
    for _ in range(20):
        deep = os.path.join(deep, b"d" * 100)
        os.mkdir(deep)


def _plant_specials(top: Path) -> None:
    specials = top / "specials"
    specials.mkdir()
    os.mkfifo(specials / "fifo", 0o640)
    os.mknod(specials / "character", stat.S_IFCHR | 0o600, os.makedev(1, 3))
    os.mknod(specials / "block", stat.S_IFBLK | 0o660, os.makedev(7, 300000))


def plant_what_tar_loses(top: Path) -> None:
    """A socket, and a FIFO of two names."""
    specials = top / "specials"
    os.link(specials / "fifo", specials / "fifo-again")
    os.mknod(specials / "socket", stat.S_IFSOCK | 0o620)
    _set_times(top)


def _plant_attributes(top: Path) -> None:
    attributed = top / "attributed"
    attributed.write_text("x")
    os.setxattr(attributed, "user.text", b"value")
    os.setxattr(attributed, "user.empty", b"")
    os.setxattr(attributed, "user.bytes", bytes(range(256)) * 4)
    os.setxattr(attributed, "trusted.secret", b"\0\1")
    program = top / "capable"
    program.write_text("#!/bin/true\n")
    os.chown(program, 5, 6)
    program.chmod(0o755)
    os.setxattr(program, "security.capability", CAPABILITY)
    os.setxattr(top / "links/soft", "trusted.of-a-link", b"1", follow_symlinks=False)
    access = top / "access-list"
    access.write_text("x")
    os.setxattr(access, "system.posix_acl_access", ACL)


def _plant_directories(top: Path) -> None:
    for name, mode in (("setgid", 0o2775), ("sticky", 0o1777), ("closed", 0o700)):
        path = top / name
        path.mkdir()
        os.chown(path, 11, 12)
        path.chmod(mode)
        (path / "inside").write_text(name)
    listed = top / "default-list"
    listed.mkdir()
    (listed / "before").write_text("x")
    os.setxattr(listed, "system.posix_acl_default", ACL)
    (listed / "after").write_text("x")
    (listed / "below").mkdir()
    os.setxattr(listed, "user.of-a-directory", b"1")


def _set_times(top: Path) -> None:
    """Old ones, odd ones, with nanoseconds; the innermost first, as changing a directory changes its time."""
    for number, path in enumerate(sorted(_walk(os.fsencode(top)), reverse=True)):
        moment = 1_000_000_000 * (10**9 + 7919 * number) + 123_456_789 + number
        os.utime(path, ns=(moment, moment), follow_symlinks=False)
