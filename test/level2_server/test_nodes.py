"""Nodes: one for each inode, kept as long as the client's kernel knows them, with or without a descriptor."""

from __future__ import annotations

import errno
import os
import resource
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_common.whitelist import Type

UNCACHED, SUBMOUNT = 1, 2
FILES = 20_000
RESERVED = 64
#: What the engine's nodes keep together at most.
NODE_DESCRIPTORS = 16_384
CHANGED = 2


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments, **options)
    assert caught.value.errno is not None
    return caught.value.errno


def nodes(engine: EngineProcess) -> int:
    """Of the only session."""
    (session,) = engine.figures()["sessions"]
    return int(session["nodes"])


def content(session: Session, node: int) -> bytes:
    opened = session.open(node)
    data = session.read(opened.handle, 0, 1000)
    session.release(opened.handle)
    return data


# ---- counts


def test_a_node_lives_until_all_its_lookups_are_returned(session: Session, engine: EngineProcess, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    for _ in range(9):
        assert session.lookup(ROOT, b"f").node == node
    assert nodes(engine) == 2
    session.forget((node, 4), (node, 5))
    assert stat.S_ISREG(session.getattr(node).mode)
    session.forget((node, 1))
    assert nodes(engine) == 1 and refusal(session.getattr, node) == errno.ESTALE


def test_returning_more_than_was_counted_is_returning_all(session: Session, engine: EngineProcess, share: Path) -> None:
    (share / "f").touch()
    node = session.lookup(ROOT, b"f").node
    session.forget((node, (1 << 64) - 1), (node, 1))
    assert nodes(engine) == 1


def test_an_open_handle_keeps_the_node(session: Session, engine: EngineProcess, share: Path) -> None:
    (share / "f").write_text("x")
    node = session.lookup(ROOT, b"f").node
    opened = session.open(node)
    session.forget((node, 1))
    assert session.getattr(node).size == 1 and nodes(engine) == 2
    session.release(opened.handle)
    assert nodes(engine) == 1


def test_names_of_one_file_are_one_node(session: Session, engine: EngineProcess, share: Path) -> None:
    (share / "d").mkdir()
    (share / "a").touch()
    for number in range(20):
        os.link(share / "a", share / "d" / str(number))
    directory = session.lookup(ROOT, b"d").node
    found = {session.lookup(directory, b"%d" % number).node for number in range(20)}
    assert found == {session.lookup(ROOT, b"a").node} and nodes(engine) == 3
    assert session.getattr(found.pop()).nlink == 21


def test_a_file_made_anew_is_another_node(session: Session, share: Path) -> None:
    """ext4 gives the same inode number again at once; the number of the node must not come back with it."""
    seen = set()
    for _ in range(20):
        made, opened = session.create(ROOT, b"f", os.O_RDWR | os.O_EXCL)
        session.release(opened.handle)
        assert made.node not in seen
        seen.add(made.node)
        session.unlink(ROOT, b"f")
        session.forget((made.node, 1))


def test_an_unlinked_file_stays_usable_through_its_node(session: Session, share: Path) -> None:
    (share / "f").write_text("still here")
    node = session.lookup(ROOT, b"f").node
    session.unlink(ROOT, b"f")
    assert session.getattr(node).nlink == 0
    assert content(session, node) == b"still here"


@pytest.mark.memory
def test_lookups_and_forgets_cost_no_memory(session: Session, engine: EngineProcess, share: Path) -> None:
    for number in range(10):
        (share / str(number)).touch()

    def rounds(count: int) -> None:
        for number in range(count):
            session.forget((session.lookup(ROOT, b"%d" % (number % 10)).node, 1))

    rounds(1000)
    before = engine.resident_bytes()
    rounds(10_000)
    assert engine.resident_bytes() - before < 1 << 20
    assert nodes(engine) == 1


def test_handles_cost_no_memory_once_released(session: Session, engine: EngineProcess, share: Path) -> None:
    (share / "f").write_text("x")
    node = session.lookup(ROOT, b"f").node

    def rounds(count: int) -> None:
        for _ in range(count):
            session.release(session.open(node).handle)

    rounds(500)
    before = engine.resident_bytes()
    rounds(5000)
    assert engine.resident_bytes() - before < 1 << 20


# ---- other mounts


def test_pseudo_file_systems_are_marked(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, rules={Type.MOUNT: ["/proc", "/sys"]}).running() as engine:
        for source, name in (("/proc/sys/kernel", b"ostype"), ("/sys/kernel", b"mm")):
            with Session(engine.address, source) as session:
                assert session.lookup(ROOT, name).node_flags == UNCACHED


@pytest.fixture
def submount(share: Path) -> Iterator[Path]:
    """A tmpfs below the share."""
    point = share / "below"
    point.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "qtfs-test", point], check=True)
    yield point
    # The engine may be reading its mount table.
    wait_until(lambda: subprocess.run(["umount", point], check=False).returncode == 0, "the unmount")


