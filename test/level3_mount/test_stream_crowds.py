"""Many who wait for FIFOs: in one epoll, in many processes, over connections that break, at engines that die."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import epoll_scenario
import pytest
from forks import children, has_reader
from harness.engine_process import EngineProcess
from harness.fault_proxy import FaultProxy
from harness.leaks import environment, thread_count
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import in_child

pytestmark = pytest.mark.root

FIFOS, STEPS = 500, 800
CROWD = 2000
CUTS = 100
PROGRAM = Path(__file__).with_name("crowd.py")


@contextlib.contextmanager
def mounted(area: Path, options: str = "", transport: str = "unix") -> Iterator[tuple[EngineProcess, FaultProxy, Path]]:
    """An engine, a mount of its share, and the proxy between them."""
    engine = EngineProcess(area / "engine", transport, workers=8)
    with engine.running(), FaultProxy(area / "proxy.sock", engine).running() as proxy:
        mount = MountProcess(engine, engine.share, area / "mnt", f"driver=fuse3,{options}", through=proxy.address)
        with mount.running():
            yield engine, proxy, mount.point
        if engine.process is not None:
            wait_until(engine.is_idle, "the engine to let everything go", 20)


@pytest.mark.parametrize("sides", ["there-here", "there-there"])
def test_an_epoll_on_hundreds_of_fifos(tmp_path: Path, sides: str) -> None:
    """Event by event as on local ones, level- and edge-triggered."""
    local = tmp_path / "local"
    local.mkdir()
    expected = in_child(lambda: epoll_scenario.run(str(local), str(local), FIFOS, STEPS, 7))
    assert sum(len(found) for _, _, found in expected) > STEPS, "there is something to compare"
    with mounted(tmp_path) as (engine, _, there):
        a, b = (str(there if side == "there" else engine.share) for side in sides.split("-"))
        found = in_child(lambda: epoll_scenario.run(a, b, FIFOS, STEPS, 7))
    for number, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        assert mine == theirs, f"step {number}"


def blocked(parent: int, number: int) -> int:
    """How many children of a process sleep in a system call."""
    found = 0
    for pid in Path(f"/proc/{parent}/task/{parent}/children").read_text().split():
        with contextlib.suppress(OSError):
            found += Path(f"/proc/{pid}/syscall").read_text().startswith(f"{number} ")
    return found


def alive(parent: int) -> int:
    """How many children of a process have not ended."""
    pids = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return sum(Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] != "Z" for pid in pids)


@contextlib.contextmanager
def crowd(kind: str, path: Path, count: int = CROWD) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-I", "-S", str(PROGRAM), kind, str(path), str(count)]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(), start_new_session=True
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(30)
        for stream in (process.stdin, process.stdout):
            assert stream is not None
            stream.close()


OPENAT, READ = (257, 0) if os.uname().machine == "x86_64" else (56, 63)


@pytest.mark.parametrize("kind", ["open", "read"])
def test_two_thousand_processes_wait(tmp_path: Path, kind: str) -> None:
    """Nobody else notices; all of them die at once, and the engine has nothing left of them."""
    with mounted(tmp_path) as (engine, _, there):
        os.mkfifo(there / "fifo")
        os.mkfifo(there / "other")
        before = thread_count(engine.pid)
        with crowd(kind, there / "fifo") as process:
            number = OPENAT if kind == "open" else READ
            wait_until(lambda: blocked(process.pid, number) == CROWD, "all to wait", 60, 0.2)
            for name in range(100):
                (there / f"{name}").write_text("x")
                os.stat(there / f"{name}")
                os.unlink(there / f"{name}")
            both = os.open(there / "other", os.O_RDWR)
            for _ in range(100):
                os.write(both, b"x")
                assert os.read(both, 1) == b"x"
            with children(lambda: os.read(both, 1)) as (child,):
                child.blocks_in("read")
                os.write(both, b"x")
                assert child.result() == b"x"
            os.close(both)
            print("die", file=process.stdin, flush=True)
            assert process.stdout is not None
            assert process.stdout.readline() == f"{CROWD} {{}}\n"
        wait_until(lambda: not has_reader(engine.share / "fifo"), "the engine to close what they had", 20)
        wait_until(lambda: thread_count(engine.pid) <= before, "threads that nobody needs to end", 30)
        assert engine.figures()["sessions"][0]["handles"] == 0


@pytest.mark.parametrize("victim", ["engine", "daemon"])
def test_a_crowd_is_told_of_a_death(tmp_path: Path, victim: str) -> None:
    """SIGKILL to either: who waits gets an error."""
    engine = EngineProcess(tmp_path / "engine", workers=4)
    engine.start()
    mount = MountProcess(engine, engine.share, tmp_path / "mnt", "driver=fuse3,timeout=2")
    try:
        mount.start()
        os.mkfifo(mount.point / "fifo")
        both = os.open(engine.share / "fifo", os.O_RDWR)
        with crowd("read", mount.point / "fifo", 100) as process:
            wait_until(lambda: blocked(process.pid, READ) == 100, "all to wait", 30, 0.05)
            (engine if victim == "engine" else mount).kill()
            wait_until(lambda: alive(process.pid) == 0, "all to be told", 20, 0.05)
            print("die", file=process.stdin, flush=True)
            assert process.stdout is not None
            error = "EIO" if victim == "engine" else "ECONNABORTED"
            assert process.stdout.readline() == f"0 {{'{error}': 100}}\n"
        os.close(both)
    finally:
        mount.take_away()
        engine.kill()


NUMBERS = """
import os, struct, sys
fd = os.open(sys.argv[1], os.O_WRONLY)
for number in range(0, 60000, 20):
    os.write(fd, struct.pack("<20I", *range(number, number + 20)))
