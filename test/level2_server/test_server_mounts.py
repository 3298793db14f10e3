"""SYSMOUNT, SYSUMOUNT, LIST_MOUNTS: what is mounted where, for whom, and what is refused."""

from __future__ import annotations

import errno
import os
import select
import socket
import struct
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness import errands, wire
from harness.engine_process import PATH_TYPES, EngineProcess, everything_below
from harness.errands import BIND, MOVE, NEW, PROPAGATE, REMOUNT, mount, mounts, page, tmpfs, umount
from harness.leaks import mounts_below, unmount_below
from harness.session import Session, attach_stream, receive_exactly
from harness.waiting import wait_until
from harness.wire import HEADER_BYTES, NOBODY, ROOT

from qtfs_common.protocol import OPERATIONS
from qtfs_common.whitelist import Type

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="mounting is for root")


@pytest.fixture(autouse=True)
def _unmounted(share: Path) -> Iterator[None]:
    yield
    unmount_below(str(share))


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as raised:
        yield
    assert raised.value.errno == number, raised.value


def made(share: Path, *names: str) -> None:
    for name in names:
        (share / name).mkdir(parents=True, exist_ok=True)


def mountinfo(share: Path) -> list[list[str]]:
    """Fields of what is mounted below the share, in the order of the paths."""
    rows = [line.split(" ") for line in Path("/proc/self/mountinfo").read_text().splitlines()]
    return sorted((row for row in rows if row[4].startswith(f"{share}/")), key=lambda row: row[4])


# ---- mounting


def test_a_new_file_system(session: Session, share: Path) -> None:
    made(share, "d")
    wanted = errands.NOSUID | errands.NOEXEC
    options = [(errands.TEXT, b"size", b"1m"), (errands.FLAG, b"ro", b"")]
    tmpfs(session, b"d", wanted=wanted, options=options)
    (row,) = mountinfo(share)
    assert {"nosuid", "noexec"} <= {*row[5].split(",")} and {"ro", "size=1024k"} <= {*row[-1].split(",")}
    umount(session, b"d")
    assert not mountinfo(share)


def test_a_bind_mount_with_attributes(session: Session, share: Path) -> None:
    made(share, "from", "to")
    (share / "from/file").write_text("x")
    mount(session, BIND, b"to", b"from", flags=errands.SOURCE_BELOW, wanted=errands.RDONLY)
    assert (share / "to/file").read_text() == "x"
    with refused(errno.EROFS):
        (share / "to/new").touch()
    umount(session, b"to")


def test_a_file_on_a_file(session: Session, share: Path) -> None:
    (share / "a").write_text("a")
    (share / "b").write_text("b")
    mount(session, BIND, b"b", b"a", flags=errands.SOURCE_BELOW)
    assert (share / "b").read_text() == "a"
    umount(session, b"b")
    assert (share / "b").read_text() == "b"


def test_a_move(session: Session, share: Path) -> None:
    made(share, "a", "b")
    tmpfs(session, b"a")
    before = mountinfo(share)[0][0]
    mount(session, MOVE, b"b", b"a", flags=errands.SOURCE_BELOW)
    (row,) = mountinfo(share)
    assert (row[0], row[4]) == (before, str(share / "b"))
    umount(session, b"b")


def test_a_remount(session: Session, share: Path) -> None:
    made(share, "d")
    tmpfs(session, b"d")
    options = [(errands.FLAG, b"ro", b"")]
    mount(session, REMOUNT, b"d", wanted=errands.NOEXEC, options=options)
    (row,) = mountinfo(share)
    assert "noexec" in row[5].split(",") and "ro" in row[-1].split(",")
    mount(session, REMOUNT, b"d", unwanted=errands.NOEXEC, flags=errands.BIND_ONLY)
    (row,) = mountinfo(share)
    assert "noexec" not in row[5].split(",") and "ro" in row[-1].split(",")
    umount(session, b"d")


def test_propagation(session: Session, share: Path) -> None:
    made(share, "d")
    tmpfs(session, b"d", propagation=errands.MS_SHARED)
    assert any(word.startswith("shared:") for word in mountinfo(share)[0][6:])
    mount(session, PROPAGATE, b"d", propagation=errands.MS_PRIVATE | errands.MS_REC)
    assert not any(word.startswith("shared:") for word in mountinfo(share)[0][6:])
    umount(session, b"d")


