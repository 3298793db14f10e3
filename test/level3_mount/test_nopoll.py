"""`-o nopoll`: the kernel is told once that there is no poll, and asks no more. io_uring's writes ask most."""

from __future__ import annotations

import errno
import os
import select
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness.engine_process import EngineProcess
from harness.fault_proxy import stop
from harness.mounts import MountProcess

# How requests travel does not matter.
pytestmark = [pytest.mark.root, pytest.mark.parametrize("common_engine", ["unix"], indirect=True)]

WRITES = 500
IN, OUT = select.POLLIN, select.POLLOUT


@pytest.fixture(params=["fuse3", "llfuse"])
def unasked(request: pytest.FixtureRequest, engine: EngineProcess, tmp_path: Path) -> Iterator[MountProcess]:
    """A mount with `nopoll` of a directory with the ordinary file `f`."""
    (tmp_path / "share").mkdir()
    (tmp_path / "share/f").write_bytes(b"content")
    options = f"driver={request.param},nopoll"
    with MountProcess(engine, tmp_path / "share", tmp_path / "mnt", options).running() as mount:
        yield mount


def ready(path: Path) -> int:
    """What poll(2) says of a file, at once."""
    fd = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    try:
        poll = select.poll()
        poll.register(fd, IN | OUT)
        return dict(poll.poll(0)).get(fd, 0)
    finally:
        os.close(fd)


def requests_of(mount: MountProcess) -> int:
    """How often the daemon has written something, above all replies to the kernel: proc_pid_io(5)."""
    return int(psutil.Process(mount.pid).io_counters().write_count)


def test_the_kernel_asks_once(unasked: MountProcess) -> None:
    """A daemon that is stopped answers nothing, and nobody waits for it."""
    fd = os.open(unasked.point / "f", os.O_RDWR)
    poll = select.poll()
    poll.register(fd, IN | OUT)
    try:
        assert poll.poll(0) == [(fd, IN | OUT)]
        process = psutil.Process(unasked.pid)
        rescue = threading.Timer(10, process.resume)
        stop(unasked.pid)
        rescue.start()
        try:
            assert [poll.poll(0) for _ in range(100)] == [[(fd, IN | OUT)]] * 100
            assert process.status() == psutil.STATUS_STOPPED, "somebody had to wait until it went on"
        finally:
            rescue.cancel()
            process.resume()
    finally:
        os.close(fd)


@pytest.mark.parametrize("unasked", ["fuse3"], indirect=True)
def test_fifos_are_always_ready(unasked: MountProcess, engine: EngineProcess, tmp_path: Path) -> None:
    """With `poll`, the default, the server is asked and knows better."""
    os.mkfifo(unasked.source / "fifo")
    before = engine.figures()["requests"].get("POLL", 0)
    for _ in range(3):
        assert ready(unasked.point / "fifo") == IN | OUT
    assert engine.figures()["requests"].get("POLL", 0) == before
    fd = os.open(unasked.point / "fifo", os.O_RDWR | os.O_NONBLOCK)
    try:
        with pytest.raises(BlockingIOError) as caught:
            os.read(fd, 1)
        assert caught.value.errno == errno.EAGAIN
    finally:
        os.close(fd)
    with MountProcess(engine, unasked.source, tmp_path / "asking").running() as asking:
        assert ready(asking.point / "fifo") == OUT
    assert engine.figures()["requests"]["POLL"] > before


@pytest.mark.parametrize("unasked", ["fuse3"], indirect=True)
def test_a_write_by_io_uring_is_one_request(unasked: MountProcess, tmp_path: Path) -> None:
    """With polls it is up to 129. Beside the writes there are some to open and close the file."""
    before = requests_of(unasked)
    command = ["fio", "--name=w", f"--directory={unasked.point}", "--ioengine=io_uring", "--iodepth=16"]
    command += ["--rw=randwrite", "--bs=4k", f"--size={4 * WRITES}k", "--fallocate=none"]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path, timeout=60)
    assert WRITES <= requests_of(unasked) - before < 3 * WRITES
