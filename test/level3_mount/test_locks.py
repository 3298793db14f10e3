"""Locks of processes on two mounts and on the server: fcntl(2), open file descriptions, flock(2)."""

from __future__ import annotations

import contextlib
import fcntl
import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.fault_proxy import FaultProxy
from harness.leaks import environment
from harness.mounts import MountProcess
from harness.waiting import wait_until
from lockers import DEADLOCK, KINDS, lockers, says_first

pytestmark = pytest.mark.root

GRACE_S = 1


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    made = EngineProcess(tmp_path_factory.mktemp("locks"), workers=8)
    with made.running():
        yield made
        wait_until(made.is_idle, f"the engine to let everything go; it has {made.figures()}")


@pytest.fixture(scope="module")
def mounts(engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Path]]:
    """Two clients."""
    area = tmp_path_factory.mktemp("mounts")
    with ExitStack() as stack:
        yield [
            stack.enter_context(MountProcess(engine, engine.share, area / name, "driver=fuse3").running()).point
            for name in ("one", "two")
        ]


@pytest.fixture
def places(engine: EngineProcess, mounts: list[Path], request: pytest.FixtureRequest) -> Iterator[list[Path]]:
    """An empty file as both clients and the server see it."""
    name = f"file-{abs(hash(request.node.nodeid))}"
    (engine.share / name).touch()
    yield [place / name for place in (*mounts, engine.share)]
    (engine.share / name).unlink()


def free(path: Path, kind: str) -> bool:
    """Whether a process of the server could lock a file."""
    with path.open("r+b") as file:
        try:
            (fcntl.flock if kind == "flock" else fcntl.lockf)(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


# ---- who excludes whom


@pytest.mark.parametrize("kind", KINDS)
def test_everybody_excludes_everybody(places: list[Path], kind: str) -> None:
    with lockers(places[0], *places, kind=kind) as all_four:
        for holder in all_four:
            assert holder.lock() == "done"
            assert [other.lock() for other in all_four if other is not holder] == ["EAGAIN"] * 3
            assert holder.unlock() == "done"
        assert [each.ask("r", "try") for each in all_four] == ["done"] * 4
        assert all_four[0].lock() == "EAGAIN"


@pytest.mark.parametrize("kind", ["posix", "ofd"])
def test_ranges(places: list[Path], kind: str) -> None:
    with lockers(*places, kind=kind) as (one, two, local):
        assert one.lock(0, 10) == two.lock(10, 10) == local.lock(20, 10) == "done"
        assert one.lock(29, 1) == two.lock(0, 1) == local.lock(19, 1) == "EAGAIN"
        assert one.ask("u", "try", 3, 4) == "done"
        assert local.lock(3, 4) == "done"
        assert two.lock(2, 1) == two.lock(7, 1) == "EAGAIN"


def test_open_file_descriptions_and_processes_are_different_owners(places: list[Path]) -> None:
    with lockers(places[0]) as (posix,), lockers(places[0], kind="ofd") as (ofd,):
        assert posix.lock(0, 10) == "done"
        assert ofd.lock(5, 1) == "EAGAIN"
        assert ofd.lock(10, 1) == "done"
        assert posix.lock(10, 1) == "EAGAIN"


# ---- waiting


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("holds", "waits"), [(0, 0), (0, 1), (0, 2), (2, 0)])
def test_a_wait_ends_when_the_lock_is_given_back(places: list[Path], kind: str, holds: int, waits: int) -> None:
    with lockers(places[holds], places[waits], kind=kind) as (holder, waiter):
        assert holder.lock() == "done"
        waiter.wait()
        assert not free(places[2], kind)
        assert holder.unlock() == "done"
        assert waiter.says() == "done"
        assert holder.lock() == "EAGAIN"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", ["close", "kill"])
def test_a_lock_ends_with_the_file_and_with_the_process(places: list[Path], kind: str, end: str) -> None:
    with lockers(*places[:2], kind=kind) as (holder, waiter):
        assert holder.lock() == "done"
        waiter.wait()
        if end == "close":
            holder.close()
        else:
            assert holder.caller.kill() < 5
        assert waiter.says() == "done"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("holds", [1, 2])
def test_a_signal_ends_a_wait_and_no_lock_is_left(places: list[Path], kind: str, holds: int) -> None:
    with lockers(places[0], places[holds], kind=kind) as (waiter, holder):
        assert holder.lock() == "done"
        waiter.wait()
        os.kill(waiter.pid, signal.SIGALRM)
        assert waiter.says() == "EINTR"
        assert holder.unlock() == "done"
        assert free(places[2], kind)
        assert waiter.ask("w", "wait") == "done", "it may ask again"


@pytest.mark.parametrize("kind", KINDS)
def test_who_is_killed_while_it_waits_gets_no_lock(places: list[Path], kind: str) -> None:
    with lockers(*places, kind=kind) as (holder, waiter, local):
        assert holder.lock() == "done"
        waiter.wait()
        assert waiter.caller.kill() < 5
        assert holder.unlock() == "done"
        wait_until(lambda: local.lock() == "done", "the lock to be free")


# ---- deadlocks