def test_links_are_followed_as_far_as_they_stay_below(session: Session, share: Path) -> None:
    made(share, "real/d")
    (share / "inside").symlink_to("real")
    (share / "absolute").symlink_to(share / "real")
    (share / "outside").symlink_to("..")
    tmpfs(session, b"inside/d")
    assert mounts_below(str(share)) == [str(share / "real/d")]
    umount(session, b"inside/d")
    for name in (b"absolute/d", b"outside/x"):
        with refused(errno.EXDEV):
            tmpfs(session, name)
    (share / "real/link").symlink_to("d")
    tmpfs(session, b"real/d")
    with refused(errno.EINVAL):
        umount(session, b"real/link")
    umount(session, b"real/d")


# ---- refusals


@pytest.mark.parametrize("target", [b"..", b"a/../b", b"/a", b"a/", b"a//b", b".", b"a/."])
def test_targets_that_are_no_paths_below(session: Session, share: Path, target: bytes) -> None:
    made(share, "a", "b")
    for call in (lambda: tmpfs(session, target), lambda: umount(session, target)):
        with refused(errno.EINVAL):
            call()


@pytest.mark.parametrize(
    ("number", "type_", "options"),
    [
        (errno.EINVAL, b"../tmpfs", []),
        (errno.EINVAL, b"", []),
        (errno.ENODEV, b"nosuchfs", []),
        (errno.EPERM, b"proc", []),
        (errno.EPERM, b"sysfs", []),
        (errno.EPERM, b"cgroup2", []),
        (errno.EPERM, b"devtmpfs", []),
        (errno.EPERM, b"fuse", [(errands.TEXT, b"fd", b"0")]),
        (errno.EPERM, b"tmpfs", [(errands.TEXT, b"source", b"x")]),
        (errno.EPERM, b"tmpfs", [(errands.TEXT, b"anything", b"/etc")]),
        (errno.EPERM, b"overlay", [(errands.TEXT, b"lowerdir", b"etc")]),
        (errno.EPERM, b"overlay", [(errands.PATH, b"lowerdir", b"/etc")]),
        (errno.EPERM, b"overlay", [(errands.PATH, b"lowerdir", b"/nowhere/at/all")]),
        (errno.EPERM, b"overlay", [(errands.PATH, b"redirect_dir", b"/etc")]),
        (errno.EXDEV, b"overlay", [(errands.PATH_BELOW, b"lowerdir", b"up")]),
        (errno.EINVAL, b"overlay", [(errands.PATH_BELOW, b"lowerdir", b"../x")]),
        (errno.EINVAL, b"tmpfs", [(errands.TEXT, b"si,ze", b"1m")]),
    ],
)
def test_types_and_options_that_lead_elsewhere(
    session: Session, share: Path, number: int, type_: bytes, options: list[errands.Option]
) -> None:
    made(share, "d")
    (share / "up").symlink_to("../..")
    with refused(number):
        mount(session, NEW, b"d", b"none", type_, options=options)
    assert not mountinfo(share)


@pytest.mark.parametrize("source", [b"/dev/null", b"/etc/passwd", b"/dev/vda", b"/nowhere", b"none"])
def test_sources_of_disks_that_the_whitelist_lacks(session: Session, share: Path, source: bytes) -> None:
    made(share, "d")
    with refused(errno.EINVAL if source == b"none" else errno.EPERM):
        mount(session, NEW, b"d", source, b"ext4")


def test_a_device_node_that_a_client_made_is_no_disk(session: Session, share: Path) -> None:
    """With Create, root of a client makes any device node; mounting it would be a way out of the whitelist."""
    made(share, "d")
    root = os.stat("/").st_dev
    session.mknod(ROOT, b"disk", 0o60600, os.minor(root) & 0xFF | os.major(root) << 8)
    with refused(errno.ENOTBLK):
        mount(session, NEW, b"d", b"disk", b"ext4", flags=errands.SOURCE_BELOW)


@contextmanager
def devices_engine(area: Path) -> Iterator[EngineProcess]:
    """An engine with its own mount table, and everything allowed below its share and below /dev/pts."""
    rules = {kind: [area / "share", "/dev/pts"] for kind in PATH_TYPES}
    apart = ("unshare", "--mount", "--propagation", "private")
    with EngineProcess(area, rules=rules, within=apart).running() as engine:
        yield engine


