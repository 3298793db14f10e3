"""Looking for messages without sleeping takes nothing from a program that computes on the same machine."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess

MEASURED_S = 1.5
#: Of what it gets while nobody uses the mount.
LEAST_SHARE = 0.95
ATTEMPTS = 4


@contextlib.contextmanager
def computing() -> Iterator[psutil.Process]:
    """A program that never sleeps for each processor but one, which is for the work itself; the first of them."""
    count = max(1, len(os.sched_getaffinity(0)) - 1)
    programs = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield psutil.Process(programs[0].pid)
    finally:
        for program in programs:
            program.kill()
            program.wait()


def share(program: psutil.Process, path: Path | None) -> float:
    """The part of a processor that it gets while `path` is asked for a thousand times a second, or nobody asks."""
    before, since = sum(program.cpu_times()[:2]), time.monotonic()
    while time.monotonic() - since < MEASURED_S:
        if path is not None:
            path.stat()
        time.sleep(0.001)
    return float(sum(program.cpu_times()[:2]) - before) / (time.monotonic() - since)


@pytest.mark.root
@pytest.mark.alone
@pytest.mark.timeout(400)
@pytest.mark.parametrize("transport", ["unix", "shm"])
def test_who_computes_loses_nothing_to_those_who_look(transport: str, tmp_path: Path) -> None:
    with (
        EngineProcess(tmp_path / "engine", transport).running() as engine,
        MountProcess(engine, engine.share, tmp_path / "mnt", "cache=none").running() as mounted,
        computing() as program,
    ):
        (engine.share / "file").touch()
        # What else runs on this machine takes its part of either measurement, but not of all.
        shares = (share(program, mounted.point / "file") / share(program, None) for _ in range(ATTEMPTS))
        assert any(part >= LEAST_SHARE for part in shares)
