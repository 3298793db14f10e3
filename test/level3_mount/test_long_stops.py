"""A side is stopped for longer than the other waits for a sign of life, and goes on: nothing is lost or done twice.

doc/reliability.md, 1.3. Over each transport, and over shared memory as between machines ("far"), where a beat that
stands still for five seconds ends a channel. Stops of a moment are in test_seeds.py.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from calling import Caller, calling
from harness.engine_process import EngineProcess
from harness.fault_proxy import stopped
from harness.mounts import MountProcess
from harness.ring_file import BOOT, RingFile
from harness.waiting import wait_until
from kit import outcome
from lines import engine_everywhere
from soak.actors import Company, Scene

from qtfs_client.remote_host import mount_figures

pytestmark = pytest.mark.root

FAR = "far"
#: Longer than a beat may stand still, by enough for those who look for it now and then.
STOP_S = 6.5
#: Shorter than STOP_S; and longer than what is left of it once a beat has been missed.
GRACE_S = 3
SHORT_TIMEOUT_S = 2
#: Of each actor: more than are made before the stop begins.
CALLS = 400
BEGUN = 100


@dataclass
class Side:
    """A mount of a directory of its own, and how its daemon is asked for its figures."""

    mount: MountProcess
    here: Path
    run_dir: Path

    @property
    def there(self) -> Path:
        return self.mount.point

    def figures(self) -> dict[str, Any]:
        return mount_figures(str(self.there), str(self.run_dir))


@contextlib.contextmanager
def sides(area: Path, *names: tuple[str, str]) -> Iterator[tuple[EngineProcess, list[dict[str, Side]]]]:
    """One engine, and for each name and further options a mount over each transport. Nothing is left at the end."""
    with engine_everywhere(area / "engine", GRACE_S, (FAR,)) as (engine, addresses), contextlib.ExitStack() as stack:
        with RingFile(area / "engine" / f"{FAR}.bar") as ring:
            ring.set(BOOT, ring.get(BOOT) ^ 1)  # so that its clients take it for another machine's
        groups = []
        for name, options in names:
            group = {}
            for transport, address in addresses.items():
                here = engine.share / f"{name}-{transport}"
                here.mkdir()
                run_dir = area / f"run-{here.name}"
                words = f"driver=fuse3,cache=auto,threads=4,run_dir={run_dir},{options}"
                mount = MountProcess(engine, here, area / here.name, words, through=address)
                stack.enter_context(mount.running())
                group[transport] = Side(mount, here, run_dir)
            groups.append(group)
        yield engine, groups
        stack.close()
        wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


class Work:
    """A company for each mount, which checks by its model that nobody notices anything."""

    def __init__(self, group: dict[str, Side], stack: contextlib.ExitStack) -> None:
        self._pool = stack.enter_context(ThreadPoolExecutor())
        self._companies = {
            name: stack.enter_context(Company(side.there, side.here, 2).running()) for name, side in group.items()
        }
        self._plays: dict[str, Future[None]] = {}

    def begin(self) -> None:
        """Return in the middle of it."""
        scene = Scene(seed=7, calls=CALLS)
        self._plays = {name: self._pool.submit(company.play, scene) for name, company in self._companies.items()}
        wait_until(lambda: max(company.made() for company in self._companies.values()) >= BEGUN, "some calls")

    def done(self) -> list[str]:
        return [name for name, play in self._plays.items() if play.done()]

    def end(self) -> None:
        """Each comes to its end, and the server has what it must have."""
        failures = {name: play.exception(60) for name, play in self._plays.items()}
        assert failures == dict.fromkeys(self._plays), failures
        assert all(company.calls.total() == 2 * CALLS for company in self._companies.values())


def check_sessions_went_on(group: dict[str, Side]) -> None:
    """None was begun anew; but channels were replaced where a beat tells who lives."""
    figures = {name: side.figures() for name, side in group.items()}
    assert {name: found["begun_anew"] for name, found in figures.items()} == dict.fromkeys(group, 0)
    assert figures[FAR]["reconnects"] > 0


class Numbered:
    """A process that makes numbered directories and lines of a log, whatever comes of each; and one that has a lock."""

    def __init__(self, side: Side, stack: contextlib.ExitStack) -> None:
        self._here = side.here
        (side.here / "locked").touch()
        self._worker = stack.enter_context(calling("numbered", side.there))
        self._holder: Caller = stack.enter_context(calling("hold", "posix", side.there / "locked"))

    def begin(self) -> None:
        self._worker.go()
        wait_until(lambda: len(os.listdir(self._here)) > 10, "some directories")

    def gives_up(self) -> None:
        """Once a call has said EIO."""
        assert self._worker.says(SHORT_TIMEOUT_S + 5) == "EIO"

    def check(self) -> None:
        """What was done is there once, and in order; what said EIO may be there, once. The lock was never lost."""
        assert self._worker.says() == "done"        # again, after the stop
        with (self._here / "locked").open("r+b") as file:
            assert outcome(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
        assert self._holder.go().process.wait(10) == 0
        said = json.loads(self._worker.go().says())
        lines = [int(line) for line in (self._here / "log").read_text().splitlines()]
        self._judge("mkdir", said["mkdir"], sorted(int(name) for name in os.listdir(self._here) if name.isdigit()))
        self._judge("write", said["write"], lines)

    def _judge(self, what: str, said: list[str], found: list[int]) -> None:
        done = [number for number, word in enumerate(said) if word == "done"]
        assert set(said) == {"done", "EIO"}, f"{what}: {set(said)}"
        assert said[-1] == "done"
        assert len(set(found)) == len(found), f"{what}: twice"
        assert set(found) <= set(range(len(said))), f"{what}: {found}"
        assert [number for number in found if said[number] == "done"] == done, f"{what}: {found} instead of {done}"


def test_the_engine_is_stopped(tmp_path: Path) -> None:
    """Whose timeout is longer notices nothing; the others get EIO, and go on with the engine."""
    names = (("patient", "timeout=30"), ("hasty", f"timeout={SHORT_TIMEOUT_S}"))
    with sides(tmp_path, *names) as (engine, (patient, hasty)), contextlib.ExitStack() as stack:
        work = Work(patient, stack)
        numbered = [Numbered(side, stack) for side in hasty.values()]
        for worker in numbered:
            worker.begin()
        work.begin()
        with stopped(engine.pid):
            until = time.monotonic() + STOP_S
            assert work.done() == []
            for worker in numbered:
                worker.gives_up()
            time.sleep(max(0.0, until - time.monotonic()))
            assert work.done() == []
        for worker in numbered:
            worker.check()
        work.end()
        check_sessions_went_on(patient)
        assert [side.figures()["begun_anew"] for side in hasty.values()] == [0] * len(hasty)


def test_the_daemons_are_stopped(tmp_path: Path) -> None:
    """For longer than the grace time, which does not run while there is a connection, and than the timeout: it was not
    the server that was silent.
    """
    with sides(tmp_path, ("stopped", "timeout=5")) as (engine, (group,)), contextlib.ExitStack() as stack:
        work = Work(group, stack)
        work.begin()
        with contextlib.ExitStack() as stops:
            for side in group.values():
                stops.enter_context(stopped(side.mount.pid))
            assert work.done() == []
            time.sleep(STOP_S)
            assert work.done() == []
            assert len(engine.figures()["sessions"]) == len(group)
        work.end()
        check_sessions_went_on(group)
