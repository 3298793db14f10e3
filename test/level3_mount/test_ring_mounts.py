"""Mounts over shared memory whose file, engine or client comes to grief."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess
from harness.ring_file import MAGIC, PAGE, RingFile, bar_path
from harness.waiting import wait_until

from qtfs_common.addresses import parse_address

pytestmark = pytest.mark.root

MIB = 1 << 20
FILE_BYTES = 8 * MIB
LARGEST = MIB
STOP_S = 40
#: What a program may see while the memory is gone.
BROKEN = errno.EIO


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone, idle at the end."""
    with EngineProcess(tmp_path / "engine", "shm", workers=8).running() as running:
        yield running
        if running.process is not None:
            wait_until(running.is_idle, f"the engine to let everything go; it has {running.figures()}")


@contextlib.contextmanager
def mounted(engine: EngineProcess, point: Path, options: str = "") -> Iterator[MountProcess]:
    with MountProcess(engine, engine.share, point, f"driver=fuse3,cache=none,{options}").running() as mount:
        yield mount


class Load:
    """A process whose threads read and write files of which every byte is known.

    Whatever breaks, no other byte may ever be seen. Not our threads, because to start an engine would close their files
    in the child, and wait for the engine.
    """

    def __init__(self, mount: MountProcess, threads: int = 4, prefix: str = "f") -> None:
        self.data = random.Random(5).randbytes(FILE_BYTES)
        self.mount = mount
        self.paths = [Path(f"{prefix}{number}") for number in range(threads)]
        #: Somebody changes messages: anything may come of a request.
        self.any_error = False
        context = multiprocessing.get_context("fork")
        self._done = context.Array("Q", threads, lock=False)
        self._wrong = context.SimpleQueue()
        self._stopping = context.Event()
        self._process = context.Process(target=self._run, daemon=True)

    @property
    def done(self) -> list[int]:
        """Transfers of each thread."""
        return list(self._done)

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        for path in self.paths:
            (self.mount.engine.share / path).write_bytes(self.data)
        self._process.start()
        try:
            self.wait_for_progress()
            yield self
        finally:
            self._stopping.set()
            self._process.join(STOP_S)
            hangs = self._process.is_alive()
            self._process.kill()
            self._process.join()
            self._process.close()
        assert not hangs, "a request hangs"
        self._check()
        self._wrong.close()

    def _check(self) -> None:
        wrong = []
        while not self._wrong.empty():
            wrong.append(self._wrong.get())
        if not self.any_error:
            assert not wrong, wrong
            for path in self.paths:
                assert (self.mount.engine.share / path).read_bytes() == self.data, f"what was written to {path}"

    def wait_for_progress(self) -> None:
        """Until every thread has got on."""
        before = self.done
        wait_until(
            lambda: all(now > then + 5 for now, then in zip(self.done, before, strict=True)),
            "the mount to work (again)",
            30,
        )

    def _run(self) -> None:
        threads = [threading.Thread(target=self._work, args=(number,)) for number in range(len(self.paths))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _work(self, number: int) -> None:
        draw = random.Random(number)
        while not self._stopping.is_set():
            try:
                fd = os.open(self.mount.point / self.paths[number], os.O_RDWR)
                try:
                    while not self._stopping.is_set():
                        self._transfer(fd, draw)
                        self._done[number] += 1
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in (BROKEN, errno.ESTALE):
                    self._tell(repr(error))

    def _tell(self, what: str) -> None:
        if not self.any_error and not self._stopping.is_set():
            self._wrong.put(what)
            self._stopping.set()

    def _transfer(self, fd: int, draw: random.Random) -> None:
        size = draw.choice((draw.randrange(1, 20_000), LARGEST))
        at = draw.randrange(FILE_BYTES - size)
        if draw.random() < 0.5:
            found = os.pread(fd, size, at)
            # Of what takes several requests the first may succeed, and the next end with EIO.
            if not found or found != self.data[at : at + len(found)]:
                self._tell(f"read {len(found)} of {size} bytes at {at}: not what the file has")
        else:
            os.pwrite(fd, self.data[at : at + size], at)


# ---- the file is cut short


@pytest.mark.parametrize("left", [0.0, 0.5], ids=["all", "half"])
def test_the_file_is_truncated_under_load(engine: EngineProcess, tmp_path: Path, left: float) -> None:
    """Requests end with EIO or go on, once the engine has laid out what there is."""
    engine.expect_log("the memory is gone")
    bar = bar_path(engine)
    with mounted(engine, tmp_path / "mnt") as mount, Load(mount).running() as load:
        for number in (1, 2):
            os.truncate(bar, int(bar.stat().st_size * left))
            wait_until(lambda n=number: engine.log().count("the memory is back") >= n, "the engine to lay it out", 20)
            load.wait_for_progress()
    assert engine.log().count("the memory is gone") == 2
    assert "connected again" in mount.log()


# ---- small memory


def test_a_small_file_serves_large_files(tmp_path: Path) -> None:
    """1 MiB: three channels, so a mount has two workers; messages of 64 KiB."""
    engine = EngineProcess(tmp_path / "engine", "shm")
    with bar_path(engine).open("wb") as file:
        file.truncate(MIB)
    data = random.Random(7).randbytes(5 * MIB + 77)
    with engine.running(), mounted(engine, tmp_path / "mnt") as mount:
        (mount.point / "f").write_bytes(data)
        assert (engine.share / "f").read_bytes() == data
        assert (mount.point / "f").read_bytes() == data
        with Load(mount).running() as load:
            load.wait_for_progress()


def test_several_mounts_share_one_memory(engine: EngineProcess, tmp_path: Path) -> None:
    """And one whose client is killed under load leaves its channels to another."""
    with contextlib.ExitStack() as stack:
        mounts = [stack.enter_context(mounted(engine, tmp_path / f"mnt{number}")) for number in range(2)]
        loads = [stack.enter_context(Load(mount, prefix=f"m{n}-").running()) for n, mount in enumerate(mounts)]
        killed = MountProcess(engine, engine.share, tmp_path / "killed", "driver=fuse3,cache=none")
        try:
            killed.start()
            with RingFile(bar_path(engine)) as ring:
                taken = len(ring.served())
                killed.kill()
                wait_until(lambda: len(ring.served()) < taken, "the engine to find the dead client's channels free")
        finally:
            killed.take_away()
        with mounted(engine, tmp_path / "third") as third, Load(third, prefix="third-").running():
            for load in loads:
                load.wait_for_progress()
    wait_until(lambda: not engine.figures()["connections"], "the engine to let the connections go")
    engine.kill()  # the killed client's session has its grace time


# ---- engines and clients that stop, die, and come again


def test_the_engine_is_killed_and_comes_again(engine: EngineProcess, tmp_path: Path) -> None:
    with mounted(engine, tmp_path / "mnt") as mount, Load(mount).running() as load:
        for _ in range(2):
            engine.kill()
            engine.start()
            load.wait_for_progress()
    assert "connected again" in mount.log() or "starting afresh" in mount.log()


@pytest.mark.parametrize("who", ["engine", "client"])
def test_a_side_that_is_stopped_goes_on(engine: EngineProcess, tmp_path: Path, who: str) -> None:
    with mounted(engine, tmp_path / "mnt") as mount, Load(mount).running() as load:
        pid = engine.pid if who == "engine" else mount.pid
        for _ in range(3):
            os.kill(pid, signal.SIGSTOP)
            try:
                wait_until(lambda: Path(f"/proc/{pid}/stat").read_text().split()[2] == "T", "the signal")
                if who == "engine":
                    with RingFile(bar_path(engine)) as ring:
                        assert ring.served()
            finally:
                os.kill(pid, signal.SIGCONT)
            load.wait_for_progress()


# ---- rubbish


def test_rubbish_all_over_the_file(tmp_path: Path) -> None:
    """Nobody dies of it, nobody hangs; afterwards the engine lays the memory out again, and the mount works."""
    over_unix = parse_address(f"unix://{tmp_path}/other.sock")
    arguments = ("--listen", str(over_unix), "--bar-layout", "channels=12,request=256K,reply=256K")
    engine = EngineProcess(tmp_path / "engine", "shm", arguments=arguments, workers=8, limits=("--fsize=67108864",))
    engine.expect_log("the memory is gone")
    draw = random.Random(8)
    with engine.running(), mounted(engine, tmp_path / "mnt", "timeout=2") as mount:
        load = Load(mount)
        load.any_error = True
        with load.running(), RingFile(bar_path(engine)) as ring:
            until = time.monotonic() + 3
            while time.monotonic() < until:
                limit = draw.choice((256, PAGE + 24 * 128, len(ring.map)))
                at = draw.randrange(limit - 8)
                ring.set(at, draw.choice((0, draw.randrange(1 << 64), draw.randrange(1 << 16))))
                time.sleep(draw.random() / 500)
            assert engine.exit_status() is None
            with MountProcess(engine, engine.share, tmp_path / "fresh", "cache=none", through=over_unix).running() as m:
                assert "f0" in os.listdir(m.point)
            ring.set(MAGIC, 0)  # whatever has hit the control block, now it is seen
            wait_until(
                lambda: ring.get(MAGIC) == int.from_bytes(b"QTFSRING", "little")
                and engine.log().count("the memory is back") == engine.log().count("the memory is gone"),
                "the engine to lay it out",
            )
            load.wait_for_progress()
        with mounted(engine, tmp_path / "another") as another:
            assert "f0" in os.listdir(another.point)
