"""No system call for a message in shared memory, while both sides are awake."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.mounts import MountProcess
from harness.system_calls import CannotCount, counted, threads_of

pytestmark = pytest.mark.root

MESSAGES = 200
ATTEMPTS = 500
PATIENCE_S = 30.0
#: The engine falls asleep while the counters are read, is woken by the first message, and may be awake too late for it.
WAKING = 8
#: All that a message could be sent, received or waited for with. Not among them: sched_yield(2), by which who looks for
#: a message offers its processor to others between two looks (qtfs_common/spinning.pyx); what the client reads from and
#: writes to /dev/fuse; and the engine's pread(2) of the file.
CALLS = (
    *("sendto", "sendmsg", "recvfrom", "recvmsg", "poll", "ppoll", "select", "epoll_wait", "epoll_pwait", "epoll_ctl"),
    *("futex", "nanosleep", "clock_nanosleep", "ioctl"),
)


def fewest_calls(transport: str, area: Path, attempts: int = 1) -> int:
    """Of engine and daemon together while a program reads so often; the best attempt.

    Who has lost its processor for long enough, to whatever else runs on this machine, falls asleep and has to be woken.
    """
    found: list[int] = []
    with EngineProcess(area / "engine", transport).running() as engine:
        (engine.share / "f").write_bytes(b"x" * MESSAGES)
        with MountProcess(engine, engine.share, area / "mnt", "cache=none").running() as mount:
            fd = os.open(mount.point / "f", os.O_RDONLY)
            try:
                with counted(threads_of(engine.pid, mount.pid), CALLS, area) as calls:
                    deadline = time.monotonic() + PATIENCE_S
                    while len(found) < attempts and min(found, default=MESSAGES) > WAKING:
                        assert time.monotonic() < deadline, f"the best of {len(found)} attempts: {min(found)} calls"
                        before = calls()
                        for offset in range(MESSAGES):
                            assert os.pread(fd, 1, offset) == b"x"
                        found.append(calls() - before)
            finally:
                os.close(fd)
    return min(found)


@pytest.mark.alone
@pytest.mark.timeout(400)
def test_messages_in_shared_memory(tmp_path: Path) -> None:
    try:
        assert fewest_calls("shm", tmp_path, ATTEMPTS) <= WAKING
    except CannotCount as reason:
        pytest.skip(str(reason))


def test_messages_on_a_socket_are_counted(tmp_path: Path) -> None:
    """Each takes a call to send and one to receive on both sides."""
    try:
        assert fewest_calls("unix", tmp_path) >= 4 * MESSAGES
    except CannotCount as reason:
        pytest.skip(str(reason))
