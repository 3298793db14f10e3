"""The whitelist as an engine applies it: each type, component boundaries, both ends, reload under open sessions."""

from __future__ import annotations

import errno
import os
import signal
import stat
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import PATH_TYPES, EngineProcess, Rules, everything_below
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import NOBODY, ROOT

from qtfs_client.connection import HandshakeError
from qtfs_common.whitelist import Type

RENAME_EXCHANGE = 2
SETFLAGS = 0x40086602


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno is not None
    return caught.value.errno


@pytest.fixture(scope="module")
def ruled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine whose rules the tests change."""
    with EngineProcess(tmp_path_factory.mktemp("ruled")).running() as engine:
        yield engine
        engine.expect_log("the whitelist stays as it was")


def all_but(path: Path, *types: Type) -> Rules:
    """Everything below `path`, except some types, which are allowed elsewhere only."""
    return {**everything_below(path), **{kind: ["/nowhere"] for kind in types}}


class Play:
    """A session with one of everything to try operations on, made while all was allowed."""

    def __init__(self, session: Session, share: Path) -> None:
        self.session = session
        self.share = share
        (share / "file").write_text("text")
        os.setxattr(share / "file", "user.x", b"1")
        (share / "empty").mkdir()
        self.file = session.lookup(ROOT, b"file").node
        self.empty = session.lookup(ROOT, b"empty").node
        self.handle = session.open(self.file, os.O_RDWR).handle
        self.other = session.create(ROOT, b"other")[1].handle
        self.directory = session.opendir(ROOT)


OPERATIONS: dict[str, tuple[Type, Callable[[Play], object]]] = {
    "open": (Type.OPEN, lambda p: p.session.release(p.session.open(p.file).handle)),
    "open to read": (Type.READ, lambda p: p.session.release(p.session.open(p.file).handle)),
    "open to write": (Type.WRITE, lambda p: p.session.release(p.session.open(p.file, os.O_WRONLY).handle)),
    "open both ways": (Type.READ, lambda p: p.session.release(p.session.open(p.file, os.O_RDWR).handle)),
    "read": (Type.READ, lambda p: p.session.read(p.handle, 0, 4)),
    "write": (Type.WRITE, lambda p: p.session.write(p.handle, 0, b"TEXT")),
    "truncate": (Type.WRITE, lambda p: p.session.setattr(p.file, size=4)),
    "truncate by handle": (Type.WRITE, lambda p: p.session.setattr(p.file, size=4, handle=p.handle)),
    "allocate": (Type.WRITE, lambda p: p.session.fallocate(p.handle, 0, 4096, 1)),
    "copy from": (Type.READ, lambda p: p.session.copy(p.handle, 0, p.other, 0, 4)),
    "copy to": (Type.WRITE, lambda p: p.session.copy(p.handle, 0, p.other, 0, 4)),
    "opendir": (Type.READDIR, lambda p: p.session.release(p.session.opendir(ROOT))),
    "readdir": (Type.READDIR, lambda p: p.session.readdir(p.directory)),
    "mkdir": (Type.MKDIR, lambda p: p.session.mkdir(ROOT, b"made")),
    "rmdir": (Type.RMDIR, lambda p: p.session.rmdir(ROOT, b"empty")),
    "mknod": (Type.CREATE, lambda p: p.session.mknod(ROOT, b"made", stat.S_IFREG | 0o600)),
    "create": (Type.CREATE, lambda p: p.session.release(p.session.create(ROOT, b"made")[1].handle)),
    "symlink": (Type.CREATE, lambda p: p.session.symlink(ROOT, b"made", b"target")),
    "link": (Type.CREATE, lambda p: p.session.link(p.file, ROOT, b"made")),
    "tmpfile": (Type.CREATE, lambda p: p.session.release(p.session.tmpfile(ROOT)[1].handle)),
    "unlink": (Type.UNLINK, lambda p: p.session.unlink(ROOT, b"file")),
    "rename": (Type.RENAME, lambda p: p.session.rename(ROOT, b"file", ROOT, b"moved")),
    "chmod": (Type.SETATTR, lambda p: p.session.setattr(p.file, mode=0o600)),
    "chown": (Type.SETATTR, lambda p: p.session.setattr(p.file, uid=1)),
    "utime": (Type.SETATTR, lambda p: p.session.setattr(p.file, mtime=(1, 1))),
    "inode flags": (Type.SETATTR, lambda p: p.session.ioctl(p.handle, SETFLAGS, struct.pack("<I", 0x40))),
    "setxattr": (Type.SETXATTR, lambda p: p.session.setxattr(p.file, b"user.y", b"2")),
    "removexattr": (Type.SETXATTR, lambda p: p.session.removexattr(p.file, b"user.x")),
}


def snapshot(directory: Path) -> dict[str, object]:
    """Everything about a flat directory that a refused operation must not change."""
    found: dict[str, object] = {}
    for path in sorted(directory.iterdir()):
        st = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        xattrs = os.listxattr(path, follow_symlinks=False)
        found[path.name] = (
            st.st_mode,
            st.st_uid,
            st.st_nlink,
            st.st_size,
            st.st_blocks,
            st.st_mtime_ns,
            content,
            xattrs,
        )
    return found


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_needs_its_type_and_no_other(ruled: EngineProcess, share: Path, name: str) -> None:
    """Refused while its type is missing, whatever else is allowed; done on the same session after a reload."""
    kind, operate = OPERATIONS[name]
    ruled.reload(everything_below(share))
    with Session(ruled.address, share) as session:
        play = Play(session, share)
        ruled.reload(all_but(share, kind))
        before = snapshot(share)
        denied = ruled.figures()["denials"].get(kind.name, 0)
        assert refusal(operate, play) == errno.EACCES
        assert snapshot(share) == before
        assert ruled.figures()["denials"][kind.name] > denied
        ruled.reload(all_but(share, *(other for other in PATH_TYPES if other not in NEEDS_TOO.get(name, {kind}))))
        operate(play)


#: What an operation needs besides its own type.
NEEDS_TOO = {
    "open": {Type.OPEN, Type.READ},
    "open to read": {Type.OPEN, Type.READ},
    "open to write": {Type.OPEN, Type.WRITE},
    "open both ways": {Type.OPEN, Type.READ, Type.WRITE},
    "copy from": {Type.READ, Type.WRITE},
    "copy to": {Type.READ, Type.WRITE},
    "create": {Type.CREATE, Type.OPEN, Type.READ, Type.WRITE},
    "tmpfile": {Type.CREATE, Type.OPEN, Type.READ, Type.WRITE},
}


def test_a_change_of_nothing_needs_a_type(ruled: EngineProcess, share: Path) -> None:
    """It takes suid away and is a change, whatever it does not set."""
    (share / "suid").touch()
    (share / "suid").chmod(0o4755)
    ruled.reload(everything_below(share))
    with Session(ruled.address, share) as session:
        node = session.lookup(ROOT, b"suid").node
        ruled.reload(all_but(share, Type.WRITE, Type.SETATTR))
        assert refusal(session.setattr, node) == errno.EACCES
        rule = f'[[rule]]\npath = "{share}/suid"\naction = "readonly"\n'
        ruled.reload(everything_below(share), rule)
        assert refusal(session.setattr, node) == errno.EROFS
        assert (share / "suid").stat().st_mode & 0o4000
        for kind in (Type.WRITE, Type.SETATTR):
            (share / "suid").chmod(0o4755)
            ruled.reload(all_but(share, kind), "")
            assert session.setattr(node).mode & 0o7777 == 0o755


def test_a_size_is_set_through_a_handle_of_the_file_only(ruled: EngineProcess, share: Path) -> None:
    """Else the rules would be asked for one file and another would be cut."""
    ruled.reload(everything_below(share))
    (share / "decoy").write_text("text")
    (share / "kept").write_text("text")
    with Session(ruled.address, share) as session:
        decoy, kept = (session.lookup(ROOT, name).node for name in (b"decoy", b"kept"))
        handle = session.open(kept, os.O_RDWR).handle
        assert refusal(session.setattr, decoy, size=0, handle=handle) == errno.EINVAL
        session.release(handle)
    assert (share / "decoy").read_text() == (share / "kept").read_text() == "text"


def test_what_only_looks_is_always_allowed(ruled: EngineProcess, share: Path) -> None:
    """Names and attributes below a mount are the mount's own; only what they hold is a type's."""
    (share / "file").write_text("text")
    (share / "link").symlink_to("file")
    ruled.reload({Type.MOUNT: [share]})
    with Session(ruled.address, share) as session:
        file, link = session.lookup(ROOT, b"file").node, session.lookup(ROOT, b"link").node
        assert session.getattr(file).size == 4 and session.readlink(link) == b"file"
        session.access(file, os.R_OK)
        session.statfs()
        assert session.listxattr(file) == b""
        assert refusal(session.open, file) == errno.EACCES


def test_rules_end_at_component_boundaries(ruled: EngineProcess, share: Path) -> None:
    for name in ("a", "ab", "b"):
        (share / name).mkdir()
    ruled.reload({Type.MOUNT: [share], Type.MKDIR: [share / "a", f"{share}/b/x//"]})
    with Session(ruled.address, share) as session:
        nodes = {name: session.lookup(ROOT, name).node for name in (b"a", b"ab", b"b")}
        session.mkdir(nodes[b"a"], b"x")
        session.mkdir(session.lookup(nodes[b"a"], b"x").node, b"deep")
        assert refusal(session.mkdir, nodes[b"ab"], b"x") == errno.EACCES
        assert refusal(session.mkdir, ROOT, b"c") == errno.EACCES
        assert refusal(session.mkdir, nodes[b"b"], b"xy") == errno.EACCES
        session.mkdir(nodes[b"b"], b"x")


def test_a_rename_needs_both_ends(ruled: EngineProcess, share: Path) -> None:
    for name in ("in", "out"):
        (share / name).mkdir()
        (share / name / "f").write_text(name)
    ruled.reload({Type.MOUNT: [share], Type.RENAME: [share / "in"]})
    with Session(ruled.address, share) as session:
        inside, outside = session.lookup(ROOT, b"in").node, session.lookup(ROOT, b"out").node
        assert refusal(session.rename, inside, b"f", outside, b"g") == errno.EACCES
        assert refusal(session.rename, outside, b"f", inside, b"g") == errno.EACCES
        assert refusal(session.rename, inside, b"f", outside, b"f", RENAME_EXCHANGE) == errno.EACCES
        assert refusal(session.rename, outside, b"f", outside, b"g") == errno.EACCES
        session.rename(inside, b"f", inside, b"g")
    assert (share / "out/f").read_text() == "out" and (share / "in/g").read_text() == "in"


def test_a_second_name_does_not_widen_what_is_allowed(ruled: EngineProcess, share: Path) -> None:
    for name in ("secret", "open"):
        (share / name).mkdir()
        (share / name / "f").write_text(name)
    rules = {Type.MOUNT: [share], Type.CREATE: [share], Type.RENAME: [share]}
    ruled.reload({**rules, Type.OPEN: [share / "open"], Type.READ: [share / "open"]})
    with Session(ruled.address, share) as session:
        secret, target = session.walk("secret/f").node, session.walk("open").node
        assert refusal(session.link, secret, target, b"g") == errno.EACCES
        assert refusal(session.open, secret) == errno.EACCES
        session.link(session.walk("open/f").node, session.walk("secret").node, b"g")
    assert not (share / "open/g").exists() and (share / "secret/g").read_text() == "open"


@pytest.mark.parametrize("by_rename", [True, False])
def test_what_is_moved_comes_under_the_rules_of_its_new_place(
    ruled: EngineProcess, share: Path, by_rename: bool
) -> None:
    """Nodes below a directory that was moved are judged by where they are now, not by where they were found."""
    (share / "writable/d").mkdir(parents=True)
    (share / "fixed").mkdir()
    (share / "writable/d/f").write_text("x")
    ruled.reload({**all_but(share, Type.WRITE), Type.WRITE: [share / "writable"]})
    with Session(ruled.address, share) as session:
        file = session.walk("writable/d/f").node
        session.release(session.open(file, os.O_WRONLY).handle)
        if by_rename:
            session.rename(session.walk("writable").node, b"d", session.walk("fixed").node, b"d")
        else:
            os.rename(share / "writable/d", share / "fixed/d")
            assert session.walk("fixed/d/f").node == file
        assert refusal(session.open, file, os.O_WRONLY) == errno.EACCES
        session.release(session.open(file, os.O_RDONLY).handle)


def test_the_owner_of_the_data_is_asked_besides(ruled: EngineProcess, share: Path) -> None:
    """A rule is no permission: the server's kernel still decides for the caller."""
    ruled.reload(everything_below(share))
    denials = ruled.figures()["denials"]
    with Session(ruled.address, share) as session:
        assert refusal(session.mkdir, ROOT, b"d", who=NOBODY) == errno.EACCES
    assert ruled.figures()["denials"] == denials and os.listdir(share) == []


