"""The server's mounts as a session meets them: what holds them, what is told of them, how they are listed."""

from __future__ import annotations

import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.leaks import descriptors
from harness.server_machine import ALONE, ServerMachine
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_common.protocol import OPERATIONS
from qtfs_common.remote_calls import ListCall, MountRecord, pack_list, parse_page, stale_names


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerMachine]:
    with ServerMachine(tmp_path).running() as machine:
        for name in ("a", "b", "c"):
            (machine.share / name).mkdir()
        yield machine


@pytest.fixture
def session(server: ServerMachine) -> Iterator[Session]:
    with Session(server.address, server.share, watch=True) as opened:
        yield opened


def refusal(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


def mounts(session: Session, size: int = 1 << 20) -> list[MountRecord]:
    """The whole listing, in replies of at most so many bytes."""
    found: list[MountRecord] = []
    token = 0
    while True:
        page = parse_page(session.call("LIST_MOUNTS", pack_list(ListCall(token, len(found), size))))
        assert not found or page.token == token
        token = page.token
        found += page.mounts
        if len(found) == page.total:
            return found


def changes(session: Session) -> list[tuple[int, bytes]]:
    """The next MOUNTS_CHANGED that names something."""
    while True:
        message = session.event().receive()
        assert (message.op, message.flags, message.error) == (OPERATIONS["MOUNTS_CHANGED"], 0, 0)
        if message.body:
            return list(stale_names(message.body))


# ---- what holds a mount


def test_a_mount_that_was_looked_at_can_be_unmounted(server: ServerMachine, session: Session) -> None:
    server.mount_tmpfs("a", *(f"f{number}" for number in range(300)))
    directory = session.lookup(ROOT, b"a").node
    for number in range(300):
        session.lookup(directory, b"f%d" % number)
    before = server.descriptors()
    server.umount("a")
    assert server.descriptors() <= before - 300
    assert refusal(session.getattr, directory) == errno.ESTALE
    assert session.lookup(ROOT, b"a").node != directory


def test_nodes_that_were_let_go_come_back(server: ServerMachine, session: Session) -> None:
    """By file handle: a directory that was renamed meanwhile too."""
    server.mount_tmpfs("a")
    server.mount_tmpfs("b")
    server.run("mkdir -p a/d/deeper; echo 1 >a/d/deeper/f")
    directory = session.walk("a/d").node
    deeper = session.lookup(directory, b"deeper").node
    session.lookup(ROOT, b"b")
    server.umount("b")                  # so what is as old as that look is let go
    server.run("mv a/d a/e")
    assert session.lookup(directory, b"deeper").node == deeper
    assert session.lookup(deeper, b"f").attr.size == 2


def test_nodes_come_back_by_path_where_handles_do_not_serve(tmp_path: Path) -> None:
    """open_by_handle_at(2) takes a capability."""
    within = (*ALONE, "setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")
    with ServerMachine(tmp_path, within=within).running() as server:
        for name in ("a", "b"):
            (server.share / name).mkdir()
            server.mount_tmpfs(name, "f")
        with Session(server.address, server.share) as session:
            node = session.walk("a/f").node
            session.lookup(ROOT, b"b")
            server.umount("b")
            assert session.getattr(node).size == 2
            server.umount("a")


def test_out_of_descriptors_no_other_one_is_taken_for_a_mounts(server: ServerMachine, session: Session) -> None:
    """Nor closed as such. The node comes back once there are descriptors again."""
    server.mount_tmpfs("a", "f")
    place = os.fspath(server.share / "a")
    node = session.walk("a/f").node

    def is_let_go() -> bool:
        return not any(path.startswith(place) for path in descriptors(server.pid).values())

    wait_until(is_let_go, "the mount to be let go")
    with server.without_descriptors():
        assert refusal(session.getattr, node) in (errno.EMFILE, errno.ESTALE)
    assert session.getattr(node).size == 2
    wait_until(is_let_go, "the mount to be let go again")
    server.umount("a")


def test_an_open_file_holds_its_mount(server: ServerMachine, session: Session) -> None:
    server.mount_tmpfs("a", "f")
    server.mount_tmpfs("b")
    opened = session.open(session.walk("a/f").node)
    session.lookup(ROOT, b"b")
    server.umount("b")
    assert not server.try_umount("a")
    assert session.read(opened.handle, 0, 10) == b"f\n"
    session.release(opened.handle)
    server.umount("a")


def test_an_unlinked_file_does_not_hold_its_mount(server: ServerMachine, session: Session) -> None:
    server.mount_tmpfs("a", "f")
    node = session.walk("a/f").node
    session.unlink(session.lookup(ROOT, b"a").node, b"f")
    assert session.getattr(node).nlink == 0
    server.umount("a")
    assert refusal(session.getattr, node) == errno.ESTALE


def test_a_file_that_is_mounted_on_a_file(server: ServerMachine, session: Session) -> None:
    (server.share / "above").write_text("above")
    (server.share / "below").write_text("under it")
    server.run("mount --bind above below")
    server.mount_tmpfs("b")
    node = session.lookup(ROOT, b"below").node
    session.lookup(ROOT, b"b")
    server.umount("b")
    assert session.getattr(node).size == 5
    server.umount("below")
    assert session.lookup(ROOT, b"below").attr.size == 8


def test_a_lazy_umount_ends_nodes_but_not_open_files(server: ServerMachine, session: Session) -> None:
    server.mount_tmpfs("a", "f", "g")
    directory = session.lookup(ROOT, b"a").node
    opened = session.open(session.lookup(directory, b"f").node)
    idle = session.lookup(directory, b"g").node
    server.run("umount -l a")
    wait_until(lambda: _is_stale(session, idle), "the node to be given up")
    assert session.read(opened.handle, 0, 10) == b"f\n"
    assert session.lookup(ROOT, b"a").node != directory


def _is_stale(session: Session, node: int) -> bool:
    try:
        session.getattr(node)
    except OSError as error:
        assert error.errno == errno.ESTALE
        return True
    return False


def test_another_mount_at_the_same_place_is_another(server: ServerMachine, session: Session) -> None:
    """tmpfs gets the same device number again, the mount the same number, the root the same inode."""
    seen = set()
    for number in range(20):
        server.mount_tmpfs("a", str(number))
        directory = session.lookup(ROOT, b"a").node
        assert directory not in seen
        assert session.lookup(directory, b"%d" % number).node
        seen.add(directory)
        server.umount("a")
    session.forget(*((node, 1) for node in seen))


def test_numbers_of_mounts_that_are_gone_serve_again(server: ServerMachine, session: Session) -> None:
    """Only 65535 mounts of a session can be told apart at a time, not in all its life."""
    inodes = set()
    for _ in range(6):
        server.mount_tmpfs("a")
        found = session.lookup(ROOT, b"a")
        inodes.add(found.attr.ino)
        server.umount("a")
        session.forget((found.node, 1))
    assert len(inodes) <= 2


def test_the_roots_mount_is_held_unless_it_is_to_be_let_go(server: ServerMachine) -> None:
    server.mount_tmpfs("a", "f")
    server.mount_tmpfs("b")
    with Session(server.address, server.share / "a") as holding, Session(server.address, server.share) as other:
        other.lookup(ROOT, b"b")
        server.umount("b")
        assert not server.try_umount("a")
        assert holding.lookup(ROOT, b"f").node
    with Session(server.address, server.share / "a", let_go=True) as leaving:
        node = leaving.lookup(ROOT, b"f").node
        server.umount("a")
        assert refusal(leaving.getattr, ROOT) == refusal(leaving.getattr, node) == errno.ESTALE
        assert refusal(leaving.lookup, ROOT, b"f") == errno.ESTALE


# ---- MOUNTS_CHANGED


def test_names_that_lead_elsewhere_are_told(server: ServerMachine, session: Session) -> None:
    (server.share / "a/unknown").mkdir()
    session.event()
    server.mount_tmpfs("b")
    assert changes(session) == [(ROOT, b"b")]
    node = session.lookup(ROOT, b"b").node
    server.run("mkdir b/inner")
    server.mount_tmpfs("b/inner")
    assert changes(session) == [(node, b"inner")]
    server.umount("b/inner")
    assert changes(session) == [(node, b"inner")]
    server.mount_tmpfs("a/unknown")
    message = session.event().receive()
    assert (message.op, message.body) == (OPERATIONS["MOUNTS_CHANGED"], b"")


def test_who_does_not_watch_is_not_told(server: ServerMachine, session: Session) -> None:
    session.event()
    with Session(server.address, server.share) as silent:
        silent.event()
        server.mount_tmpfs("b")
        changes(session)
        assert silent.event().ask("PING") == 0


def test_mounts_elsewhere_are_nobodys_business(server: ServerMachine, session: Session, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    session.event()
    server.run(f"mount -t tmpfs none {tmp_path}/elsewhere")
    server.mount_tmpfs("b")
    assert changes(session) == [(ROOT, b"b")]


# ---- LIST_MOUNTS


def test_mounts_are_listed_as_a_walk_meets_them(server: ServerMachine, session: Session) -> None:
    assert mounts(session) == []
    server.mount_tmpfs("b", options="size=8k,nosuid")
    server.run("mkdir 'b/in ner'; mount -t tmpfs 'a source' 'b/in ner'")
    server.mount_tmpfs("a")
    found = {record.path: record for record in mounts(session)}
    assert list(found) == sorted(found, key=lambda path: (path.count(b"/"), path)) or set(found) == {
        b"a", b"b", b"b/in ner"
    }
    assert found[b"b/in ner"].parent == found[b"b"].id
    assert (found[b"b/in ner"].type, found[b"b/in ner"].source) == (b"tmpfs", b"a source")
    assert b"nosuid" in found[b"b"].options and b"size=8k" in found[b"b"].super_options
    node = session.walk("b")
    assert node.attr.ino >> 48 != 0


def test_of_stacked_mounts_the_topmost_is_listed(server: ServerMachine, session: Session) -> None:
    server.mount_tmpfs("a")
    server.run("mkdir a/hidden; mount -t tmpfs hidden a/hidden")
    server.run("mount -t tmpfs top a; mkdir a/shown; mount -t tmpfs shown a/shown")
    assert [(record.path, record.source) for record in mounts(session)] == [(b"a", b"top"), (b"a/shown", b"shown")]


def test_what_covers_the_root_is_not_below_it(server: ServerMachine, session: Session) -> None:
    server.run(f"mount -t tmpfs over '{server.share}'; cd '{server.share}'; mkdir x; mount -t tmpfs x x")
    assert mounts(session) == []
    assert session.lookup(ROOT, b"a").node


def test_a_listing_in_many_replies(server: ServerMachine, session: Session) -> None:
    server.run("for i in $(seq 30); do mkdir b/$i; mount -t tmpfs t$i b/$i; done")
    whole = mounts(session)
    assert sorted(record.source for record in whole) == sorted(b"t%d" % number for number in range(1, 31))
    assert mounts(session, 1000) == whole
    assert refusal(session.call, "LIST_MOUNTS", struct.pack("<QII", 0, 0, 40)) == errno.EINVAL


def test_ids_are_not_used_again(server: ServerMachine, session: Session) -> None:
    seen = set()
    for _ in range(5):
        server.mount_tmpfs("a")
        (record,) = mounts(session)
        assert record.id not in seen
        seen.add(record.id)
        server.umount("a")
