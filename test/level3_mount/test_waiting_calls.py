"""Every system call while the server is silent: it can be killed and interrupted, and ends when the timeout is over.

doc/reliability.md, promise 3. Over sockets each call waits in its own request, which a proxy keeps; over shared memory
it is the engine that is stopped, and the call waits in its first request.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from calling import SINGLE_CALLS, Caller, calling
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.fault_proxy import FaultProxy, Message, stopped
from harness.mounts import MountProcess
from harness.waiting import wait_until
from lines import connected
from single_calls import CALLS, furnish

pytestmark = pytest.mark.root

TIMEOUT_S = 4
#: A request whose caller has caught a signal is given two seconds for success, and write(2) may make two requests.
SOON_S = 8.0
#: A page that the kernel reads is awaited by whoever wants it, not asked for by them: only death ends that.
NOT_INTERRUPTED = {"read", "fault", "execve"}
#: A page fault tells its error by a signal, poll(2) by POLLERR.
FAILURES = {"fault": "(ended)", "poll": "done"}


@contextlib.contextmanager
def ends_of(area: Path, transport: str, timeout_s: int) -> Iterator[tuple[Ends, FaultProxy | None]]:
    """A mount, and the proxy that its messages go by, if any."""
    options = f"driver=fuse3,cache=auto,threads=56,timeout={timeout_s},run_dir={area}/run"
    if transport != "shm":
        with connected(area, options, transport=transport) as line:
            yield Ends(line.mount, area / "run"), line.proxy
        return
    # A channel for each thread, the event channel, and what comes and goes.
    layout = ("--bar-layout", "channels=72,request=144K,reply=144K")
    with EngineProcess(area / "engine", transport, workers=8, arguments=layout).running() as engine:
        with MountProcess(engine, engine.share, area / "mnt", options).running() as mount:
            yield Ends(mount, area / "run"), None
        wait_until(engine.is_idle, "the engine to let everything go")


@contextlib.contextmanager
def kept_by(proxy: FaultProxy, callers: dict[str, Caller]) -> Iterator[None]:
    """Have each make its call, and keep the request of the operation that it is about."""
    over = threading.Event()
    wanted = [""]
    kept = [0]

    def keep(message: Message) -> None:
        if message.where == "request" and message.operation == wanted[0]:
            wanted[0] = ""
            kept[0] += 1
            over.wait(60)

    proxy.fault = keep
    try:
        for number, (name, caller) in enumerate(callers.items(), 1):
            wanted[0] = CALLS[name][0]
            caller.go()
            wait_until(lambda: kept[0] == number, f"{name} to wait")  # noqa: B023
        yield
    finally:
        over.set()


@contextlib.contextmanager
def kept_by_silence(engine: EngineProcess, callers: dict[str, Caller]) -> Iterator[None]:
    """Have each make its call while the engine is stopped."""
    with stopped(engine.pid):
        for caller in callers.values():
            caller.go()
        for name, caller in callers.items():
            wchan = Path(f"/proc/{caller.process.pid}/wchan")
            wait_until(lambda: wchan.read_text() not in ("0", "anon_pipe_read", "pipe_read"), f"{name} to wait")  # noqa: B023
        yield


@contextlib.contextmanager
def waiting(
    area: Path, transport: str, *arguments: str, timeout_s: int = 0
) -> Iterator[tuple[Ends, dict[str, Caller]]]:
    """Processes that wait, each in one of CALLS. At the end nothing of them may be left on either side."""
    with ends_of(area, transport, timeout_s) as (ends, proxy):
        for name in CALLS:
            furnish(ends.mount.source / name)
        with contextlib.ExitStack() as stack:
            callers = {
                name: stack.enter_context(calling(name, ends.mount.point / name, *arguments, script=SINGLE_CALLS))
                for name in CALLS
            }
            with kept_by(proxy, callers) if proxy else kept_by_silence(ends.mount.engine, callers):
                yield ends, callers
        ends.check_nothing_is_open()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_who_is_killed_dies(tmp_path: Path, transport: str, number: signal.Signals) -> None:
    """By a signal that it does not catch."""
    with waiting(tmp_path, transport) as (_, callers):
        deadline = time.monotonic() + SOON_S
        for caller in callers.values():
            caller.process.send_signal(number)
        statuses = {name: caller.process.wait(deadline - time.monotonic()) for name, caller in callers.items()}
        assert statuses == dict.fromkeys(CALLS, -number)


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_who_catches_a_signal_hears_eintr(tmp_path: Path, transport: str) -> None:
    """But for those that wait for a page."""
    with waiting(tmp_path, transport, "catches") as (_, callers):
        asked = {name: caller for name, caller in callers.items() if name not in NOT_INTERRUPTED}
        for caller in asked.values():
            caller.process.send_signal(signal.SIGINT)
        said = {name: caller.says(SOON_S) for name, caller in asked.items()}
        # poll(2) repeats nothing: the kernel takes the file for ready.
        assert said == {name: FAILURES.get(name, "EINTR") for name in asked}


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_the_timeout_ends_every_call(tmp_path: Path, transport: str) -> None:
    """Each with EIO, and not long before."""
    with waiting(tmp_path, transport, timeout_s=TIMEOUT_S) as (ends, callers), stopped(ends.mount.engine.pid):
        begun = time.monotonic()
        said = {"stat": callers["stat"].says(TIMEOUT_S + SOON_S)}
        assert time.monotonic() - begun > TIMEOUT_S / 2
        said |= {name: caller.says(SOON_S) for name, caller in callers.items() if name != "stat"}
        assert said == {name: FAILURES.get(name, "EIO") for name in callers}
        assert callers["fault"].process.wait(SOON_S) == -signal.SIGBUS