def test_denials_are_logged_once_per_type_and_reload(ruled: EngineProcess, share: Path) -> None:
    ruled.reload({Type.MOUNT: [share]})
    begin = len(ruled.log())
    with Session(ruled.address, share) as session:
        for number in range(5):
            assert refusal(session.mkdir, ROOT, b"%d" % number) == errno.EACCES
        assert refusal(session.unlink, ROOT, b"x") == errno.EACCES
    lines = ruled.log()[begin:].splitlines()
    assert len([line for line in lines if "[Mkdir]" in line]) == 1
    assert len([line for line in lines if "[Unlink]" in line]) == 1


# ---- mounting


def mount_refusal(engine: EngineProcess, source: Path) -> int:
    with pytest.raises(HandshakeError) as caught:
        Session(engine.address, source)
    return caught.value.errno


def test_a_mount_that_is_not_listed_is_refused_before_anything_is_told(ruled: EngineProcess, share: Path) -> None:
    (share / "d").mkdir()
    (share / "dd").mkdir()
    (share / "file").touch()
    (share / "d/out").symlink_to(share / "dd")
    ruled.reload({Type.MOUNT: [share / "d"]})
    denied = ruled.figures()["denials"].get("MOUNT", 0)
    refused = [share, share / "dd", share / "file", share / "missing", share / "d/out", share / "d/../dd", Path("/")]
    for source in refused:
        assert mount_refusal(ruled, source) == errno.EPERM, source
    assert ruled.figures()["denials"]["MOUNT"] == denied + len(refused)
    assert mount_refusal(ruled, share / "d/missing") == errno.ENOENT
    (share / "d/below").mkdir()
    for source in (share / "d", share / "d/below", Path(f"{share}/d//./below/")):
        Session(ruled.address, source).detach()


