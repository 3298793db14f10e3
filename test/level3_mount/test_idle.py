"""A mount that nobody uses takes no processor time to speak of, on neither side."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.mounts import MountProcess

pytestmark = pytest.mark.root

IDLE_S = 3.0
MOST_OF_A_CORE = 0.01


def processor_s(pid: int) -> float:
    """Of all threads of a process, in steps of 10 ms."""
    return sum(psutil.Process(pid).cpu_times()[:2])


@pytest.mark.parametrize("driver", ["fuse3", "llfuse"])
@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_an_idle_engine_and_mount_take_no_time(tmp_path: Path, transport: str, driver: str) -> None:
    engine = EngineProcess(tmp_path / "engine", transport)
    with engine.running(), MountProcess(engine, engine.share, tmp_path / "mnt", f"driver={driver}").running() as mount:
        # Whoever has looked for requests goes on for a while.
        for number in range(200):
            os.mkdir(mount.point / str(number))
        time.sleep(0.5)
        both = engine.pid, mount.pid
        before = [processor_s(pid) for pid in both]
        time.sleep(IDLE_S)
        taken = [processor_s(pid) - since for pid, since in zip(both, before, strict=True)]
        assert sum(taken) < MOST_OF_A_CORE * IDLE_S, f"engine and mount: {taken} s"