def opens_zero(session: Session, path: str) -> bool:
    """Whether a device node is opened; EACCES is the only refusal."""
    try:
        handle = session.open(session.walk(path).node).handle
    except OSError as error:
        assert error.errno == errno.EACCES
        return False
    assert session.read(handle, 0, 4) == bytes(4)
    session.release(handle)
    return True


@pytest.mark.parametrize("fresh", [True, False])
def test_a_device_node_is_not_bound_to_where_devices_are_named(tmp_path: Path, fresh: bool) -> None:
    """The whitelist names devices by path: another device must not appear under one of these."""
    zero = b"m/zero" if fresh else b"zero"
    with devices_engine(tmp_path / "area") as engine:
        made(engine.share, "m")
        with Session(engine.address, engine.share) as session, Session(engine.address, "/dev/pts") as terminals:
            tmpfs(session, b"m")
            session.mknod(session.walk("m").node if fresh else ROOT, b"zero", 0o20666, 0x105)
            source = os.fsencode(engine.share) + b"/" + zero
            mount(terminals, BIND, b"ptmx", source)
            assert not opens_zero(terminals, "ptmx")
            with refused(errno.EPERM):
                mount(terminals, REMOUNT, b"ptmx", flags=errands.BIND_ONLY, unwanted=errands.NODEV)
            with refused(errno.EPERM):
                mount(terminals, BIND, b"ptmx", source, unwanted=errands.NODEV)


@pytest.mark.parametrize("flags", [0, errands.RECURSIVE])
@pytest.mark.parametrize("action", [BIND, MOVE])
def test_what_the_server_mounted_loses_its_devices_elsewhere(
    session: Session, share: Path, action: int, flags: int
) -> None:
    made(share, "a", "b")
    for point in ("a", "a/below"):
        made(share, point)
        subprocess.run(["mount", "-t", "tmpfs", "qtfs-test", share / point], check=True)
    mount(session, action, b"b", b"a", flags=errands.SOURCE_BELOW | flags)
    there = [row for row in mountinfo(share) if row[4].startswith(f"{share}/b")]
    assert len(there) == (1 if action == BIND and not flags else 2)
    assert all("nodev" in row[5].split(",") for row in there)


def test_a_named_device_may_be_bound(tmp_path: Path) -> None:
    with devices_engine(tmp_path / "area") as engine, Session(engine.address, "/dev/pts") as terminals:
        mount(terminals, BIND, b"ptmx", b"ptmx", flags=errands.SOURCE_BELOW)
        terminals.release(terminals.open(terminals.lookup(ROOT, b"ptmx").node, os.O_RDWR).handle)


def test_only_root_mounts(session: Session, share: Path) -> None:
    made(share, "d")
    with refused(errno.EPERM):
        tmpfs(session, b"d", who=NOBODY)
    tmpfs(session, b"d")
    with refused(errno.EPERM):
        umount(session, b"d", who=NOBODY)
    umount(session, b"d")


def test_a_read_only_session_mounts_nothing(engine: EngineProcess, share: Path) -> None:
    made(share, "d")
    with Session(engine.address, share, read_only=True) as session, refused(errno.EROFS):
        tmpfs(session, b"d")


def test_the_root_of_the_session_is_busy(session: Session) -> None:
    with refused(errno.EBUSY):
        tmpfs(session, b"")
    with refused(errno.EBUSY):
        umount(session, b"")


@pytest.mark.parametrize(
    "body",
    [
        errands.mount_body(PROPAGATE, b"d", propagation=3 << 18),
        errands.mount_body(PROPAGATE, b"d", propagation=0),
        errands.mount_body(NEW, b"d", b"none", b"tmpfs", wanted=0x100000),
        errands.mount_body(MOVE, b"d", b"e", flags=errands.SOURCE_BELOW),
    ],
)
def test_what_cannot_be_done(session: Session, share: Path, body: bytes) -> None:
    made(share, "d", "e")
    assert session.ask("SYSMOUNT", body).error == errno.EINVAL