@pytest.mark.parametrize("clients", [(0, 1), (0, 0)])
def test_two_processes_that_wait_for_each_other(places: list[Path], clients: tuple[int, int]) -> None:
    with lockers(*(places[client] for client in clients)) as (one, two):
        assert one.lock(0, 1) == two.lock(1, 1) == "done"
        one.wait("w", 1, 1)
        two.order("w", "wait", 0, 1)
        told = says_first(one, two)
        other = two if told is one else one
        assert told.says() == DEADLOCK
        assert told.unlock() == "done"
        assert other.says() == "done"


def test_a_circle_of_three_processes(places: list[Path]) -> None:
    with lockers(places[0], places[1], places[0]) as three:
        for number, each in enumerate(three):
            assert each.lock(number, 1) == "done"
        for number, each in enumerate(three):
            each.order("w", "wait", (number + 1) % 3, 1)
        told = says_first(*three)
        assert told.says() == DEADLOCK
        assert told.unlock() == "done"
        behind = three[three.index(told) - 1]
        assert behind.says() == "done"
        assert behind.unlock() == "done"
        assert three[three.index(told) - 2].says() == "done"


# ---- clients that go


@contextmanager
def mortal(area: Path) -> Iterator[tuple[EngineProcess, FaultProxy, MountProcess, MountProcess]]:
    """An engine with a short grace, a mount by way of a proxy, and another."""
    engine = EngineProcess(area / "engine", workers=8, arguments=("--grace", str(GRACE_S)))
    with ExitStack() as stack:
        stack.enter_context(engine.running())
        proxy = stack.enter_context(FaultProxy(area / "proxy.sock", engine).running())
        doomed = MountProcess(engine, engine.share, area / "doomed", "driver=fuse3", through=proxy.address)
        doomed.start()
        stack.callback(doomed.take_away)
        other = stack.enter_context(MountProcess(engine, engine.share, area / "other", "driver=fuse3").running())
        yield engine, proxy, doomed, other


@pytest.mark.parametrize("kind", KINDS)
def test_locks_of_a_client_whose_daemon_was_killed_end_with_its_grace(tmp_path: Path, kind: str) -> None:
    with mortal(tmp_path) as (engine, _, doomed, other):
        (engine.share / "file").touch()
        with lockers(doomed.point / "file", other.point / "file", kind=kind) as (holder, waiter):
            assert holder.lock() == "done"
            waiter.wait()
            doomed.kill()
            assert not free(engine.share / "file", kind), "it might have come back"
            assert waiter.says() == "done"
            assert not free(engine.share / "file", kind)


@pytest.mark.parametrize("kind", KINDS)
def test_locks_of_a_session_that_was_lost_are_lost(tmp_path: Path, kind: str) -> None:
    """An outage longer than the grace: the holder is told when it next uses the file, and can begin anew."""
    with mortal(tmp_path) as (engine, proxy, doomed, other):
        (engine.share / "file").touch()
        with lockers(doomed.point / "file", other.point / "file", kind=kind) as (holder, waiter):
            assert holder.lock() == "done"
            waiter.wait()
            with proxy.outage():
                assert waiter.says() == "done"
            assert waiter.unlock() == "done"
            wait_until(lambda: holder.lock() == "ESTALE", "the mount to be back")
            with lockers(doomed.point / "file", kind=kind) as (anew,):
                assert anew.lock() == "done"
                assert waiter.lock() == "EAGAIN"


def test_locks_outlive_a_short_outage(tmp_path: Path) -> None:
    with mortal(tmp_path) as (engine, proxy, doomed, other):
        (engine.share / "file").touch()
        with lockers(doomed.point / "file", other.point / "file") as (holder, waiter):
            assert waiter.lock(0, 1) == holder.lock(1, 1) == "done"
            holder.wait("w", 0, 1)
            proxy.cut_all()
            assert waiter.lock(1, 1) == "EAGAIN"
            assert waiter.unlock() == "done"
            assert holder.says() == "done"


# ---- programs


def test_flock_1(places: list[Path]) -> None:
    with lockers(places[0], kind="flock") as (holder,):
        assert holder.lock() == "done"
        for place in places:
            assert _flock("-n", "-E", "9", place, "true") == 9
        waiting = [subprocess.Popen(["flock", place, "true"], env=environment()) for place in places]
        assert holder.unlock() == "done"
        assert [process.wait(10) for process in waiting] == [0, 0, 0]
        assert _flock("-s", "-n", places[1], "flock", "-s", "-n", places[2], "true") == 0


def _flock(*words: object) -> int:
    return subprocess.run(["flock", *map(str, words)], env=environment(), timeout=20, check=False).returncode


def test_what_fuse_does_not_carry(places: list[Path]) -> None:
    """Locks of directories stay within one client: the kernel asks no FUSE file system. doc/architecture.md says so."""
    with ExitStack() as stack:
        fds = [os.open(place.parent, os.O_RDONLY) for place in places]
        for fd in fds:
            stack.callback(os.close, fd)
        for fd in fds:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        again = os.open(places[0].parent, os.O_RDONLY)
        stack.callback(os.close, again)
        with contextlib.suppress(BlockingIOError):
            fcntl.flock(again, fcntl.LOCK_EX | fcntl.LOCK_NB)
            raise AssertionError("within one client they hold")
