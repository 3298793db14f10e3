"""What /proc tells the drivers of whoever waits for them."""

from __future__ import annotations

import os
import time
from pathlib import Path

from harness.waiting import wait_until

from qtfs_client.drivers.fuse3.callers import wants_to_open

SPIN_S = 0.3


def _spin_and_open(fifo: Path) -> None:
    """As a caller that lost its processor before it fell asleep: it runs, and then it sleeps in open(2)."""
    end = time.monotonic() + SPIN_S
    while time.monotonic() < end:
        pass
    os.close(os.open(fifo, os.O_WRONLY))


def test_a_caller_that_is_not_asleep_yet_is_waited_for(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    child = os.fork()
    if child == 0:
        try:
            _spin_and_open(fifo)
        finally:
            os._exit(0)
    try:
        wait_until(lambda: Path(f"/proc/{child}/syscall").read_text() == "running\n", "the child to run")
        assert wants_to_open(child)
        # Another look, now that it sleeps: what was seen is what it does.
        assert Path(f"/proc/{child}/syscall").read_text().split()[0] in ("2", "56", "257")
    finally:
        os.close(os.open(fifo, os.O_RDONLY))
        assert os.waitpid(child, 0) == (child, 0)