def test_a_session_outlives_the_rule_it_was_mounted_by(ruled: EngineProcess, share: Path) -> None:
    ruled.reload(everything_below(share))
    with Session(ruled.address, share) as session:
        ruled.reload({Type.MOUNT: ["/nowhere"]})
        assert session.getattr(ROOT).nlink
        assert mount_refusal(ruled, share) == errno.EPERM


# ---- reloading


@pytest.mark.parametrize("text", [b"[Nonsense]\nPath=/x\n", b"[Mount]\nPath=relative\n", b"[Open]\nPath=/\n", b"\0"])
def test_a_bad_list_changes_nothing(ruled: EngineProcess, share: Path, text: bytes) -> None:
    ruled.reload(everything_below(share))
    reloads, begin = ruled.figures()["reloads"], len(ruled.log())
    with Session(ruled.address, share) as session:
        ruled.whitelist.write_bytes(text)
        os.kill(ruled.pid, signal.SIGHUP)
        wait_until(lambda: ruled.figures()["reloads"] > reloads, "the list to be read")
        wait_until(lambda: "stays as it was" in ruled.log()[begin:], "the complaint")
        session.mkdir(ROOT, b"still-allowed")
    assert f"{ruled.whitelist}" in ruled.log()[begin:]


def test_many_reloads_while_requests_run(ruled: EngineProcess, share: Path) -> None:
    """Each request sees one list or the other, never half of one, and nothing breaks."""
    ruled.reload(everything_below(share))
    outcomes = set()
    with Session(ruled.address, share) as session:
        for round_ in range(20):
            allowed = round_ % 2 == 1
            ruled.allow(everything_below(share) if allowed else all_but(share, Type.MKDIR))
            os.kill(ruled.pid, signal.SIGHUP)
            for number in range(20):
                name = b"%d-%d" % (round_, number)
                reply = session.ask("MKDIR", struct.pack("<II", 0o755, 0) + name)
                outcomes.add(reply.error)
                assert reply.error in (0, errno.EACCES)
                assert (share / name.decode()).exists() == (reply.error == 0)
            for _ in range(2):  # what ends first may have begun before the list was written
                ruled.reload(everything_below(share) if allowed else all_but(share, Type.MKDIR))
            assert session.ask("MKDIR", struct.pack("<II", 0o755, 0) + b"%d" % round_).error == (
                0 if allowed else errno.EACCES
            )
    assert outcomes == {0, errno.EACCES}
