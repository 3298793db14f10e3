"""What an engine must refuse, and with which errno: names, nodes, handles, types, read-only sessions, sources."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import NOBODY, ROOT

from qtfs_client.connection import HandshakeError, SessionLostError


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> int:
    """The errno that a call is refused with."""
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno is not None
    return caught.value.errno


# ---- names

BAD_NAMES = [
    (b"", errno.EINVAL),
    (b".", errno.EINVAL),
    (b"..", errno.EINVAL),
    (b"a/b", errno.EINVAL),
    (b"/", errno.EINVAL),
    (b"/etc", errno.EINVAL),
    (b"a\0b", errno.EINVAL),
    (b"\0", errno.EINVAL),
    (b"x" * 256, errno.ENAMETOOLONG),
    (b"x" * 4000, errno.ENAMETOOLONG),
    (b"../" * 100, errno.ENAMETOOLONG),
]
#: Operations that take a name, with what stands before it.
NAMED = {
    "LOOKUP": b"",
    "MKNOD": struct.pack("<II", stat.S_IFREG | 0o644, 0),
    "MKDIR": struct.pack("<II", 0o755, 0),
    "LINK": struct.pack("<Q", ROOT),
    "UNLINK": b"",
    "RMDIR": b"",
    "CREATE": struct.pack("<IIII", os.O_RDWR, 0o644, 0, 0),
}


@pytest.mark.parametrize("op", NAMED)
@pytest.mark.parametrize(("name", "error"), BAD_NAMES, ids=lambda value: repr(value)[:12])
def test_what_is_no_component_is_refused(session: Session, share: Path, op: str, name: bytes, error: int) -> None:
    assert session.ask(op, NAMED[op] + name).error == error
    assert os.listdir(share) == []


@pytest.mark.parametrize(("name", "error"), BAD_NAMES, ids=lambda value: repr(value)[:12])
def test_bad_names_of_rename_and_symlink_are_refused(session: Session, share: Path, name: bytes, error: int) -> None:
    (share / "good").touch()
    assert refusal(session.rename, ROOT, name, ROOT, b"new") == error
    assert refusal(session.rename, ROOT, b"good", ROOT, name) == error
    assert refusal(session.symlink, ROOT, name, b"target") == error
    assert os.listdir(share) == ["good"]


@pytest.mark.parametrize(("target", "error"), [(b"", errno.EINVAL), (b"a\0b", errno.EINVAL), (b"x" * 4096, 36)])
def test_bad_targets_of_symlinks_are_refused(session: Session, share: Path, target: bytes, error: int) -> None:
    assert refusal(session.symlink, ROOT, b"link", target) == error
    assert os.listdir(share) == []


def test_dots_never_lead_out_of_the_mount(session: Session, share: Path) -> None:
    """A `..` in a symbolic link is the client's to follow; every component of it is refused here."""
    link = session.symlink(ROOT, b"out", b"..")
    assert refusal(session.lookup, link.node, b"anything") == errno.ENOTDIR
    (share / "d").mkdir()
    assert refusal(session.lookup, session.lookup(ROOT, b"d").node, b"..") == errno.EINVAL


# ---- what the kernel says


def test_errors_of_names_are_the_servers(session: Session, share: Path) -> None:
    (share / "file").touch()
    (share / "full").mkdir()
    (share / "full/x").touch()
    file = session.lookup(ROOT, b"file").node
    full = session.lookup(ROOT, b"full").node
    cases: list[tuple[int, Callable[[], object]]] = [
        (errno.ENOENT, lambda: session.lookup(ROOT, b"missing")),
        (errno.ENOENT, lambda: session.unlink(ROOT, b"missing")),
        (errno.ENOENT, lambda: session.rmdir(ROOT, b"missing")),
        (errno.ENOENT, lambda: session.rename(ROOT, b"missing", ROOT, b"x")),
        (errno.ENOTDIR, lambda: session.lookup(file, b"x")),
        (errno.ENOTDIR, lambda: session.mkdir(file, b"x")),
        (errno.ENOTDIR, lambda: session.rmdir(ROOT, b"file")),
        (errno.ENOTDIR, lambda: session.opendir(file)),
        (errno.ENOTDIR, lambda: session.rename(ROOT, b"full", ROOT, b"file")),
        (errno.EEXIST, lambda: session.mkdir(ROOT, b"full")),
        (errno.EEXIST, lambda: session.mknod(ROOT, b"file", stat.S_IFREG)),
        (errno.EEXIST, lambda: session.symlink(ROOT, b"file", b"x")),
        (errno.EEXIST, lambda: session.link(file, ROOT, b"full")),
        (errno.ENOTEMPTY, lambda: session.rmdir(ROOT, b"full")),
        (errno.EISDIR, lambda: session.unlink(ROOT, b"full")),
        (errno.EISDIR, lambda: session.rename(ROOT, b"file", ROOT, b"full")),
        (errno.EINVAL, lambda: session.rename(ROOT, b"full", full, b"below-itself")),
        (errno.EPERM, lambda: session.link(full, ROOT, b"second")),
        (errno.EINVAL, lambda: session.readlink(file)),
        (errno.EPERM, lambda: session.mknod(ROOT, b"d", stat.S_IFDIR | 0o755)),
    ]
    for expected, call in cases:
        assert refusal(call) == expected
    assert sorted(os.listdir(share)) == ["file", "full"]


