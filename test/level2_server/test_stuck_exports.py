"""A file system of the server hangs: its requests wait alone, and everybody else goes on."""

from __future__ import annotations

import concurrent.futures
import fcntl
import os
import signal
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness import wire
from harness.engine_process import EngineProcess, everything_below
from harness.fault_proxy import stopped
from harness.freezing_fs import FreezingFs
from harness.leaks import descriptors
from harness.locking import WRITE, Opened
from harness.session import Session
from harness.stalling_fs import FILE_BYTES, FILES, StallingFs
from harness.streams import read_body
from harness.waiting import wait_until
from harness.wire import ROOT

from qtfs_common.protocol import DELAYED, OPERATIONS

WORKERS = 2
#: Of one session in one file system; beyond them requests are delayed. stuck.pyx
MOST_OF_MOUNT = 8


@pytest.fixture
def own_engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine with few workers, which a hung file system could all take."""
    with EngineProcess(tmp_path, workers=WORKERS).running() as engine:
        (engine.share / "plain").write_text("plain")
        yield engine
        wait_until(engine.is_idle, "the engine to be idle")


@pytest.fixture
def hung(own_engine: EngineProcess) -> Iterator[StallingFs]:
    """A file system below the share that answers until it is told not to."""
    with StallingFs(own_engine.share / "hung").mounted() as fs:
        yield fs


def ask_without_waiting(session: Session, slot: int, op: str, body: bytes, node: int = ROOT) -> None:
    session.slot(slot).send(op, wire.caller(node, session.who) + body)


GETATTR = struct.pack("<QII", 0, 0, 0)


def hang(session: Session, fs: StallingFs, node: int, slots: range) -> None:
    """Have a GETATTR hang in each of these slots."""
    before = fs.held()
    for slot in slots:
        ask_without_waiting(session, slot, "GETATTR", GETATTR, node)
    wait_until(lambda: fs.held() == before + len(slots), "all of them to be in the file system")


def test_others_are_served_while_more_requests_hang_than_there_are_workers(
    own_engine: EngineProcess, hung: StallingFs
) -> None:
    with Session(own_engine.address, own_engine.share, slots=16) as victim:
        node = victim.walk("hung/f0").node
        hung.hold("GETATTR")
        hang(victim, hung, node, range(1, 8))
        with Session(own_engine.address, own_engine.share) as other:
            assert other.walk("plain").attr.size == 5
        assert victim.walk("plain").attr.size == 5
        hung.go()
        for slot in range(1, 8):
            assert victim.slot(slot).receive().error == 0
    wait_until(lambda: own_engine.figures()["workers"] == WORKERS, "the extra workers to end", 20)


def test_what_would_hang_beyond_its_share_is_delayed(own_engine: EngineProcess, hung: StallingFs) -> None:
    with Session(own_engine.address, own_engine.share, slots=16) as victim:
        node = victim.walk("hung/f0").node
        hung.hold("GETATTR")
        hang(victim, hung, node, range(1, 1 + MOST_OF_MOUNT))
        wait_until(lambda: own_engine.figures()["stuck"] == MOST_OF_MOUNT, "them to be known")
        assert victim.ask("GETATTR", GETATTR, node=node).error == DELAYED
        assert victim.ask("LOOKUP", b"hung").error == DELAYED
        assert victim.ask("LOOKUP", b"plain").error == 0
        with Session(own_engine.address, own_engine.share) as other:
            ask_without_waiting(other, 1, "LOOKUP", b"hung")
            wait_until(lambda: hung.held() == MOST_OF_MOUNT + 1, "another session's request to be tried")
            hung.go()
            assert other.slot(1).receive().error == 0
        for slot in range(1, 1 + MOST_OF_MOUNT):
            assert victim.slot(slot).receive().error == 0
        wait_until(lambda: victim.ask("GETATTR", GETATTR, node=node).error == 0, "the delay to be over")


def test_a_stopped_daemon_stops_nobody_else(own_engine: EngineProcess, hung: StallingFs) -> None:
    with Session(own_engine.address, own_engine.share, slots=16) as victim:
        node = victim.walk("hung/f0").node
        os.kill(hung.pid, signal.SIGSTOP)
        try:
            for slot in range(1, 7):
                ask_without_waiting(victim, slot, "GETATTR", GETATTR, node)
            wait_until(lambda: own_engine.figures()["workers"] >= WORKERS + 6, "all to be replaced")
            assert victim.walk("plain").attr.size == 5
        finally:
            os.kill(hung.pid, signal.SIGCONT)
        for slot in range(1, 7):
            assert victim.slot(slot).receive().error == 0


def test_a_listing_passes_over_a_mount_that_hangs(own_engine: EngineProcess, hung: StallingFs) -> None:
    with Session(own_engine.address, own_engine.share, slots=4) as session:
        hung.hold("GETATTR")
        ask_without_waiting(session, 1, "LOOKUP", b"hung")
        wait_until(lambda: own_engine.figures()["stuck"], "it to be known")
        listed = {entry.name: entry.entry for entry in session.readdir(session.opendir(ROOT), plus=True)}
        assert listed[b"hung"] is None
        assert listed[b"plain"] is not None
        hung.go()
        assert session.slot(1).receive().error == 0


def test_what_is_mounted_elsewhere_is_told_and_let_go(own_engine: EngineProcess, hung: StallingFs) -> None:
    """The nodes in the hung file system are put aside meanwhile, which hangs, too."""
    other = own_engine.share / "other"
    other.mkdir()
    with (
        Session(own_engine.address, own_engine.share) as victim,
        Session(own_engine.address, own_engine.share, watch=True) as watcher,
    ):
        events = watcher.event()
        victim.walk("hung/f0")
        hung.hold()
        wait_until(lambda: hung.held() > 0, "the walk through the nodes to hang")
        watcher.walk("other")
        subprocess.run(["mount", "-t", "tmpfs", "other", other], check=True)
        try:
            assert events.receive().op == OPERATIONS["MOUNTS_CHANGED"]
            watcher.walk("other")
        finally:
            wait_until(lambda: subprocess.run(["umount", other], check=False).returncode == 0, "it to be let go")
        hung.go()


@pytest.fixture
def block_device(tmp_path: Path) -> Iterator[str]:
    image = tmp_path / "image"
    image.write_bytes(bytes(1 << 20))
    device = subprocess.run(["losetup", "--find", "--show", image], check=True, capture_output=True, text=True).stdout
    yield device.strip()
    subprocess.run(["losetup", "--detach", device.strip()], check=True)


def test_a_file_opened_while_its_node_is_being_let_go_keeps_it(own_engine: EngineProcess, hung: StallingFs) -> None:
    """For then its mount can be hidden by another, and a node that was let go is found no more."""
    place = os.fspath(hung.point)

    def holds(*paths: str) -> bool:
        return any(path in paths for path in descriptors(own_engine.pid).values())

    with Session(own_engine.address, own_engine.share) as session:
        node = session.walk("hung/f0").node

        def only_the_file_is_held() -> bool:
            return session.getattr(node).size == FILE_BYTES and not holds(place)

        wait_until(only_the_file_is_held, "the mount's root to be let go")
        hung.hold("OPENDIR")            # which tries whether the file can be opened by its handle, before it is let go
        wait_until(lambda: hung.held() == 1, "the file to be about to be let go")
        opened = session.open(node)
        hung.go()
        wait_until(lambda: not holds(place), "that to be over")
        subprocess.run(["mount", "-t", "tmpfs", "none", place], check=True)
        try:
            assert session.getattr(node).size == FILE_BYTES
        finally:
            subprocess.run(["umount", place], check=True)
        session.release(opened.handle)


def test_a_lazy_umount_that_hangs_in_the_engine_stops_nobody(own_engine: EngineProcess, block_device: str) -> None:
    """It ends there, as the engine holds the mount for open_by_handle_at(2) until a moment after a node's last use."""
    with (
        StallingFs(own_engine.share / "hung", block_device).mounted() as hung,
        Session(own_engine.address, own_engine.share) as session,
    ):
        node = session.walk("hung/f0").node
        place = os.fspath(hung.point)

        def is_let_go() -> bool:
            return not any(path.startswith(place) for path in descriptors(own_engine.pid).values())

        wait_until(is_let_go, "the mount to be let go")
        session.getattr(node)
        with stopped(own_engine.pid):  # or umount(8) might be the last to let it go
            subprocess.run(["umount", "-l", place], check=True)
            hung.hold("DESTROY")
        wait_until(lambda: hung.held() > 0, "the unmount to hang")
        assert session.walk("plain").attr.size == 5
        session.reattach()
        assert session.walk("plain").attr.size == 5
        hung.go()


