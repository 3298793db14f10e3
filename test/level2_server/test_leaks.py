"""Sessions that come and go a thousand times leave nothing in the engine: descriptors, threads, nodes, memory."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from harness import wire
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.leaks import thread_count
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ROOT

WARM_UP, SESSIONS = 100, 1000
#: Bytes of one session: its tables begin with maps of 32 KiB and more, so that a leak of one in ten would be seen.
GROWTH_OF_A_SESSION = 2048


@pytest.fixture(params=ALL_TRANSPORTS)
def own(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EngineProcess]:
    """An engine for this test alone."""
    with EngineProcess(tmp_path / "engine", request.param).running() as engine:
        yield engine


def live(engine: EngineProcess, number: int) -> None:
    """A short life: each kind of thing that a session can hold, given back or not."""
    session = Session(engine.address, engine.share, slots=2)
    name = b"%d" % number  # the locks of the session before may be a moment from their end
    entry, opened = session.create(ROOT, name)
    session.write(opened.handle, 0, b"x" * 5000)
    session.setlk(opened.handle, 1, 1)
    directory = session.opendir(ROOT)
    assert session.readdir(directory, plus=True)
    session.setlk(session.open(entry.node).handle, 2, 1, lock={"flags": 1})
    event = session.event()
    event.send("SETLKW", wire.caller(ROOT) + session.lock_body(opened.handle, 2, 1), tag=2)
    session.reattach(0)
    session.unlink(ROOT, name)
    if number % 2:
        session.release(opened.handle)
        session.release(directory, op="RELEASEDIR")
    session.detach()


@pytest.mark.memory
def test_a_thousand_sessions_leave_nothing(own: EngineProcess) -> None:
    for number in range(WARM_UP):
        live(own, number)
    wait_until(own.is_idle, "the engine to be idle")
    descriptors, threads, resident = own.descriptors(), thread_count(own.pid), own.resident_bytes()
    for number in range(SESSIONS):
        live(own, number)
    wait_until(own.is_idle, f"the engine to let everything go; it has {own.figures()}")
    wait_until(lambda: own.descriptors() <= descriptors, "the engine to close their descriptors")
    # Those that let sessions go end when they have had nothing to do for five seconds.
    wait_until(lambda: thread_count(own.pid) <= threads, "the engine's threads to be as many as before", 15)
    grown = own.resident_bytes() - resident
    assert grown < SESSIONS * GROWTH_OF_A_SESSION, f"{grown} bytes more for {SESSIONS} sessions"