def test_directories_links_sockets_and_unnamed_devices_are_not_opened(session: Session, share: Path) -> None:
    (share / "directory").mkdir()
    (share / "link").symlink_to("x")
    os.mknod(share / "tty", stat.S_IFCHR | 0o666, os.makedev(5, 0))
    os.mknod(share / "socket", stat.S_IFSOCK | 0o666)
    expected = {"directory": errno.EISDIR, "link": errno.ELOOP, "tty": errno.EACCES, "socket": errno.ENXIO}
    for name, error in expected.items():
        node = session.lookup(ROOT, name.encode()).node
        for flags in (os.O_RDONLY, os.O_WRONLY, os.O_RDWR | os.O_NONBLOCK, os.O_RDONLY | os.O_TRUNC):
            assert refusal(session.open, node, flags) == error, (name, flags)
        assert refusal(session.create, ROOT, name.encode(), os.O_RDWR) == errno.ESTALE, name


def test_create_never_follows_a_symlink(session: Session, share: Path, tmp_path: Path) -> None:
    (share / "link").symlink_to(tmp_path / "outside")
    assert refusal(session.create, ROOT, b"link", os.O_RDWR | os.O_EXCL) == errno.EEXIST
    assert refusal(session.create, ROOT, b"link", os.O_RDWR) == errno.ESTALE
    assert not (tmp_path / "outside").exists()


def test_a_failed_create_counts_no_lookup(session: Session, share: Path, engine: EngineProcess) -> None:
    (share / "file").touch(0o600)
    (share / "link").symlink_to("x")
    before = engine.figures()["sessions"][0]["nodes"]
    for name in (b"file", b"link"):
        refusal(session.create, ROOT, name, os.O_RDWR, who=NOBODY)
    assert engine.figures()["sessions"][0]["nodes"] == before


# ---- nodes and handles that are not there


@pytest.mark.parametrize("node", [0, 2, 77, 1 << 32 | 1, (1 << 64) - 1, 1 << 24, 0xFFFFFFFF])
def test_invented_nodes_are_stale(session: Session, node: int) -> None:
    assert refusal(session.getattr, node) == errno.ESTALE
    assert refusal(session.lookup, node, b"x") == errno.ESTALE
    assert refusal(session.link, node, ROOT, b"x") == errno.ESTALE
    assert refusal(session.rename, ROOT, b"x", node, b"y") == errno.ESTALE
    session.forget((node, 1))


def test_forgotten_nodes_are_stale_and_their_number_does_not_come_back(session: Session, share: Path) -> None:
    (share / "f").touch()
    seen = set()
    for _ in range(100):
        node = session.lookup(ROOT, b"f").node
        assert node not in seen
        seen.add(node)
        session.forget((node, 1))
        assert refusal(session.getattr, node) == errno.ESTALE


def test_the_root_cannot_be_forgotten(session: Session) -> None:
    session.forget((ROOT, 1), (ROOT, 1 << 60))
    assert stat.S_ISDIR(session.getattr(ROOT).mode)


@pytest.fixture
def other(engine: EngineProcess, share: Path) -> Iterator[Session]:
    with Session(engine.address, share) as opened:
        yield opened