@pytest.mark.parametrize("alone", [True, False])
def test_files_whose_close_hangs_stay_open_and_take_nobody(
    own_engine: EngineProcess, hung: StallingFs, alone: bool
) -> None:
    """They count for their session, until they are closed after all. Also if one RELEASE is about others, too."""
    with Session(own_engine.address, own_engine.share, slots=4) as session:
        nodes = [session.walk(f"hung/{os.fsdecode(name)}").node for name in FILES]
        opened = [(node, session.open(node).handle) for node in nodes for _ in range(8)]
        released = [] if alone else [session.open(session.walk("plain").node).handle]
        hung.hold("FLUSH")
        node, first = opened.pop()
        records = b"".join(struct.pack("<QQII", handle, 0, 0, 0) for handle in [*released, first])
        ask_without_waiting(session, 1, "RELEASE", records, node if alone else ROOT)
        wait_until(lambda: own_engine.figures()["stuck"] == 1, "the first to be known to hang")
        for node, handle in opened:
            session.release(handle, node=node)
        with pytest.raises(OSError, match="Stale"):
            session.read(opened[0][1], 0, 1)
        assert own_engine.figures()["workers"] <= WORKERS + 1
        assert own_engine.figures()["sessions"][0]["handles"] >= len(opened)
        hung.go()
        assert session.slot(1).receive().error == 0
        wait_until(lambda: own_engine.figures()["sessions"][0]["handles"] == 0, "all to be closed")


