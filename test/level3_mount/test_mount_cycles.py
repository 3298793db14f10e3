"""Mounts that come and go leave nothing in the engine, and nothing of the daemon."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.leaks import mounts_below, our_processes, thread_count
from harness.mount_nursery import MountNursery
from harness.waiting import wait_until

CYCLES = 1000
WARM_UP = 4
LARGEST_GROWTH_BYTES = 4 << 20
#: For each cycle: generously what the whole of a test run may take on a slow machine.
CYCLE_TIMEOUT_S = 15


@pytest.fixture
def own(tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone."""
    with EngineProcess(tmp_path / "engine", arguments=("--grace", "1")).running() as engine:
        yield engine


@pytest.fixture
def nursery() -> Iterator[MountNursery]:
    with MountNursery().open() as nursery:
        yield nursery


def live(nursery: MountNursery, engine: EngineProcess, point: Path, number: int) -> None:
    """Mount, work, unmount: by umount(8), or by killing the daemon, and then by umount(8)."""
    mount = nursery.mount(engine, engine.share, point, "driver=fuse3")
    with mount.running():
        (point / "made").write_text(str(number))
        assert (engine.share / "made").read_text() == str(number)
        os.listdir(point)
        if number % 4 == 3:
            mount.kill()
            subprocess.run(["umount", point], check=True)
    assert mounts_below(str(point)) == []


@pytest.mark.memory
@pytest.mark.timeout(60 + CYCLES * CYCLE_TIMEOUT_S)
def test_mounts_that_come_and_go_leave_nothing(
    nursery: MountNursery, own: EngineProcess, tmp_path: Path
) -> None:
    for number in range(WARM_UP):
        live(nursery, own, tmp_path / "mnt", number)
    wait_until(own.is_idle, "the sessions of killed daemons to be over")
    before = {process.pid for process in our_processes()}
    resident, threads, descriptors = own.resident_bytes(), thread_count(own.pid), own.descriptors()
    for number in range(CYCLES):
        live(nursery, own, tmp_path / "mnt", number)
    wait_until(own.is_idle, f"the engine to let everything go; it has {own.figures()}")
    assert {process.pid for process in our_processes()} <= before
    # Those that let sessions go end when they have had nothing to do for five seconds.
    wait_until(lambda: thread_count(own.pid) <= threads, "the engine's threads to be as many as before", 15)
    grown = own.resident_bytes() - resident
    print(f"{CYCLES} mounts: the engine has grown by {grown} bytes")
    assert grown < LARGEST_GROWTH_BYTES
    # It may just be reading the mount table.
    wait_until(lambda: own.descriptors() <= descriptors, "the engine's descriptors to be as many as before")