HANDLE_CALLS: dict[str, Callable[[Session, int], object]] = {
    "READ": lambda s, h: s.read(h, 0, 10),
    "WRITE": lambda s, h: s.write(h, 0, b"x"),
    "RELEASE": lambda s, h: s.release(h),
    "RELEASEDIR": lambda s, h: s.release(h, op="RELEASEDIR"),
    "FLUSH": lambda s, h: s.flush(h),
    "FSYNC": lambda s, h: s.fsync(h),
    "FSYNCDIR": lambda s, h: s.fsync(h, op="FSYNCDIR"),
    "READDIR": lambda s, h: s.readdir(h),
    "FALLOCATE": lambda s, h: s.fallocate(h, 0, 1),
    "LSEEK": lambda s, h: s.lseek(h, 0, os.SEEK_DATA),
    "COPY_FILE_RANGE": lambda s, h: s.copy(h, 0, h, 0, 1),
    "IOCTL": lambda s, h: s.ioctl(h, 0x80086601, out_size=4),
    "SETLK": lambda s, h: s.setlk(h, 1, 0),
    "GETLK": lambda s, h: s.getlk(h, 1, 0),
}


@pytest.mark.parametrize("op", HANDLE_CALLS)
def test_handles_invented_ended_or_foreign_are_stale(session: Session, other: Session, share: Path, op: str) -> None:
    (share / "f").write_text("text")
    call = HANDLE_CALLS[op]
    foreign = other.open(other.lookup(ROOT, b"f").node, os.O_RDWR).handle
    ended = session.open(session.lookup(ROOT, b"f").node, os.O_RDWR).handle
    session.release(ended)
    for handle in (0, 1, 2, 3, ended, ended ^ 1, foreign, (1 << 64) - 1, 1 << 33, 1 << 21):
        assert refusal(call, session, handle) == errno.ESTALE, handle
    assert other.read(foreign, 0, 10) == b"text"
    other.release(foreign)