def test_a_session_ends_without_the_files_that_it_could_not_close(own_engine: EngineProcess, hung: StallingFs) -> None:
    session = Session(own_engine.address, own_engine.share, slots=4)
    node = session.walk("hung/f0").node
    opened = [session.open(node).handle for _ in range(4)]
    hung.hold("FLUSH")
    ask_without_waiting(session, 1, "RELEASE", struct.pack("<QQII", opened.pop(), 0, 0, 0), node)
    wait_until(lambda: own_engine.figures()["stuck"] == 1, "the first to be known to hang")
    for handle in opened:
        session.release(handle, node=node)
    session.detach()
    assert own_engine.figures()["sessions"] == []
    hung.go()


def test_a_session_ends_whose_files_cannot_be_closed(tmp_path: Path) -> None:
    with (
        EngineProcess(tmp_path, workers=WORKERS, arguments=["--grace", "1"]).running() as engine,
        StallingFs(engine.share / "hung").mounted() as hung,
    ):
        for leave in (Session.detach, Session.disconnect):
            session = Session(engine.address, engine.share)
            session.open(session.walk("hung/f0").node, os.O_RDWR)
            hung.hold("FLUSH")
            leave(session)
            wait_until(lambda: hung.held() > 0, "close(2) to hang")
            wait_until(lambda: not engine.figures()["sessions"], "the session to end")
            engine.reload(everything_below(engine.share))  # the main thread is there
            hung.go()
            wait_until(engine.is_idle, "the file to be closed")


def test_a_session_ends_whose_locks_cannot_be_given_back(tmp_path: Path) -> None:
    """To give one back is to close a file. Others end meanwhile, and signals are heeded."""
    with (
        EngineProcess(tmp_path, workers=WORKERS, arguments=["--grace", "1"]).running() as engine,
        StallingFs(engine.share / "hung").mounted() as hung,
    ):
        session = Session(engine.address, engine.share)
        file = Opened(session, "hung/f0")
        assert file.lock(WRITE) == 0
        hung.hold("FLUSH")
        session.disconnect()
        wait_until(lambda: hung.held() > 0, "close(2) to hang")
        other = Session(engine.address, engine.share)
        other.disconnect()
        wait_until(lambda: not engine.figures()["sessions"], "both sessions to end")
        engine.reload(everything_below(engine.share))
        hung.go()
        wait_until(engine.is_idle, "the files to be closed")


def test_a_wait_for_a_lock_that_hangs_keeps_nobody_elses(own_engine: EngineProcess, hung: StallingFs) -> None:
    """Processes of the server hold both locks. To try for one is to open the file again."""
    with (
        (hung.point / "f0").open("r+b") as there,
        (own_engine.share / "plain").open("r+b") as here,
        Session(own_engine.address, own_engine.share) as victim,
        Session(own_engine.address, own_engine.share) as other,
    ):
        fcntl.lockf(there, fcntl.LOCK_EX)
        fcntl.lockf(here, fcntl.LOCK_EX)
        hangs, waits = Opened(victim, "hung/f0"), Opened(other, "plain")
        hangs.wait(WRITE, tag=1)
        assert hangs.is_waiting()
        hung.hold("OPEN")
        wait_until(lambda: hung.held() > 0, "the attempt to hang")
        waits.wait(WRITE, tag=2)
        assert waits.is_waiting()
        fcntl.lockf(here, fcntl.LOCK_UN)
        assert waits.outcome() == (2, 0)
        hung.go()
        fcntl.lockf(there, fcntl.LOCK_UN)
        assert hangs.outcome() == (1, 0)


def test_a_mount_of_what_hangs_keeps_nobody_from_mounting(own_engine: EngineProcess, hung: StallingFs) -> None:
    hung.hold()
    with concurrent.futures.ThreadPoolExecutor() as pool:
        mounting = pool.submit(Session, own_engine.address, hung.point)
        wait_until(lambda: hung.held() > 0, "the mount to hang")
        with Session(own_engine.address, own_engine.share) as other:
            assert other.walk("plain").attr.size == 5
        hung.go()
        mounting.result().detach()


