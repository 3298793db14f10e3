"""Two machines, a key, TCP: what both do with one directory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from calling import Caller
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
    options: str

    @contextmanager
    def pulled_cable(self) -> Iterator[None]:
        """Packets vanish, in both directions, without a word to anybody."""
        address = json.loads(self.server.run("ip", "-j", "link", "show", "cable"))[0]["address"]
        known = ("neighbour", "replace", self.server.address, "lladdr", address, "dev", "cable", "nud", "permanent")
        self.client.run("ip", *known)
        self.server.run("ip", "link", "set", "cable", "down")
        try:
            yield
        finally:
            self.server.run("ip", "link", "set", "cable", "up")


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
def both(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Both]:
    """A parameter is more options of the mount."""
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
        options = f"server={found.group(1)},key_file={key},driver=fuse3,foreground,{getattr(request, 'param', '')}"
        words = (sys.executable, "-m", "qtfs_client.cli", share, point, "-o", options)
        stack.enter_context(_daemon(client, tmp_path / "mount.log", *words))
        wait_until(lambda: f" {point} " in client.run("cat", "/proc/self/mountinfo"), "the mount")
        yield Both(server, client, share, point, options)


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


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("both", ["timeout=6"], indirect=True)
def test_a_cable_that_is_pulled(both: Both, tmp_path: Path) -> None:
    """Nothing is lost and nothing done twice; whoever would mount meanwhile is told how it is."""
    other = tmp_path / "other"
    other.mkdir()
    log = Caller("append_lines", both.there / "log", within=both.client.within)
    try:
        assert log.says() == "ready"
        log.go()
        wait_until(lambda: len(_lines(both.here / "log")) > 50, "the first lines")
        with both.pulled_cable():
            words = (sys.executable, "-m", "qtfs_client.cli", both.here, other, "-o", f"{both.options},timeout=3")
            tried = subprocess.run(
                both.client.command(*words), env=environment(PYTHONPATH=str(CHECKOUT)), capture_output=True, text=True,
                timeout=20, check=False,
            )  # fmt: skip
            assert tried.returncode == 32 and re.search("cannot connect to tcp://.*: timed out", tried.stderr), tried
            assert log.is_silent_for(0.5)
            before = len(_lines(both.here / "log"))
        wait_until(lambda: len(_lines(both.here / "log")) > before + 50, "more lines")
        count = int(log.go().says())
        assert _lines(both.here / "log") == [f"{number:08}" for number in range(count)]
    finally:
        log.end()