@contextmanager
def own_engine(area: Path, **granted: list[Path]) -> Iterator[Session]:
    """An engine with everything allowed below `area`/share, and more as given by type."""
    rules = everything_below(area / "share")
    for name, paths in granted.items():
        rules[Type[name]] = [*rules.get(Type[name], ()), *paths]
    engine = EngineProcess(area, rules=rules)
    with engine.running(), Session(engine.address, engine.share) as session:
        try:
            yield session
        finally:
            unmount_below(str(area))


@pytest.mark.parametrize("action", ["hide", "readonly"])
def test_what_leads_to_a_rule_is_not_mounted_elsewhere(tmp_path: Path, action: str) -> None:
    """Rules are for paths: under another one the file would be open."""
    share = tmp_path / "area/share"
    made(share, "from/inner", "other", "d")
    rule = f'[[rule]]\npath = "{share}/from/inner/file"\naction = "{action}"\n'
    engine = EngineProcess(tmp_path / "area", special=rule)
    with engine.running(), Session(engine.address, share) as session:
        try:
            for source in (b"from", b"from/inner"):
                with refused(errno.EPERM):
                    mount(session, BIND, b"d", source, flags=errands.SOURCE_BELOW)
            mount(session, BIND, b"d", b"other", flags=errands.SOURCE_BELOW)
        finally:
            unmount_below(str(share))


def test_a_bind_mount_grants_nothing(tmp_path: Path) -> None:
    """What may be mounted and read, but not written, is not bound to where everything is allowed."""
    area, other = tmp_path / "area", tmp_path / "other"
    made(area, "share/d")
    other.mkdir()
    with own_engine(area, MOUNT=[other], OPEN=[other], READ=[other]) as session, refused(errno.EPERM):
        mount(session, BIND, b"d", os.fsencode(other))


def test_what_is_allowed_as_much_may_be_bound(tmp_path: Path) -> None:
    area, other = tmp_path / "area", tmp_path / "other"
    made(area, "share/d")
    other.mkdir()
    with own_engine(area, **{kind.name: [other] for kind in PATH_TYPES}) as session:
        mount(session, BIND, b"d", os.fsencode(other))
        umount(session, b"d")


def test_a_pseudo_file_system_where_its_own_place_is_allowed(tmp_path: Path) -> None:
    area = tmp_path / "area"
    made(area, "share/d")
    with own_engine(area, **{kind.name: [Path("/proc")] for kind in PATH_TYPES}) as session:
        mount(session, NEW, b"d", b"proc", b"proc")
        assert (area / "share/d/self").is_symlink()
        umount(session, b"d")


def test_a_file_system_that_is_also_elsewhere_is_not_reconfigured(session: Session, share: Path) -> None:
    """The bound directory's file system is that of /tmp or /: read-only there would be read-only for everybody."""
    made(share, "from", "to")
    mount(session, BIND, b"to", b"from", flags=errands.SOURCE_BELOW)
    with refused(errno.EPERM):
        mount(session, REMOUNT, b"to", options=[(errands.FLAG, b"ro", b"")])
    mount(session, REMOUNT, b"to", wanted=errands.RDONLY, flags=errands.BIND_ONLY)
    umount(session, b"to")


# ---- unmounting


def test_nodes_do_not_keep_a_mount_busy_in_any_session(engine: EngineProcess, session: Session, share: Path) -> None:
    made(share, "d")
    tmpfs(session, b"d")
    for number in range(100):
        made(share, f"d/{number}/x")
    with Session(engine.address, share) as other:
        known = [s.walk(f"d/{number}/x").node for s in (session, other) for number in range(100)]
        umount(session, b"d")
        for s, nodes in ((session, known[:100]), (other, known[100:])):
            for node in nodes:
                with refused(errno.ESTALE):
                    s.getattr(node)
        assert session.lookup(ROOT, b"d").node


def test_a_mount_that_stays_loses_nothing(session: Session, share: Path) -> None:
    """A busy mount: nodes that were put aside for the attempt are opened again."""
    made(share, "d")
    tmpfs(session, b"d")
    made(share, "d/x/y")
    (share / "d/x/file").write_text("content")
    directory = session.walk("d/x/y").node
    node = session.walk("d/x/file").node
    handle = session.open(node).handle
    for _ in range(3):
        with refused(errno.EBUSY):
            umount(session, b"d")
        assert session.getattr(directory).nlink == 2
        assert session.read(handle, 0, 100) == b"content"
        assert session.walk("d/x/y").node == directory
    session.release(handle)
    umount(session, b"d")


