"""Two machines, a key, TCP: what both do with one directory."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.engine_process import CHECKOUT, READY, everything_below, whitelist_text
from harness.leaks import environment
from harness.machines import Machine, two_machines
from harness.waiting import wait_until
from lockers import DEADLOCK, Locker, says_first

pytestmark = pytest.mark.root


@dataclass(frozen=True)
class Both:
    """`here` on the server is `there` on the client."""

    server: Machine
    client: Machine
    here: Path
    there: Path


@contextmanager
def _daemon(machine: Machine, log: Path, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(
            machine.command(*map(str, words)), stdin=subprocess.DEVNULL, stdout=out, stderr=out,
            env=environment(PYTHONPATH=str(CHECKOUT)),
        )  # fmt: skip
    try:
        yield process
        process.terminate()
        assert process.wait(20) == 0, log.read_text()
        assert not re.search("ERROR|Traceback", log.read_text()), log.read_text()
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Both]:
    share, point, key, rules = (tmp_path / name for name in ("share", "mnt", "key", "whitelist"))
    share.mkdir()
    point.mkdir()
    key.write_text(os.urandom(16).hex())
    key.chmod(0o600)
    rules.write_text(whitelist_text(everything_below(share)))
    with two_machines() as (server, client), ExitStack() as stack:
        log = tmp_path / "engine.log"
        words = ("--listen", f"tcp://{server.address}:0", "--key-file", key, "--whitelist", rules)
        words = (*words, "--run-dir", tmp_path / "run")
        stack.enter_context(_daemon(server, log, sys.executable, "-m", "qtfs_server.cli", *words))
        found = wait_until(lambda: READY.search(log.read_text()), "the engine")
        options = f"server={found.group(1)},key_file={key},driver=fuse3,foreground"
        words = (sys.executable, "-m", "qtfs_client.cli", share, point, "-o", options)
        stack.enter_context(_daemon(client, tmp_path / "mount.log", *words))
        wait_until(lambda: f" {point} " in client.run("cat", "/proc/self/mountinfo"), "the mount")
        yield Both(server, client, share, point)


@contextmanager
def _locker(machine: Machine, path: Path) -> Iterator[Locker]:
    locker = Locker(path, within=machine.within)
    try:
        yield locker
    finally:
        locker.caller.end()


def test_locks(both: Both) -> None:
    """The mount is seen on the client alone; locks hold for both, and are handed over both ways."""
    (both.here / "file").touch()
    assert not os.listdir(both.there)
    with (
        _locker(both.client, both.there / "file") as theirs,
        _locker(both.client, both.there / "file") as their_other,
        _locker(both.server, both.here / "file") as ours,
    ):
        assert ours.lock(0, 10) == theirs.lock(10, 10) == "done"
        assert theirs.lock(0, 1) == ours.lock(10, 1) == "EAGAIN"
        theirs.wait("w", 0, 1)
        assert ours.unlock() == "done"
        assert theirs.says() == "done"
        ours.wait("w", 10, 1)
        assert theirs.caller.kill() < 5
        assert ours.says() == "done"
        assert their_other.lock(0, 1) == "done"
        with _locker(both.client, both.there / "file") as third:
            assert third.lock(1, 1) == "done"
            their_other.wait("w", 1, 1)
            third.order("w", "wait", 0, 1)
            assert says_first(their_other, third).says() == DEADLOCK
