"""Clients of FIFOs that go, do not read, or confirm nothing: what an engine keeps for them has an end."""

from __future__ import annotations

import errno
import fcntl
import os
import select
import stat
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess
from harness.leaks import thread_count
from harness.session import Session
from harness.streams import (
    answer,
    is_quiet,
    later,
    open_body,
    read_body,
    write_body,
)
from harness.waiting import wait_until
from harness.wire import ROOT

PIPE_BYTES = 65536


def test_thousands_wait_when_the_session_ends(engine: EngineProcess, share: Path) -> None:
    """No thread and no descriptor stays."""
    os.mkfifo(share / "silent")
    os.mkfifo(share / "full")
    fds = [os.open(share / name, os.O_RDWR | os.O_NONBLOCK) for name in ("silent", "full")]
    os.write(fds[1], bytes(PIPE_BYTES))
    before = engine.descriptors()
    threads = thread_count(engine.pid)
    with Session(engine.address, share) as session:
        nodes = [session.lookup(ROOT, name).node for name in (b"silent", b"full")]
        alone = session.mknod(ROOT, b"alone", stat.S_IFIFO | 0o600).node
        handles = [session.open(node, os.O_RDWR).handle for node in nodes]
        for tag in range(2000):
            later(session, "READ", read_body(handles[0]), 4 * tag)
            later(session, "WRITE", write_body(handles[1], bytes(100)), 4 * tag + 1)
        for tag in range(500):
            later(session, "OPEN", open_body(os.O_RDONLY), 4 * tag + 2, alone)
        assert is_quiet(session)
        assert session.statfs(), "slots go on"
        assert thread_count(engine.pid) > threads
    wait_until(lambda: engine.descriptors() == before, "the descriptors to be closed")
    with pytest.raises(OSError) as refused:
        os.open(share / "alone", os.O_WRONLY | os.O_NONBLOCK)
    assert refused.value.errno == errno.ENXIO, "no reader is left"
    for fd in fds:
        os.close(fd)
    wait_until(lambda: thread_count(engine.pid) <= threads, "threads that nobody needs to end", 15)


def test_a_client_that_does_not_read(engine: EngineProcess, share: Path) -> None:
    """It harms nobody else; when it reads again it finds all, in order."""
    os.mkfifo(share / "fifo")
    os.mkfifo(share / "other")
    source = os.open(share / "fifo", os.O_RDWR)
    fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 1 << 20)
    with Session(engine.address, share) as silent, Session(engine.address, share) as other:
        handle = silent.open(silent.lookup(ROOT, b"fifo").node, os.O_RDWR).handle
        for tag in range(20):
            os.write(source, bytes([tag]) * (1 << 19))
            later(silent, "READ", read_body(handle, 1 << 20), tag)
            wait_until(lambda: not select.select([source], [], [], 0)[0], "the engine to read it")
        both = other.open(other.lookup(ROOT, b"other").node, os.O_RDWR).handle
        for tag in range(50):
            later(other, "READ", read_body(both), tag)
            other.write(both, 0, b"ping")
            assert answer(other, "READ", tag).body == b"ping"
        for tag in range(20):
            assert answer(silent, "READ", tag).body == bytes([tag]) * (1 << 19)
    os.close(source)


def test_a_client_that_confirms_nothing_is_cut_off(engine: EngineProcess, share: Path) -> None:
    os.mkfifo(share / "fifo")
    source = os.open(share / "fifo", os.O_RDWR)
    fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, 1 << 20)
    with Session(engine.address, share) as session:
        handle = session.open(session.lookup(ROOT, b"fifo").node, os.O_RDWR).handle
        session.event().confirms = False
        with pytest.raises(OSError):
            for tag in range(200):
                os.write(source, bytes(1 << 20))
                later(session, "READ", read_body(handle, 1 << 20), tag)
                answer(session, "READ", tag)
        assert 60 <= tag <= 70
        session.statfs()
    os.close(source)
    wait_until(engine.is_idle, "the engine to let it go")
    assert engine.resident_bytes() < 400 << 20
