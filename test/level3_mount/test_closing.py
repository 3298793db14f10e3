"""Handles that were only read are ended together, a moment after close(2), and none is left."""

from __future__ import annotations

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.fault_proxy import FaultProxy
from harness.mounts import MountProcess
from harness.waiting import wait_until
from test_requests import requests

pytestmark = pytest.mark.root

CLOSED = 1000
ATTEMPTS = 50
#: That a RELEASE can end.
TOGETHER = 64


@pytest.fixture(params=ALL_TRANSPORTS)
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    made = EngineProcess(tmp_path / "engine", request.param)
    with made.running():
        (made.share / "f").write_bytes(b"text")
        yield made


@pytest.fixture
def point(engine: EngineProcess, tmp_path: Path) -> Iterator[Path]:
    with MountProcess(engine, engine.share, tmp_path / "mnt", "cache=none").running() as mount:
        yield mount.point


def handles(engine: EngineProcess) -> int:
    return sum(session["handles"] for session in engine.figures()["sessions"])


def test_handles_end_though_nothing_else_is_asked(engine: EngineProcess, point: Path) -> None:
    (point / "f").read_bytes()
    os.listdir(point)
    wait_until(lambda: handles(engine) == 0, "both handles to end")


def test_handles_end_while_the_same_process_waits_for_something_else(engine: EngineProcess, point: Path) -> None:
    os.mkfifo(engine.share / "fifo")

    def read_both() -> bytes:
        (point / "f").read_bytes()
        with (point / "fifo").open("rb") as fifo:
            return fifo.read()

    with ThreadPoolExecutor(1) as pool:
        reading = pool.submit(read_both)
        try:
            wait_until(lambda: requests(engine).get("OPEN", 0) >= 3, "the FIFO to be opened")
            wait_until(lambda: handles(engine) == 0, "the file's handle to end")
        finally:
            (engine.share / "fifo").write_bytes(b"end")
        assert reading.result(20) == b"end"


def test_many_handles_end_together(engine: EngineProcess, point: Path) -> None:
    """If they are closed one after the other without a pause, which somebody else's work may make: the best attempt."""
    fewest = CLOSED
    for _ in range(ATTEMPTS):
        before = requests(engine).get("RELEASE", 0)
        for _ in range(CLOSED):
            os.close(os.open(point / "f", os.O_RDONLY))
        wait_until(lambda: handles(engine) == 0, "all handles to end")
        fewest = min(fewest, requests(engine)["RELEASE"] - before)
        assert fewest >= CLOSED / TOGETHER
        if fewest < CLOSED / 2:
            return
    raise AssertionError(f"{fewest} RELEASEs at least for {CLOSED} handles")


def test_handles_that_are_closed_during_an_outage_end_afterwards(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path / "engine", "unix")
    with engine.running(), FaultProxy(tmp_path / "proxy.sock", engine).running() as proxy:
        (engine.share / "f").touch()
        with MountProcess(engine, engine.share, tmp_path / "mnt", through=proxy.address).running() as mount:
            fds = [os.open(mount.point / "f", os.O_RDONLY) for _ in range(10)]
            with proxy.outage():
                for fd in fds:
                    os.close(fd)
            wait_until(lambda: handles(engine) == 0, "all handles to end")