@pytest.mark.root
def test_inode_numbers_of_other_mounts_are_distinct(session: Session, share: Path, submount: Path) -> None:
    (submount / "f").touch()
    root = session.lookup(ROOT, b"below")
    file = session.lookup(root.node, b"f")
    for path, found in ((submount, root), (submount / "f", file)):
        assert found.node_flags == SUBMOUNT
        assert found.attr.ino == path.stat().st_ino ^ 1 << 48
    handle = session.opendir(root.node)
    assert {d.ino for d in session.readdir(handle, plus=True) if d.name == b"f"} == {file.attr.ino}
    session.release(handle, op="RELEASEDIR")
    assert refusal(session.rename, root.node, b"f", ROOT, b"f") == errno.EXDEV
    session.forget((file.node, 2), (root.node, 1))
    # Nothing of ours may keep the mount busy: the fixture unmounts it while the session is open.


# ---- few descriptors


@pytest.fixture(scope="module")
def crowd(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A share of 20,000 files in 20 directories, each holding its own path."""
    area = tmp_path_factory.mktemp("crowd")
    for directory in range(20):
        (area / "share" / str(directory)).mkdir(parents=True)
        for number in range(FILES // 20):
            path = f"{directory}/{number}"
            with open(area / "share" / path, "w") as file:
                file.write(path)
    return area


def limited(area: Path, descriptors: int, name: str = "engine") -> EngineProcess:
    engine = EngineProcess(area / f"{name}-{descriptors}", workers=2, limits=(f"--nofile={descriptors}",))
    engine.allow(everything_below(area))
    return engine


@pytest.mark.parametrize(("descriptors", "files"), [(64, 2000), (128, 2000), (1024, FILES)])
def test_more_nodes_than_descriptors(crowd: Path, descriptors: int, files: int) -> None:
    """All are held, then each is read again by its node alone."""
    with limited(crowd, descriptors).running() as engine:
        with Session(engine.address, crowd / "share") as session:
            held: dict[int, str] = {}
            for directory in range(20):
                parent = session.lookup(ROOT, b"%d" % directory).node
                for number in range(files // 20):
                    held[session.lookup(parent, b"%d" % number).node] = f"{directory}/{number}"
            assert len(held) == files and nodes(engine) == files + 21
            assert engine.descriptors() <= descriptors
            for node, path in held.items():
                assert content(session, node) == path.encode()
            assert engine.descriptors() <= descriptors
            session.forget(*((node, 1) for node in held))
            assert nodes(engine) == 21
        wait_until(engine.is_idle, "the engine to let everything go")


@pytest.fixture
def pressed(tmp_path: Path) -> Iterator[tuple[EngineProcess, Session, Path]]:
    """An engine so short of descriptors that every node gives its own up at once."""
    area = tmp_path / "pressed"
    with limited(area, RESERVED).running() as engine:
        share = area / "share"
        share.mkdir()
        with Session(engine.address, share) as session:
            yield engine, session, share
        wait_until(engine.is_idle, "the engine to let everything go")


def test_a_node_put_aside_follows_its_file_through_renames(pressed: tuple[EngineProcess, Session, Path]) -> None:
    _, session, share = pressed
    (share / "d").mkdir()
    (share / "d/f").write_text("text")
    directory, file = session.walk("d").node, session.walk("d/f").node
    os.rename(share / "d", share / "e")
    os.rename(share / "e/f", share / "e/g")
    assert content(session, file) == b"text"
    assert session.lookup(directory, b"g").node == file
    session.mkdir(directory, b"made")
    assert (share / "e/made").is_dir()


def test_a_node_put_aside_is_stale_once_its_file_is_gone(pressed: tuple[EngineProcess, Session, Path]) -> None:
    _, session, share = pressed
    (share / "f").write_text("old")
    node = session.lookup(ROOT, b"f").node
    session.getattr(ROOT)
    (share / "f").unlink()
    assert refusal(session.getattr, node) == errno.ESTALE
    (share / "f").write_text("new")
    again = session.lookup(ROOT, b"f").node
    assert again != node and content(session, again) == b"new"
    assert refusal(session.getattr, node) == errno.ESTALE
    session.forget((node, 1))


def test_a_node_unlinked_through_the_mount_is_not_lost(pressed: tuple[EngineProcess, Session, Path]) -> None:
    """Its handle keeps it usable, descriptors or not."""
    _, session, _ = pressed
    made, opened = session.create(ROOT, b"f")
    session.write(opened.handle, 0, b"kept")
    session.unlink(ROOT, b"f")
    for number in range(20):
        session.mkdir(ROOT, b"%d" % number)
    assert session.read(opened.handle, 0, 10) == b"kept"
    assert session.getattr(made.node, opened.handle).nlink == 0
    session.release(opened.handle)


def test_every_type_of_node_comes_back(pressed: tuple[EngineProcess, Session, Path]) -> None:
    _, session, share = pressed
    (share / "link").symlink_to("target")
    os.mkfifo(share / "fifo")
    os.mknod(share / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(share / "socket", stat.S_IFSOCK | 0o666)
    (share / "directory").mkdir()
    held = {path: session.lookup(ROOT, os.fsencode(path.name)).node for path in share.iterdir()}
    for path, node in held.items():
        assert session.getattr(node).mode == path.lstat().st_mode
    assert session.readlink(held[share / "link"]) == b"target"


def listed(session: Session, directory: int) -> dict[bytes, int]:
    """The nodes of a directory's entries; 0: only the name came. A lookup of each was counted."""
    handle = session.opendir(directory)
    found = {d.name: d.entry.node if d.entry else 0 for d in session.entries(handle, 65536, plus=True)}
    session.release(handle, op="RELEASEDIR")
    assert found.pop(b".") == found.pop(b"..") == 0
    return found


def test_a_listing_with_attributes_needs_no_descriptors(pressed: tuple[EngineProcess, Session, Path]) -> None:
    """Once the engine has seen that the file system's file handles work; the root is never put aside."""
    engine, session, share = pressed
    (share / "d").mkdir()
    for number in range(300):
        (share / "d" / str(number)).write_text(str(number))
    os.link(share / "d/0", share / "d/again")
    directory = session.lookup(ROOT, b"d").node
    session.getattr(session.lookup(directory, b"0").node)
    found = listed(session, directory)
    assert set(found) == {b"again", *(b"%d" % number for number in range(300))}
    assert found[b"again"] == found[b"0"] == session.lookup(directory, b"0").node
    assert engine.descriptors() < RESERVED
    for name, node in found.items():
        assert content(session, node) == (b"0" if name == b"again" else name)
        assert session.lookup(directory, name).node == node
    session.forget(*((node, 2) for node in found.values()), (found[b"0"], 4))
    session.forget((directory, 1))
    assert nodes(engine) == 1


def test_a_node_put_aside_knows_what_the_client_has_seen(pressed: tuple[EngineProcess, Session, Path]) -> None:
    """Or each open(2) would cost the client its page cache."""
    _, session, share = pressed
    for name in ("a", "b"):
        (share / name).write_text("text")
    held = {name: session.lookup(ROOT, name.encode()).node for name in ("a", "b")}
    for name in ("a", "b"):
        opened = session.open(held[name])
        assert not opened.flags & CHANGED
        session.release(opened.handle)
    (share / "a").write_text("other text")
    assert session.open(held["a"]).flags & CHANGED


def test_a_node_put_aside_keeps_its_place_in_the_whitelist(pressed: tuple[EngineProcess, Session, Path]) -> None:
    engine, session, share = pressed
    (share / "closed").mkdir()
    (share / "open").mkdir()
    for name in ("closed/f", "open/f"):
        (share / name).write_text("text")
    rules: dict[Type, list[Path]] = {kind: [share / "open"] for kind in (Type.OPEN, Type.READ)}
    engine.reload({Type.MOUNT: [share], **rules})
    closed, readable = session.walk("closed/f").node, session.walk("open/f").node
    for _ in range(3):
        assert content(session, readable) == b"text"
        assert refusal(session.open, closed) == errno.EACCES


def test_a_node_put_aside_comes_under_new_rules(pressed: tuple[EngineProcess, Session, Path]) -> None:
    """Without being looked up again. Its descriptor comes from its file handle."""
    engine, session, share = pressed
    (share / "d").mkdir()
    (share / "d/f").write_text("text")
    node = session.walk("d/f").node
    opened = session.open(node, os.O_WRONLY)
    for _ in range(3):
        assert session.write(opened.handle, 0, b"x") == 1
        assert content(session, node) == b"xext"
    engine.reload({**everything_below(share), Type.WRITE: ["/nowhere"]})
    assert refusal(session.open, node, os.O_WRONLY) == errno.EACCES
    assert refusal(session.write, opened.handle, 0, b"y") == errno.EACCES
    assert content(session, node) == b"xext"
    session.release(opened.handle)


def test_a_directory_too_deep_for_paths_comes_under_new_rules(tmp_path: Path) -> None:
    """The kernel does not tell its path, and that of no rule is as long. Files there are judged when looked up."""
    rules = everything_below(tmp_path / "area/share")
    with (
        EngineProcess(tmp_path / "area", rules=rules).running() as engine,
        Session(engine.address, engine.share) as session,
    ):
        deep, name = [ROOT], b"d" * 250
        for _ in range(17):
            deep.append(session.mkdir(deep[-1], name).node)
        session.release(session.create(deep[-1], b"f")[1].handle)
        engine.reload({**rules, Type.MKDIR: ["/nowhere"], Type.WRITE: ["/nowhere"]})
        assert refusal(session.mkdir, deep[-1], b"e") == errno.EACCES
        node = session.lookup(deep[-1], b"f").node
        assert refusal(session.open, node, os.O_WRONLY) == errno.EACCES
        session.release(session.open(node).handle)
        session.unlink(deep[-1], b"f")
        for parent in reversed(deep[:-1]):
            session.rmdir(parent, name)


def test_more_lookups_than_a_record_counts(pressed: tuple[EngineProcess, Session, Path]) -> None:
    engine, session, share = pressed
    (share / "d").mkdir()
    (share / "d/0").write_text("text")
    for number in range(1, 1000):
        os.link(share / "d/0", share / "d" / str(number))
    directory = session.lookup(ROOT, b"d").node
    node = session.lookup(directory, b"0").node
    session.getattr(directory)
    assert set(listed(session, directory).values()) == {node}
    for _ in range(66):
        listed(session, directory)
    session.forget((node, 67_000))
    assert nodes(engine) == 3 and content(session, node) == b"text"
    session.forget((node, 1))
    assert nodes(engine) == 2


@pytest.mark.memory
@pytest.mark.parametrize("descriptors", [1024, 20_000])
def test_nodes_that_nobody_uses_cost_little(crowd: Path, descriptors: int) -> None:
    """Memory for a million of them is 34 bytes each, and however many descriptors there are, nodes do not keep all."""
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < descriptors:
        pytest.skip(f"this process may not have {descriptors} descriptors")
    with limited(crowd, descriptors, "small").running() as engine:
        with Session(engine.address, crowd / "share") as session:
            found = [listed(session, session.lookup(ROOT, b"%d" % number).node) for number in range(10)]
            before = engine.resident_bytes()
            found += [listed(session, session.lookup(ROOT, b"%d" % number).node) for number in range(10, 20)]
            grown = engine.resident_bytes() - before
            assert nodes(engine) > FILES - 1000
            assert engine.descriptors() < min(descriptors, NODE_DESCRIPTORS + RESERVED)
            if descriptors < FILES:
                assert grown / (FILES / 2) < 80
        wait_until(engine.is_idle, "the engine to let everything go")


def test_file_systems_without_file_handles_are_opened_again_by_path(tmp_path: Path) -> None:
    names = ("ostype", "osrelease", "hostname", "pid_max", "cap_last_cap")
    engine = limited(tmp_path, RESERVED)
    engine.allow({kind: ["/proc/sys/kernel"] for kind in (Type.MOUNT, Type.OPEN, Type.READ)})
    with engine.running(), Session(engine.address, "/proc/sys/kernel") as session:
        held = {name: session.lookup(ROOT, name.encode()).node for name in names}
        for _ in range(3):
            for name, node in held.items():
                assert content(session, node) == Path("/proc/sys/kernel", name).read_bytes()


def test_one_session_does_not_starve_another(crowd: Path) -> None:
    """Descriptors that one session's nodes hold are given up for another's files."""
    with limited(crowd, 256, "fair").running() as engine:
        with Session(engine.address, crowd / "share") as hoarder, Session(engine.address, crowd / "share") as other:
            parent = hoarder.lookup(ROOT, b"0").node
            kept = [hoarder.lookup(parent, b"%d" % number).node for number in range(1000)]
            directory = other.lookup(ROOT, b"1").node
            handles = [other.open(other.lookup(directory, b"%d" % number).node).handle for number in range(50)]
            for number, handle in enumerate(handles):
                assert other.read(handle, 0, 100) == b"1/%d" % number
            assert content(hoarder, kept[0]) == b"0/0"
        wait_until(engine.is_idle, "the engine to let everything go")


def test_running_out_of_descriptors_is_an_error_and_passes(crowd: Path) -> None:
    """Handles cannot be given up: opening more than a third fails with ENFILE, and works again after a release."""
    with limited(crowd, 256, "full").running() as engine:
        with Session(engine.address, crowd / "share") as session:
            node = session.walk("0/0").node
            handles = []
            with pytest.raises(OSError) as caught:
                for _ in range(200):
                    handles.append(session.open(node).handle)
            assert caught.value.errno == errno.ENFILE
            assert 50 < len(handles) < 80
            for handle in handles:
                assert session.read(handle, 0, 10) == b"0/0"
            for handle in handles[:40]:
                session.release(handle)
            assert session.walk("5/5").attr.size == 3
            for handle in handles[40:]:
                session.release(handle)
        wait_until(engine.is_idle, "the engine to let everything go")