def test_a_mount_that_stays_when_descriptors_are_short(tmp_path: Path) -> None:
    """Nodes that were put aside before, by file handles, need the mount's descriptor, which the attempt has closed."""
    area = tmp_path / "area"
    engine = EngineProcess(area, limits=("--nofile=200",), workers=2)
    made(area, "share/d")
    with engine.running(), Session(engine.address, engine.share) as session:
        try:
            tmpfs(session, b"d")
            made(area / "share/d", *map(str, range(400)))
            (area / "share/d/file").touch()
            nodes = [session.walk(f"d/{number}").node for number in range(400)]
            handle = session.open(session.walk("d/file").node).handle
            for _ in range(2):
                with refused(errno.EBUSY):
                    umount(session, b"d")
                assert all(session.getattr(node).nlink == 2 for node in nodes)
            session.release(handle)
            umount(session, b"d")
            for node in nodes:
                with refused(errno.ESTALE):
                    session.getattr(node)
        finally:
            unmount_below(str(area))


def test_numbers_that_come_again_are_other_files(session: Session, share: Path) -> None:
    """Mount ids and inode numbers are given out again at once; a node of the first mount is not one of the second."""
    made(share, "d")
    stale: list[int] = []
    numbers = set()
    for _ in range(20):
        tmpfs(session, b"d")
        made(share, "d/x")
        numbers.add((os.stat(share / "d/x").st_dev, os.stat(share / "d/x").st_ino))
        for node in stale:
            with refused(errno.ESTALE):
                session.getattr(node)
        stale.append(session.walk("d/x").node)
        umount(session, b"d")
    assert len(set(stale)) == 20
    assert len(numbers) < 20, "no number came again"


def test_a_lazy_unmount(session: Session, share: Path) -> None:
    made(share, "d")
    tmpfs(session, b"d")
    (share / "d/file").write_text("content")
    handle = session.open(session.walk("d/file").node).handle
    umount(session, b"d", errands.MNT_DETACH)
    assert not mountinfo(share)
    assert session.read(handle, 0, 100) == b"content"
    session.release(handle)


# ---- listing


def test_a_listing(session: Session, share: Path) -> None:
    made(share, "a b", "c")
    tmpfs(session, b"a b", wanted=errands.NODEV, options=[(errands.TEXT, b"size", b"4m")])
    made(share, "a b/d")
    tmpfs(session, b"a b/d")
    first, second = mounts(session)
    assert (first.path, first.type, first.source) == (b"a b", b"tmpfs", b"none")
    assert b"nodev" in first.options.split(b",") and b"size=4096k" in first.super_options.split(b",")
    assert (second.path, second.parent) == (b"a b/d", first.id)
    st = os.stat(share / "a b")
    assert (first.major, first.minor) == (os.major(st.st_dev), os.minor(st.st_dev))
    for target in (b"a b/d", b"a b"):
        umount(session, target)
    assert mounts(session) == []


def test_only_what_can_be_seen_is_listed(session: Session, share: Path) -> None:
    made(share, "d/e", "x")
    tmpfs(session, b"d/e", options=[(errands.TEXT, b"size", b"1m")])
    tmpfs(session, b"d")                    # hides d/e
    tmpfs(session, b"d", propagation=0)     # on top of it
    tmpfs(session, b"x")
    assert sorted(m.path for m in mounts(session)) == [b"d", b"x"]
    umount(session, b"d")
    umount(session, b"d")
    assert sorted(m.path for m in mounts(session)) == [b"d/e", b"x"]


def test_a_listing_in_pages(session: Session, share: Path) -> None:
    for number in range(20):
        made(share, f"{number:02}")
        tmpfs(session, b"%02d" % number)
    token, total, everything = page(session)
    assert total == len(everything) == 20
    found: list[errands.Listed] = []
    while len(found) < total:
        again, _, some = page(session, token, len(found), 600)
        assert again == token and 0 < len(some) < 10
        found += some
    assert found == everything
    assert page(session, token, total)[2] == [] and page(session, token, 1 << 31)[2] == []
    for size in (0, 16, 60, (1 << 20) + 1):
        with refused(errno.EINVAL):
            page(session, token, 0, size)
    umount(session, b"00")
    with refused(errno.EAGAIN):
        page(session, token, 1)


