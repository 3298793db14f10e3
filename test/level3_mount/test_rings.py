"""Mounts over shared memory whose file, engine or client comes to grief."""

from __future__ import annotations

import contextlib
import errno
import os
import random
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess
from harness.ring_file import bar_path
from harness.waiting import wait_until

pytestmark = pytest.mark.root

MIB = 1 << 20
FILE_BYTES = 8 * MIB
LARGEST = MIB
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
    """Threads that read and write files whose every byte is known: whatever breaks, no other byte may ever be seen."""

    def __init__(self, mount: MountProcess, threads: int = 4) -> None:
        self.data = random.Random(5).randbytes(FILE_BYTES)
        self.mount = mount
        self.wrong: list[str] = []
        self.done = [0] * threads
        self._stopping = threading.Event()
        self._threads = [threading.Thread(target=self._work, args=(number,)) for number in range(threads)]

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        for number in range(len(self.done)):
            (self.mount.engine.share / f"f{number}").write_bytes(self.data)
        for thread in self._threads:
            thread.start()
        try:
            self.wait_for_progress()
            yield self
        finally:
            self._stopping.set()
            for thread in self._threads:
                thread.join()
        assert not self.wrong, self.wrong
        for number in range(len(self.done)):
            assert (self.mount.engine.share / f"f{number}").read_bytes() == self.data, f"what was written to f{number}"

    def wait_for_progress(self) -> None:
        """Until every thread has got on."""
        before = list(self.done)
        wait_until(
            lambda: all(now > then + 5 for now, then in zip(self.done, before, strict=True)),
            "the mount to work (again)",
            30,
        )

    def _work(self, number: int) -> None:
        draw = random.Random(number)
        while not self._stopping.is_set():
            try:
                fd = os.open(self.mount.point / f"f{number}", os.O_RDWR)
                try:
                    while not self._stopping.is_set():
                        self._transfer(fd, draw)
                        self.done[number] += 1
                finally:
                    os.close(fd)
            except OSError as error:
                if error.errno not in (BROKEN, errno.ESTALE):
                    self.wrong.append(repr(error))

    def _transfer(self, fd: int, draw: random.Random) -> None:
        size = draw.choice((draw.randrange(1, 20_000), LARGEST))
        at = draw.randrange(FILE_BYTES - size)
        if draw.random() < 0.5:
            found = os.pread(fd, size, at)
            if found != self.data[at : at + size]:
                self.wrong.append(f"read {len(found)} of {size} bytes at {at}: not what the file has")
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