def test_an_engine_that_ends_with_requests_that_hang_lets_its_clients_go(tmp_path: Path) -> None:
    with EngineProcess(tmp_path, workers=WORKERS).running() as engine:
        engine.expect_log("stuck in the backing file system")
        with StallingFs(engine.share / "hung").mounted() as hung:
            session = Session(engine.address, engine.share)
            node = session.walk("hung/f0").node
            hung.hold("GETATTR")
            hang(session, hung, node, range(1, 3))
            os.kill(engine.pid, signal.SIGTERM)
            with pytest.raises(OSError):
                session.slot(1).receive()
            hung.go()
            engine.stop()
        session.disconnect()


def test_a_frozen_file_system_can_still_be_read(own_engine: EngineProcess, tmp_path: Path) -> None:
    point = own_engine.share / "ice"
    with (
        FreezingFs(tmp_path / "image", point).mounted() as fs,
        Session(own_engine.address, own_engine.share, slots=16) as victim,
    ):
        (point / "f").write_bytes(b"data")
        node = victim.walk("ice/f").node
        handle = victim.open(node, os.O_RDWR).handle
        write = struct.pack("<QQII", handle, 0, 3, 0) + b"new"
        with fs.frozen():
            for slot in range(1, 1 + MOST_OF_MOUNT):
                ask_without_waiting(victim, slot, "WRITE", write, node)
            wait_until(lambda: own_engine.figures()["stuck"] == MOST_OF_MOUNT, "the writes to hang")
            assert victim.ask("WRITE", write, node=node).error == DELAYED
            assert victim.read(handle, 0, 4) == b"data"
            assert victim.walk("ice/f").attr.size == 4
            assert victim.walk("plain").attr.size == 5
        for slot in range(1, 1 + MOST_OF_MOUNT):
            assert victim.slot(slot).receive().error == 0
        wait_until(lambda: victim.ask("WRITE", write, node=node).error == 0, "the delay to be over")
        victim.release(handle)


def test_what_a_frozen_file_system_keeps_from_being_deleted_keeps_no_session(
    own_engine: EngineProcess, tmp_path: Path
) -> None:
    """To close the last descriptor of an unlinked file is to delete it."""
    point = own_engine.share / "ice"
    with (
        FreezingFs(tmp_path / "image", point).mounted() as fs,
        Session(own_engine.address, own_engine.share) as session,
    ):
        (point / "f").write_bytes(bytes(65536))
        entry = session.walk("ice/f")
        (point / "f").unlink()
        with fs.frozen():
            session.forget((entry.node, 1))
            assert session.walk("plain").attr.size == 5


#: open_by_handle_at(2) takes a capability; without it nodes are found again by their paths.
WITHOUT_HANDLES = ("setpriv", "--bounding-set=-dac_read_search", "--inh-caps=-dac_read_search")


def upgrade_while_it_hangs(engine: EngineProcess, fs: StallingFs) -> None:
    """The engine waits for what hangs, but not for ever; then the kernel keeps only its thread that does."""
    before = psutil.Process(engine.pid)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        upgrade = pool.submit(engine.upgrade)
        wait_until(lambda: before.status() == psutil.STATUS_ZOMBIE, "the engine to have handed over", 20)
        fs.go()
        upgrade.result()


@pytest.mark.root
def test_what_only_a_hung_request_holds_ends_with_its_engine(tmp_path: Path) -> None:
    """The next engine does not take over what nobody knows any more, neither its descriptor nor its path's memory."""
    with (
        EngineProcess(tmp_path, workers=WORKERS, within=WITHOUT_HANDLES).running() as engine,
        StallingFs(engine.share / "hung").mounted() as fs,
    ):
        with Session(engine.address, engine.share) as session:
            directory = session.lookup(ROOT, b"hung").node
            node = session.lookup(directory, b"f0").node
            handle = session.open(node).handle
            fs.hold("READ")
            ask_without_waiting(session, 1, "READ", read_body(handle, 100))
            wait_until(lambda: fs.held() == 1, "the read to be in the file system")
            session.release(handle)
            session.forget((node, 1))
            upgrade_while_it_hangs(engine, fs)
            session.disconnect()
            session.statfs()
            held = engine.figures()["sessions"][0]
            assert held["open_nodes"] <= held["nodes"] == 2
            found = [session.lookup(directory, b"f%d" % number) for number in range(10)]
            for number in range(3000):  # until memory for paths that is free twice would be used twice
                (engine.share / str(number)).touch()
                found.append(session.lookup(ROOT, b"%d" % number))
            assert [session.getattr(one.node).ino for one in found] == [one.attr.ino for one in found]
            engine.kill()
            engine.start()
            session.disconnect()
            assert [session.getattr(one.node).ino for one in found] == [one.attr.ino for one in found]
        wait_until(engine.is_idle, "the engine to be idle")
