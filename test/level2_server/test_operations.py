"""Every operation does to the backing directory what the system call of its name does there."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
import stat
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import ALL_TRANSPORTS
from harness.session import MAX_PAYLOAD, Session
from harness.wire import ROOT, Attributes

from qtfs_common.protocol import OPERATIONS

RENAME_NOREPLACE, RENAME_EXCHANGE, RENAME_WHITEOUT = 1, 2, 4
FALLOC_FL_KEEP_SIZE, FALLOC_FL_PUNCH_HOLE, FALLOC_FL_ZERO_RANGE = 1, 2, 16
FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE = 8, 32
FS_IOC_GETFLAGS, FS_IOC_SETFLAGS, FS_IOC_FSGETXATTR = 0x80086601, 0x40086602, 0x801C581F
FS_NODUMP_FL = 0x40
SET_ATIME_NOW, SET_MTIME_NOW = 1 << 7, 1 << 8

pytestmark = pytest.mark.parametrize("common_engine", ALL_TRANSPORTS, indirect=True, scope="session")


def check_attributes(found: Attributes, path: Path) -> None:
    """Every field is what lstat(2) says."""
    st = os.lstat(path)
    assert (found.ino, found.size, found.blocks) == (st.st_ino, st.st_size, st.st_blocks)
    assert (found.mode, found.nlink, found.uid, found.gid) == (st.st_mode, st.st_nlink, st.st_uid, st.st_gid)
    assert found.atime * 10**9 + found.atime_ns == st.st_atime_ns
    assert found.mtime * 10**9 + found.mtime_ns == st.st_mtime_ns
    assert found.ctime * 10**9 + found.ctime_ns == st.st_ctime_ns
    assert found.blksize == st.st_blksize and found.flags == 0
    assert os.makedev(found.rdev >> 8 & 0xFFF, (found.rdev & 0xFF) | (found.rdev >> 12 & 0xFFF00)) == st.st_rdev


# ---- names


def test_lookup_finds_every_type_and_its_attributes(session: Session, share: Path) -> None:
    (share / "file").write_bytes(b"12345")
    (share / "directory").mkdir()
    (share / "link").symlink_to("nowhere")
    os.mkfifo(share / "fifo")
    os.mknod(share / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(share / "disk", stat.S_IFBLK | 0o600, os.makedev(259, 1048575))
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(share / "socket"))
    for path in share.iterdir():
        found = session.lookup(ROOT, os.fsencode(path.name))
        check_attributes(found.attr, path)
        assert found.generation == 0 and found.node_flags == 0
        check_attributes(session.getattr(found.node), path)


@pytest.mark.parametrize("name", [b"a", b"x" * 255, bytes(range(1, 47)) + bytes(range(48, 256)), b"...", b"\xff\xfe"])
def test_names_are_bytes(session: Session, share: Path, name: bytes) -> None:
    made = session.mkdir(ROOT, name)
    assert os.listdir(os.fsencode(share)) == [name]
    assert session.lookup(ROOT, name).node == made.node


def test_mkdir_and_rmdir(session: Session, share: Path) -> None:
    made = session.mkdir(ROOT, b"d", 0o751)
    check_attributes(made.attr, share / "d")
    assert made.attr.mode == stat.S_IFDIR | 0o751
    session.rmdir(ROOT, b"d")
    assert os.listdir(share) == []


@pytest.mark.parametrize(
    ("mode", "device"),
    [
        (stat.S_IFREG | 0o640, 0),
        (stat.S_IFIFO | 0o622, 0),
        (stat.S_IFSOCK | 0o755, 0),
        (stat.S_IFCHR | 0o600, os.makedev(1, 3)),
        (stat.S_IFBLK | 0o600, os.makedev(8, 1)),
        (stat.S_IFCHR | 0o600, os.makedev(4095, 1048575)),
    ],
)
def test_mknod_makes_every_type(session: Session, share: Path, mode: int, device: int) -> None:
    major, minor = os.major(device), os.minor(device)
    rdev = minor & 0xFF | major << 8 | (minor & ~0xFF) << 12
    made = session.mknod(ROOT, b"made", mode, rdev)
    check_attributes(made.attr, share / "made")
    assert made.attr.mode == mode & ~0o022
    assert os.lstat(share / "made").st_rdev == device


@pytest.mark.parametrize("target", [b"t", b"../x/y", b"/absolute", b"\xff", b"x" * 4095])
def test_symlinks_hold_their_target_as_given(session: Session, share: Path, target: bytes) -> None:
    made = session.symlink(ROOT, b"link", target)
    check_attributes(made.attr, share / "link")
    assert os.readlink(os.fsencode(share) + b"/link") == target
    assert session.readlink(made.node) == target


def test_a_link_is_the_same_node_and_file(session: Session, share: Path) -> None:
    (share / "one").write_bytes(b"x")
    one = session.lookup(ROOT, b"one")
    two = session.link(one.node, ROOT, b"two")
    assert two.node == one.node and two.attr.nlink == 2
    assert os.path.samefile(share / "one", share / "two")
    session.unlink(ROOT, b"one")
    assert os.listdir(share) == ["two"]


def test_a_symlink_can_have_a_second_name(session: Session, share: Path) -> None:
    link = session.symlink(ROOT, b"a", b"target")
    assert session.link(link.node, ROOT, b"b").attr.mode == stat.S_IFLNK | 0o777
    assert os.readlink(share / "b") == "target"


def test_rename_moves_between_directories_and_replaces(session: Session, share: Path) -> None:
    (share / "d").mkdir()
    (share / "a").write_text("a")
    (share / "d/b").write_text("b")
    a, d = session.lookup(ROOT, b"a"), session.lookup(ROOT, b"d")
    session.rename(ROOT, b"a", d.node, b"b")
    assert os.listdir(share) == ["d"] and (share / "d/b").read_text() == "a"
    assert session.lookup(d.node, b"b").node == a.node


def test_rename_flags(session: Session, share: Path) -> None:
    (share / "a").write_text("a")
    (share / "b").write_text("b")
    with pytest.raises(FileExistsError):
        session.rename(ROOT, b"a", ROOT, b"b", RENAME_NOREPLACE)
    session.rename(ROOT, b"a", ROOT, b"b", RENAME_EXCHANGE)
    assert (share / "a").read_text() == "b"
    session.rename(ROOT, b"a", ROOT, b"c", RENAME_WHITEOUT)
    whiteout = os.lstat(share / "a")
    assert stat.S_ISCHR(whiteout.st_mode) and whiteout.st_rdev == 0
    with pytest.raises(OSError, match="Invalid argument"):
        session.rename(ROOT, b"b", ROOT, b"d", RENAME_NOREPLACE | RENAME_EXCHANGE)


# ---- attributes


def test_setattr_sets_only_what_it_names(session: Session, share: Path) -> None:
    path = share / "f"
    path.write_bytes(b"0123456789")
    os.utime(path, ns=(10**18, 2 * 10**18 + 1))
    node = session.lookup(ROOT, b"f").node
    check_attributes(session.setattr(node, mode=0o4711), path)
    assert path.stat().st_mode == stat.S_IFREG | 0o4711
    session.setattr(node, uid=12, gid=34)
    assert (path.stat().st_uid, path.stat().st_gid) == (12, 34)
    session.setattr(node, gid=56)
    assert (path.stat().st_uid, path.stat().st_gid) == (12, 56)
    session.setattr(node, mtime=(77, 123456789))
    assert path.stat().st_mtime_ns == 77 * 10**9 + 123456789 and path.stat().st_atime_ns == 10**18
    session.setattr(node, atime=(-5, 1))
    assert path.stat().st_atime_ns == -5 * 10**9 + 1
    check_attributes(session.setattr(node, size=4), path)
    assert path.read_bytes() == b"0123"
    session.setattr(node, size=1 << 40)
    assert path.stat().st_size == 1 << 40


def test_times_can_be_now(session: Session, share: Path) -> None:
    path = share / "f"
    path.touch()
    os.utime(path, (1, 2))
    session.setattr(session.lookup(ROOT, b"f").node, atime=(0, 0), mtime=(0, 0), more=SET_ATIME_NOW | SET_MTIME_NOW)
    st = path.stat()
    assert st.st_atime_ns == st.st_mtime_ns > 10**18


def test_attributes_of_a_symlink_are_its_own(session: Session, share: Path) -> None:
    (share / "target").touch()
    made = session.symlink(ROOT, b"link", b"target")
    session.setattr(made.node, uid=5, gid=6, mtime=(100, 5))
    check_attributes(session.getattr(made.node), share / "link")
    assert os.lstat(share / "link").st_mtime_ns == 100 * 10**9 + 5
    assert (share / "target").stat().st_uid == 0
    with pytest.raises(OSError) as caught:
        session.setattr(made.node, mode=0o600)
    assert caught.value.errno == errno.EOPNOTSUPP


def test_getattr_and_truncate_through_a_handle_work_on_an_unlinked_file(session: Session, share: Path) -> None:
    made, opened = session.create(ROOT, b"f")
    session.write(opened.handle, 0, b"0123456789")
    session.unlink(ROOT, b"f")
    assert session.getattr(made.node, opened.handle).nlink == 0
    assert session.setattr(made.node, size=3, handle=opened.handle).size == 3
    assert session.read(opened.handle, 0, 100) == b"012"
    session.release(opened.handle)


def test_statx_tells_the_time_of_birth(session: Session, share: Path) -> None:
    (share / "f").write_bytes(b"abc")
    reply = session.statx(session.lookup(ROOT, b"f").node)
    st = os.stat(share / "f")
    mask, blksize = struct.unpack_from("<II", reply, 32)
    nlink, uid, gid, mode = struct.unpack_from("<IIIH", reply, 48)
    ino, size, blocks = struct.unpack_from("<QQQ", reply, 64)
    times = [seconds * 10**9 + ns for seconds, ns, _ in struct.iter_unpack("<qIi", reply[96:160])]
    assert mask & 0xFFF == 0xFFF and blksize == st.st_blksize
    assert (nlink, uid, gid, mode) == (st.st_nlink, st.st_uid, st.st_gid, st.st_mode)
    assert (ino, size, blocks) == (st.st_ino, 3, st.st_blocks)
    atime, btime, ctime, mtime = times
    assert (atime, ctime, mtime) == (st.st_atime_ns, st.st_ctime_ns, st.st_mtime_ns)
    assert 0 < btime <= ctime


def test_statfs_is_that_of_the_backing_file_system(session: Session, share: Path) -> None:
    fs = os.statvfs(share)
    blocks, _, _, files, _, bsize, namelen, frsize = struct.unpack_from("<QQQQQIII", session.call("STATFS"))
    assert (blocks, files, bsize, namelen, frsize) == (fs.f_blocks, fs.f_files, fs.f_bsize, fs.f_namemax, fs.f_frsize)


def test_syncfs_and_access(session: Session, share: Path) -> None:
    session.syncfs()
    (share / "f").touch(0o640)
    node = session.lookup(ROOT, b"f").node
    session.access(node, os.R_OK | os.W_OK)
    with pytest.raises(PermissionError):
        session.access(node, os.X_OK)


# ---- files


def test_create_write_read(session: Session, share: Path) -> None:
    made, opened = session.create(ROOT, b"f", mode=0o666)
    assert opened.handle & 1 and made.attr.mode == stat.S_IFREG | 0o644
    assert session.write(opened.handle, 0, b"hello") == 5
    assert session.write(opened.handle, 10, b"world") == 5
    assert (share / "f").read_bytes() == b"hello\0\0\0\0\0world"
    assert session.read(opened.handle, 3, 5) == b"lo\0\0\0"
    assert session.read(opened.handle, 12, 100) == b"rld"
    assert session.read(opened.handle, 15, 100) == b""
    session.fsync(opened.handle)
    session.fsync(opened.handle, 1)
    session.flush(opened.handle)
    session.release(opened.handle)


def test_a_whole_payload_both_ways(session: Session, share: Path) -> None:
    data = os.urandom(MAX_PAYLOAD)
    _, opened = session.create(ROOT, b"big")
    assert session.write(opened.handle, 0, data) == MAX_PAYLOAD
    assert session.read(opened.handle, 0, MAX_PAYLOAD) == data == (share / "big").read_bytes()
    session.release(opened.handle)


def test_offsets_reach_beyond_four_gigabytes(session: Session, share: Path) -> None:
    _, opened = session.create(ROOT, b"sparse")
    for offset in (1 << 32, (1 << 40) + 1):
        session.write(opened.handle, offset, b"here")
        assert session.read(opened.handle, offset - 1, 10) == b"\0here"
    assert session.lseek(opened.handle, 0, os.SEEK_DATA) == 1 << 32
    assert session.lseek(opened.handle, 1 << 32, os.SEEK_HOLE) == (1 << 32) + 4096
    for offset in ((1 << 63) - 1, 1 << 63):
        with pytest.raises(OSError) as caught:
            session.write(opened.handle, offset, b"xx")
        assert caught.value.errno in (errno.EINVAL, errno.EFBIG)
    session.release(opened.handle)


def test_create_without_excl_opens_what_is_there(session: Session, share: Path) -> None:
    (share / "f").write_text("old")
    _, opened = session.create(ROOT, b"f", os.O_RDWR)
    assert session.read(opened.handle, 0, 10) == b"old"
    session.release(opened.handle)
    _, opened = session.create(ROOT, b"f", os.O_RDWR | os.O_TRUNC)
    assert (share / "f").read_text() == ""
    session.release(opened.handle)
    with pytest.raises(FileExistsError):
        session.create(ROOT, b"f", os.O_RDWR | os.O_EXCL)


def test_append_goes_to_the_end_as_it_is_now(session: Session, share: Path) -> None:
    (share / "log").write_text("one\n")
    opened = session.open(session.lookup(ROOT, b"log").node, os.O_WRONLY | os.O_APPEND)
    assert opened.flags & 1, "what is appended to must not be cached"
    with (share / "log").open("a") as other:
        other.write("two\n")
    session.write(opened.handle, 0, b"three\n")
    assert (share / "log").read_text() == "one\ntwo\nthree\n"
    session.release(opened.handle)


def test_open_says_whether_the_content_may_have_changed(session: Session, share: Path) -> None:
    (share / "f").write_text("one")
    node = session.lookup(ROOT, b"f").node
    unchanged = session.open(node)
    (share / "f").write_text("other")
    changed = session.open(node)
    assert not unchanged.flags & 2 and changed.flags & 2
    session.release(unchanged.handle)
    session.release(changed.handle)


def test_a_handle_is_for_what_it_was_opened_for(session: Session, share: Path) -> None:
    (share / "f").write_text("x")
    node = session.lookup(ROOT, b"f").node
    reading, writing = session.open(node, os.O_RDONLY), session.open(node, os.O_WRONLY)
    assert not reading.handle & 1 and writing.handle & 1
    for call in (lambda: session.write(reading.handle, 0, b"y"), lambda: session.read(writing.handle, 0, 1)):
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == errno.EBADF
    session.release(reading.handle)
    session.release(writing.handle)


def released_together(session: Session, handles: list[int]) -> None:
    session.call("RELEASE", b"".join(struct.pack("<QQII", handle, 0, 0, 0) for handle in handles))


def is_open(session: Session, handle: int) -> bool:
    try:
        session.read(handle, 0, 1)
    except OSError as error:
        assert error.errno == errno.ESTALE
        return False
    return True


def test_a_release_ends_many_handles(session: Session, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    handles = [session.open(node).handle for _ in range(64)]
    released_together(session, handles[:-1])
    assert [is_open(session, handle) for handle in handles] == [False] * 63 + [True]
    released_together(session, handles[-1:])
    assert not is_open(session, handles[-1])


def test_a_release_ends_all_but_those_that_are_not_there(session: Session, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    first, ended, last = (session.open(node).handle for _ in range(3))
    session.release(ended)
    with pytest.raises(OSError, match=os.strerror(errno.ESTALE)):
        released_together(session, [first, ended, last])
    assert not is_open(session, first) and not is_open(session, last)


@pytest.mark.parametrize("flag", [os.O_SYNC, os.O_DSYNC, os.O_NOATIME, os.O_DIRECT, os.O_NONBLOCK])
def test_open_flags_that_change_nothing_to_see(session: Session, share: Path, flag: int) -> None:
    (share / "f").write_text("data")
    opened = session.open(session.lookup(ROOT, b"f").node, os.O_RDWR | flag)
    assert session.read(opened.handle, 1, 2) == b"at"
    session.write(opened.handle, 1, b"u")
    assert (share / "f").read_text() == "duta"
    session.release(opened.handle)


def test_tmpfile_has_no_name_until_it_is_linked(session: Session, share: Path) -> None:
    made, opened = session.tmpfile(ROOT)
    session.write(opened.handle, 0, b"content")
    assert os.listdir(share) == [] and made.attr.nlink == 0
    session.link(made.node, ROOT, b"named")
    assert (share / "named").read_bytes() == b"content"
    session.release(opened.handle)


def test_tmpfile_with_excl_can_never_be_linked(session: Session, share: Path) -> None:
    made, opened = session.tmpfile(ROOT, os.O_RDWR | os.O_EXCL)
    with pytest.raises(FileNotFoundError):
        session.link(made.node, ROOT, b"named")
    session.release(opened.handle)


def test_fallocate_in_its_modes(session: Session, share: Path) -> None:
    made, opened = session.create(ROOT, b"f")
    session.write(opened.handle, 0, b"x" * 16384)
    session.fallocate(opened.handle, 4096, 4096, FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE)
    assert session.lseek(opened.handle, 0, os.SEEK_HOLE) == 4096
    assert session.lseek(opened.handle, 4096, os.SEEK_DATA) == 8192
    session.fallocate(opened.handle, 0, 10, FALLOC_FL_ZERO_RANGE)
    assert session.read(opened.handle, 0, 12) == bytes(10) + b"xx"
    session.fallocate(opened.handle, 0, 1 << 20)
    assert session.getattr(made.node).size == 1 << 20
    with pytest.raises(OSError) as caught:
        session.fallocate(opened.handle, 0, 0)
    assert caught.value.errno == errno.EINVAL
    session.release(opened.handle)


@pytest.mark.parametrize("mode", [FALLOC_FL_COLLAPSE_RANGE, FALLOC_FL_INSERT_RANGE])
def test_what_would_be_done_twice_if_repeated_is_refused(session: Session, mode: int) -> None:
    _, opened = session.create(ROOT, b"f")
    session.write(opened.handle, 0, bytes(16384))
    with pytest.raises(OSError) as caught:
        session.fallocate(opened.handle, 4096, 4096, mode)
    assert caught.value.errno == errno.EOPNOTSUPP
    session.release(opened.handle)


@pytest.mark.parametrize("whence", [os.SEEK_SET, os.SEEK_CUR, os.SEEK_END, 99])
def test_lseek_is_for_data_and_holes_only(session: Session, whence: int) -> None:
    _, opened = session.create(ROOT, b"f")
    with pytest.raises(OSError) as caught:
        session.lseek(opened.handle, 0, whence)
    assert caught.value.errno == errno.EINVAL
    session.release(opened.handle)


def test_lseek_behind_the_last_data_is_enxio(session: Session) -> None:
    _, opened = session.create(ROOT, b"f")
    with pytest.raises(OSError) as caught:
        session.lseek(opened.handle, 0, os.SEEK_DATA)
    assert caught.value.errno == errno.ENXIO
    session.release(opened.handle)


def test_copy_file_range(session: Session, share: Path) -> None:
    (share / "from").write_bytes(bytes(range(256)) * 4096)
    source = session.open(session.lookup(ROOT, b"from").node)
    _, target = session.create(ROOT, b"to")
    assert session.copy(source.handle, 256, target.handle, 4096, 1 << 19) == 1 << 19
    assert (share / "to").read_bytes() == bytes(4096) + bytes(range(256)) * 2048
    assert session.copy(source.handle, 1 << 20, target.handle, 0, 100) == 0
    session.release(source.handle)
    session.release(target.handle)


def test_inode_flags(session: Session, share: Path) -> None:
    (share / "f").touch()
    opened = session.open(session.lookup(ROOT, b"f").node)
    session.ioctl(opened.handle, FS_IOC_SETFLAGS, struct.pack("<I", FS_NODUMP_FL))
    with (share / "f").open() as file:
        (local,) = struct.unpack("<q", fcntl.ioctl(file, FS_IOC_GETFLAGS, bytes(8)))
    assert local & FS_NODUMP_FL
    assert session.ioctl(opened.handle, FS_IOC_GETFLAGS, out_size=4) == struct.pack("<I", local)
    assert len(session.ioctl(opened.handle, FS_IOC_FSGETXATTR, out_size=28)) == 28
    session.release(opened.handle)


@pytest.mark.parametrize("command", [0, 0x5401, 0x541B, 0xC0045877])
def test_every_other_ioctl_is_unknown(session: Session, share: Path, command: int) -> None:
    (share / "f").touch()
    opened = session.open(session.lookup(ROOT, b"f").node)
    with pytest.raises(OSError) as caught:
        session.ioctl(opened.handle, command, bytes(64), 64)
    assert caught.value.errno == errno.ENOTTY
    session.release(opened.handle)


def test_an_ioctl_without_its_room_is_einval(session: Session, share: Path) -> None:
    (share / "f").touch()
    opened = session.open(session.lookup(ROOT, b"f").node)
    for command, data, room in ((FS_IOC_SETFLAGS, b"123", 0), (FS_IOC_GETFLAGS, b"", 3)):
        with pytest.raises(OSError) as caught:
            session.ioctl(opened.handle, command, data, room)
        assert caught.value.errno == errno.EINVAL
    session.release(opened.handle)


# ---- extended attributes


def test_xattrs_of_every_namespace(session: Session, share: Path) -> None:
    path = share / "f"
    path.touch()
    node = session.lookup(ROOT, b"f").node
    for name, value in {
        "user.a": b"\0binary\xff",
        "trusted.b": b"t",
        "security.c": b"",
        "user.big": b"x" * 3000,
    }.items():
        session.setxattr(node, name.encode(), value)
        assert os.getxattr(path, name) == value == session.getxattr(node, name.encode())
    names = session.listxattr(node).rstrip(b"\0").split(b"\0")
    assert sorted(map(os.fsdecode, names)) == sorted(os.listxattr(path))
    session.removexattr(node, b"user.a")
    assert "user.a" not in os.listxattr(path)


def test_xattr_sizes_are_asked_for_with_no_room(session: Session, share: Path) -> None:
    (share / "f").touch()
    os.setxattr(share / "f", "user.a", b"12345")
    node = session.lookup(ROOT, b"f").node
    assert session.getxattr(node, b"user.a", 0) == struct.pack("<Q", 5)
    assert session.listxattr(node, 0) == struct.pack("<Q", len(b"user.a\0"))
    assert session.getxattr(node, b"user.a", 5) == b"12345"
    for op, name in (("GETXATTR", b"user.a"), ("LISTXATTR", b"")):
        assert session.ask(op, struct.pack("<IIII", 4, 0, len(name), 0) + name, node=node).error == errno.ERANGE


def test_xattr_errors_are_those_of_the_system_call(session: Session, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    session.setxattr(node, b"user.a", b"1", os.XATTR_CREATE)
    cases: dict[int, Callable[[], object]] = {
        errno.EEXIST: lambda: session.setxattr(node, b"user.a", b"2", os.XATTR_CREATE),
        errno.ENODATA: lambda: session.setxattr(node, b"user.b", b"2", os.XATTR_REPLACE),
        errno.EOPNOTSUPP: lambda: session.setxattr(node, b"unknown.a", b"1"),
        errno.E2BIG: lambda: session.setxattr(node, b"user.c", bytes(65537)),
        errno.ERANGE: lambda: session.getxattr(node, b"user." + b"x" * 251),
    }
    for number, call in cases.items():
        with pytest.raises(OSError) as caught:
            call()
        assert caught.value.errno == number
    with pytest.raises(OSError) as caught:
        session.removexattr(node, b"user.b")
    assert caught.value.errno == errno.ENODATA


def test_acls_are_kept(session: Session, share: Path) -> None:
    (share / "f").touch()
    entries = [(0x01, 6, -1), (0x02, 4, 1234), (0x04, 4, -1), (0x10, 6, -1), (0x20, 0, -1)]
    acl = struct.pack("<I", 2) + b"".join(struct.pack("<HHi", *entry) for entry in entries)
    node = session.lookup(ROOT, b"f").node
    session.setxattr(node, b"system.posix_acl_access", acl)
    assert os.getxattr(share / "f", "system.posix_acl_access") == acl
    assert session.getattr(node).mode & 0o777 == 0o660


# ---- directories


@pytest.fixture
def many(share: Path) -> set[bytes]:
    names = {b"%04d" % number + b"x" * (number % 200) for number in range(500)}
    for name in names:
        (Path(os.fsdecode(os.fsencode(share) + b"/" + name))).touch()
    return names


@pytest.mark.parametrize("plus", [False, True])
@pytest.mark.parametrize("size", [408, 1000, 4096, 65536, MAX_PAYLOAD])
def test_readdir_gives_every_name_once_at_any_size(
    session: Session, share: Path, many: set[bytes], size: int, plus: bool
) -> None:
    handle = session.opendir(ROOT)
    found = list(session.entries(handle, size, plus))
    assert sorted(d.name for d in found) == sorted(many | {b".", b".."})
    for each in found:
        if each.name not in (b".", b".."):
            assert each.ino == os.lstat(os.fsencode(share) + b"/" + each.name).st_ino
            assert each.type == stat.S_IFREG >> 12
    session.release(handle, op="RELEASEDIR")


def test_readdirplus_counts_lookups(session: Session, share: Path) -> None:
    (share / "f").write_text("abc")
    handle = session.opendir(ROOT)
    by_name = {d.name: d for d in session.readdir(handle, plus=True)}
    assert by_name[b"."].entry is None and by_name[b".."].entry is None
    entry = by_name[b"f"].entry
    assert entry is not None
    check_attributes(entry.attr, share / "f")
    assert session.lookup(ROOT, b"f").node == entry.node
    session.forget((entry.node, 1))
    assert session.getattr(entry.node).size == 3
    session.forget((entry.node, 1))
    with pytest.raises(OSError, match="Stale"):
        session.getattr(entry.node)
    session.release(handle, op="RELEASEDIR")


def test_any_earlier_offset_can_be_used_again(session: Session, many: set[bytes]) -> None:
    handle = session.opendir(ROOT)
    first = list(session.entries(handle, 2000))
    for at in (0, 1, 100, 333, len(first) - 2):
        again = session.readdir(handle, first[at].offset, 4096)
        assert [d.name for d in again] == [d.name for d in first[at + 1 : at + 1 + len(again)]]
    assert session.readdir(handle, first[-1].offset) == []
    session.release(handle, op="RELEASEDIR")


def test_a_listing_survives_changes_under_it(session: Session, share: Path, many: set[bytes]) -> None:
    """Names that are there all the time come exactly once, whatever is made and removed meanwhile."""
    removed = set(sorted(many)[::3])
    handle = session.opendir(ROOT)
    found = []
    for count, each in enumerate(session.entries(handle, 1000)):
        found.append(each.name)
        if count == 20:
            for name in removed - set(found):
                os.unlink(os.fsencode(share) + b"/" + name)
            for number in range(100):
                (share / f"new-{number}").touch()
    kept = many - removed
    assert sorted(name for name in found if name in kept) == sorted(kept)
    session.release(handle, op="RELEASEDIR")


def test_fsyncdir(session: Session) -> None:
    handle = session.opendir(ROOT)
    session.fsync(handle, op="FSYNCDIR")
    session.release(handle, op="RELEASEDIR")


@pytest.mark.parametrize(("size", "plus"), [(0, False), (24, False), (300, True), (40, False)])
def test_a_reply_too_small_for_the_next_name_is_not_an_end(
    session: Session, share: Path, size: int, plus: bool
) -> None:
    (share / ("x" * 255)).touch()
    handle = session.opendir(ROOT)
    with pytest.raises(OSError) as caught:
        list(session.entries(handle, size, plus))
    assert caught.value.errno == errno.EINVAL
    session.release(handle, op="RELEASEDIR")


# ---- sessions


def test_ping_is_outside_the_numbering(session: Session) -> None:
    slot = session.slot(0)
    for _ in range(3):
        slot.connection.send(wire.message(OPERATIONS["PING"], tag=77))
        reply = slot.receive()
        assert reply == wire.Reply(OPERATIONS["PING"], 1, 0, 0, 0, 77, b"")
        session.getattr(ROOT)


def test_the_event_channel_answers_pings_by_tag(session: Session) -> None:
    for tag in (1, 1 << 63):
        assert session.event().ask("PING", tag=tag) == 0