def test_mounts_of_the_server_itself_are_listed(session: Session, share: Path) -> None:
    made(share, "d")
    subprocess.run(["mount", "-t", "tmpfs", "theirs", share / "d"], check=True)
    (only,) = mounts(session)
    assert only.source == b"theirs"
    session.walk("d")
    umount(session, b"d")


# ---- sessions and their end


def mounted_by(engine: EngineProcess) -> list[int]:
    return [len(session["mounts"]) for session in engine.figures()["sessions"]]


def test_what_a_session_mounted_is_its_own(engine: EngineProcess, session: Session, share: Path) -> None:
    made(share, "a", "b")
    tmpfs(session, b"a")
    mount(session, BIND, b"b", b"a", flags=errands.SOURCE_BELOW)
    assert mounted_by(engine) == [2]
    subprocess.run(["umount", share / "b"], check=True)
    umount(session, b"a")
    assert mounted_by(engine) == [1], "what the server unmounts by itself is not noticed, and does no harm"


@pytest.mark.parametrize("end", ["detach", "disconnect"])
def test_mounts_that_go_with_their_session(tmp_path: Path, end: str) -> None:
    area = tmp_path / "area"
    engine = EngineProcess(area, arguments=("--grace", "0.5"))
    made(area, "share/stays", "share/goes", "share/moved")
    with engine.running():
        session = Session(engine.address, engine.share)
        tmpfs(session, b"stays")
        tmpfs(session, b"goes", flags=errands.LAZY_CLEANUP)
        made(area, "share/goes/deeper")
        tmpfs(session, b"goes/deeper", flags=errands.LAZY_CLEANUP)
        mount(session, MOVE, b"moved", b"goes", flags=errands.SOURCE_BELOW)
        getattr(session, end)()
        try:
            wait_until(lambda: mounts_below(str(area)) == [str(area / "share/stays")], "the mounts to go")
        finally:
            session.disconnect()
            unmount_below(str(area))


def test_mounts_outlive_an_upgrade(tmp_path: Path) -> None:
    """And still go with their session."""
    area = tmp_path / "area"
    engine = EngineProcess(area, arguments=("--grace", "2"))
    made(area, "share/goes")
    with engine.running():
        session = Session(engine.address, engine.share)
        tmpfs(session, b"goes", flags=errands.LAZY_CLEANUP)
        try:
            before = engine.figures()["sessions"][0]["mounts"]
            engine.upgrade()
            assert mounts_below(str(area)) == [str(area / "share/goes")]
            assert engine.figures()["sessions"][0]["mounts"] == before
            wait_until(lambda: not mounts_below(str(area)), "the mount to go")
        finally:
            session.disconnect()
            unmount_below(str(area))


# ---- a request takes effect once, and waits without a worker

_SILENT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"silent", os.fsencode(sys.argv[1]), b"fuse", 0, options) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
length, opcode, unique = struct.unpack_from("<IIQ", os.read(fd, 65536))
body = struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 0, 0, 4096, 0, 1, 0, 0, *[0] * 7)
os.write(fd, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)
print("mounted", flush=True)
sys.stdin.read(1)
while True:
    length, opcode, unique = struct.unpack_from("<IIQ", os.read(fd, 65536))
    if opcode not in (2, 42):
        os.write(fd, struct.pack("<IiQ", 16, -13, unique))