def test_handles_are_reused_under_other_numbers(session: Session, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    seen = set()
    for _ in range(50):
        handle = session.open(node).handle
        assert handle not in seen
        seen.add(handle)
        session.release(handle)


def test_foreign_nodes_are_stale(session: Session, other: Session, share: Path) -> None:
    (share / "f").touch()
    node = other.lookup(ROOT, b"f").node
    assert refusal(session.getattr, node) == errno.ESTALE


def test_a_directory_handle_is_for_directories_only(session: Session, share: Path) -> None:
    (share / "f").touch()
    directory = session.opendir(ROOT)
    file = session.open(session.lookup(ROOT, b"f").node).handle
    assert refusal(session.read, directory, 0, 10) == errno.EISDIR
    assert refusal(session.write, directory, 0, b"x") == errno.EBADF
    assert refusal(session.readdir, file) == errno.ENOTDIR
    session.release(directory, op="RELEASEDIR")
    session.release(file)


# ---- read-only sessions


def test_a_read_only_session_changes_nothing(engine: EngineProcess, share: Path) -> None:
    (share / "f").write_text("text")
    (share / "d").mkdir()
    with Session(engine.address, share, read_only=True) as session:
        file, directory = session.lookup(ROOT, b"f").node, session.lookup(ROOT, b"d").node
        cases: list[Callable[[], object]] = [
            lambda: session.mkdir(ROOT, b"x"),
            lambda: session.mknod(ROOT, b"x", stat.S_IFREG),
            lambda: session.symlink(ROOT, b"x", b"y"),
            lambda: session.link(file, ROOT, b"x"),
            lambda: session.unlink(ROOT, b"f"),
            lambda: session.rmdir(ROOT, b"d"),
            lambda: session.rename(ROOT, b"f", directory, b"f"),
            lambda: session.create(ROOT, b"x"),
            lambda: session.create(ROOT, b"f", os.O_RDWR),
            lambda: session.tmpfile(ROOT),
            lambda: session.open(file, os.O_WRONLY),
            lambda: session.open(file, os.O_RDWR),
            lambda: session.open(file, os.O_RDONLY | os.O_TRUNC),
            lambda: session.setattr(file, mode=0o600),
            lambda: session.setattr(file, size=0),
            lambda: session.setxattr(file, b"user.a", b"1"),
            lambda: session.removexattr(file, b"user.a"),
        ]
        for call in cases:
            assert refusal(call) == errno.EROFS
        opened = session.open(file)
        assert session.read(opened.handle, 0, 10) == b"text"
        assert refusal(session.ioctl, opened.handle, 0x40086602, bytes(4)) == errno.EROFS
        assert refusal(session.fallocate, opened.handle, 0, 10) in (errno.EROFS, errno.EBADF)
        session.release(opened.handle)
        handle = session.opendir(ROOT)
        assert {d.name for d in session.entries(handle)} == {b".", b"..", b"f", b"d"}
        session.release(handle, op="RELEASEDIR")
    assert sorted(os.listdir(share)) == ["d", "f"] and (share / "f").read_text() == "text"


# ---- sources of a mount


@pytest.mark.parametrize("slots", [0, 65, 1 << 31])
def test_a_number_of_slots_out_of_range_is_refused(engine: EngineProcess, share: Path, slots: int) -> None:
    with pytest.raises(HandshakeError) as caught:
        Session(engine.address, share, slots=slots)
    assert caught.value.errno == errno.EINVAL


@pytest.mark.parametrize(
    ("source", "error"),
    [("relative", errno.EINVAL), ("", errno.EINVAL), ("/" * 4096, errno.EINVAL), ("/a\0b", errno.EINVAL)],
)
def test_a_source_that_is_no_absolute_path_is_refused(engine: EngineProcess, source: str, error: int) -> None:
    with pytest.raises(HandshakeError) as caught:
        Session(engine.address, source)
    assert caught.value.errno == error


def test_a_source_must_be_a_directory(engine: EngineProcess, share: Path) -> None:
    (share / "file").touch()
    for name, error in (("file", errno.ENOTDIR), ("missing", errno.ENOENT), ("file/below", errno.ENOTDIR)):
        with pytest.raises(HandshakeError) as caught:
            Session(engine.address, share / name)
        assert caught.value.errno == error


def test_a_source_may_lead_through_symbolic_links(engine: EngineProcess, share: Path) -> None:
    (share / "d").mkdir()
    (share / "link").symlink_to("d")
    with Session(engine.address, share / "link") as session:
        session.mkdir(ROOT, b"made")
    assert (share / "d/made").is_dir()


def test_a_source_whose_real_path_is_too_long_is_refused(engine: EngineProcess, share: Path) -> None:
    """A symbolic link leads where no path of that length does. Each attempt gives back what it opened."""
    names = ["d" * 255] * 18
    directory = os.open(share, os.O_RDONLY)
    for name in names:
        os.mkdir(name, dir_fd=directory)
        below = os.open(name, os.O_RDONLY, dir_fd=directory)
        os.close(directory)
        directory = below
    os.close(directory)
    (share / "link").symlink_to("/".join(names[:12]))
    before = engine.descriptors()
    for _ in range(5):
        with pytest.raises(HandshakeError) as caught:
            Session(engine.address, share / "link" / "/".join(names[12:]))
        assert caught.value.errno == errno.ENAMETOOLONG
    wait_until(lambda: engine.descriptors() <= before, "the engine to close the directory", 5)
    shutil.rmtree(share / names[0])


# ---- joining a session


def test_joining_needs_the_secret_and_a_slot_that_exists(engine: EngineProcess, session: Session) -> None:
    ticket = session.ticket
    wrong = type(ticket)(ticket.session, bytes(32), ticket.slots, ticket.grace_s)
    unknown = type(ticket)(ticket.session ^ 2, ticket.secret, ticket.slots, ticket.grace_s)
    for bad, slot, error in (
        (wrong, 1, errno.EACCES),
        (ticket, ticket.slots, errno.EINVAL),
        (unknown, 1, errno.ESTALE),
    ):
        with pytest.raises(HandshakeError) as caught:
            session.engine.attach(bad, slot)
        assert caught.value.errno == error
    assert session.getattr(ROOT).nlink


def test_a_detached_session_is_forgotten(engine: EngineProcess, share: Path) -> None:
    session = Session(engine.address, share)
    session.detach()
    with pytest.raises(SessionLostError):
        session.engine.attach(session.ticket, 0)


def test_attaching_a_slot_again_cuts_its_older_connection(session: Session) -> None:
    older = session.slot(1)
    connection, last = session.engine.attach(session.ticket, 1)
    with pytest.raises(OSError):
        older.receive()
    assert last == 0
    connection.close()