"""


@pytest.mark.parametrize("sides", ["there-here", "here-there", "there-there"])
def test_a_stream_across_many_cuts(tmp_path: Path, sides: str) -> None:
    """Connections break while a reader or a writer waits: no byte is lost, and none comes twice."""
    with mounted(tmp_path) as (engine, proxy, there):
        a, b = (there if side == "there" else engine.share for side in sides.split("-"))
        os.mkfifo(a / "fifo")
        done = threading.Event()

        def cut() -> None:
            for _ in range(CUTS):
                if not done.wait(0.01):
                    proxy.cut_all()

        # It opens the FIFO itself: this process, where the proxy is, stands still while a child with our files begins.
        source = subprocess.Popen([sys.executable, "-I", "-S", "-c", NUMBERS, str(b / "fifo")])
        cutter = threading.Thread(target=cut)
        cutter.start()
        try:
            # Of a size that numbers do not fit in: a lost or doubled piece shows.
            with open(a / "fifo", "rb", buffering=0) as file:
                data = b"".join(iter(lambda: file.read(997), b""))
        finally:
            done.set()
            cutter.join()
        assert source.wait(30) == 0
        assert len(data) == 240000
        assert data == b"".join(number.to_bytes(4, "little") for number in range(60000))


def test_openers_across_cuts(tmp_path: Path) -> None:
    """An open that waits survives broken connections, and makes one reader."""
    with mounted(tmp_path) as (engine, proxy, there):
        os.mkfifo(there / "fifo")
        for _ in range(5):
            with children(lambda: open(there / "fifo", "rb").read()) as (child,):
                child.blocks_in("open")
                for _ in range(3):
                    attached = proxy.count("reply", "ATTACH")
                    proxy.cut_all()
                    wait_until(lambda attached=attached: proxy.count("reply", "ATTACH") > attached, "a new connection")
                with open(engine.share / "fifo", "wb") as end:
                    end.write(b"data")
                assert child.result() == b"data"
            wait_until(lambda: not has_reader(engine.share / "fifo"), "the reader's end")