"""


@pytest.fixture
def silent(share: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A FUSE file system at share/hung that answers nothing until it gets a byte on stdin; then EACCES."""
    made(share, "hung")
    command = ["python3", "-c", _SILENT, share / "hung"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == b"mounted\n"
            yield process
        finally:
            process.kill()
            unmount_below(str(share))


def wake(silent: subprocess.Popen[bytes]) -> None:
    assert silent.stdin is not None
    silent.stdin.write(b"x")
    silent.stdin.flush()


def request(session: Session, slot: int, body: bytes, sequence: int = 1) -> bytes:
    whole = wire.caller(ROOT, session.who) + body
    return wire.message(OPERATIONS["SYSMOUNT"], whole, slot=slot, sequence=sequence, tag=7)


def receive(sock: socket.socket) -> tuple[int, ...]:
    return wire.read_header(receive_exactly(sock, HEADER_BYTES))


def test_mounts_that_block_hold_no_worker(
    engine: EngineProcess, session: Session, share: Path, silent: subprocess.Popen[bytes]
) -> None:
    made(share, "d")
    body = errands.mount_body(BIND, b"d", b"hung/x", flags=errands.SOURCE_BELOW)
    with Session(engine.address, share, slots=16) as other:
        socks = [attach_stream(other.address, other.ticket, slot) for slot in range(1, 11)]
        for slot, sock in enumerate(socks, start=1):
            sock.sendall(request(other, slot, body))
        refused_ones: list[socket.socket] = []
        while len(refused_ones) < 2:
            ready, _, _ = select.select([sock for sock in socks if sock not in refused_ones], [], [], 20)
            assert ready, "eight of a session, with four workers"
            assert [receive(sock)[3] for sock in ready] == [errno.EAGAIN] * len(ready)
            refused_ones += ready
        for _ in range(20):
            assert session.getattr(ROOT).nlink and other.getattr(ROOT).nlink
        assert mounts(session)
        wake(silent)
        assert [receive(sock)[3] for sock in socks if sock not in refused_ones] == [errno.EACCES] * 8
        for sock in socks:
            sock.close()


def test_a_repetition_waits_for_the_first_copy(
    engine: EngineProcess, session: Session, share: Path, silent: subprocess.Popen[bytes]
) -> None:
    """Over one broken connection after the other, by more of them than there are workers."""
    made(share, "d")
    message = request(session, 1, errands.mount_body(BIND, b"d", b"hung/x", flags=errands.SOURCE_BELOW))
    for _ in range(6):
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message)
            assert session.getattr(ROOT).nlink
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(message)
        assert session.getattr(ROOT).nlink
        wake(silent)
        assert receive(sock)[3] == errno.EACCES
        sock.sendall(message)
        assert receive(sock)[3] == errno.EACCES, "the kept reply"


def test_a_mount_takes_effect_once(session: Session, share: Path) -> None:
    made(share, "d")
    message = request(session, 1, errands.mount_body(NEW, b"d", b"none", b"tmpfs"))
    for _ in range(3):
        with attach_stream(session.address, session.ticket, 1) as sock:
            sock.sendall(message)
            assert receive(sock)[3] == 0
    assert len(mountinfo(share)) == 1
    umount(session, b"d")


def test_a_client_that_leaves_meanwhile(
    engine: EngineProcess, share: Path, silent: subprocess.Popen[bytes]
) -> None:
    made(share, "d")
    session = Session(engine.address, share, slots=8)
    with attach_stream(session.address, session.ticket, 1) as sock:
        body = errands.mount_body(BIND, b"d", b"hung/x", flags=errands.SOURCE_BELOW)
        sock.sendall(request(session, 1, body))
        assert session.getattr(ROOT).nlink
        session.detach()
        wake(silent)
        assert sock.recv(1) == b""


@pytest.mark.parametrize(
    "tail",
    [
        struct.pack("<IIII", 4, 1, 0, 0) + b"x",            # no such kind
        struct.pack("<IIII", 0, 1, 0, 0) + b"xy",           # bytes left over
        struct.pack("<IIII", 0, 0xFFFFFFFF, 0, 0),          # longer than it is
        struct.pack("<IIII", 1, 1, 1, 0) + b"x\0",          # a NUL
    ],
)
def test_malformed_options(session: Session, share: Path, engine: EngineProcess, tail: bytes) -> None:
    made(share, "d")
    head = struct.pack("<IIQQIIIIII", NEW, 0, 0, 0, 0, 5, 4, 1, 1, 0) + b"tmpfs" + b"none" + b"d"
    before = engine.figures()["malformed"]
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(request(session, 1, head + tail))
        assert sock.recv(1) == b""
    assert engine.figures()["malformed"] == before + 1
    assert not mountinfo(share)


@pytest.mark.parametrize(("action", "flags", "options"), [(5, 0, 0), (0, 16, 0), (0, 0, 257), (0xFFFFFFFF, 0, 0)])
def test_malformed_numbers(
    session: Session, engine: EngineProcess, action: int, flags: int, options: int
) -> None:
    head = struct.pack("<IIQQIIIIII", action, flags, 0, 0, 0, 0, 0, 0, options, 0)
    with attach_stream(session.address, session.ticket, 1) as sock:
        sock.sendall(request(session, 1, head + bytes(16) * min(options, 300)))
        assert sock.recv(1) == b""
