"""Engine and daemon are killed while Git clones: nothing hangs, all can be taken away, then it works again."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.leaks import our_processes
from harness.waiting import wait_until
from level5_commands.commandline import daemons, kill_daemon_of, mount, mounted, mounts_at, run
from programs import Shared, attempt, mounted_here, started
from repositories import VARIABLES, git, worktree
from trees import assert_same

#: Tells that it came, and goes on when it may.
_GATE = """
: >"$gates/reached"
while [ -e "$gates/closed" ]; do sleep 0.01; done
"""
_IN_A_FILTER = f"gates=$1\n{_GATE}\ncat\n"
_IN_A_PACK = f'gates=$1\ngit-upload-pack "$2" | {{ dd bs=1 count=200000 status=none\n{_GATE}\ncat; }}\n'


class Gates:
    """A clone that stops half-way, where the test wants it: while it receives the pack, or while it checks out."""

    def __init__(self, area: Path) -> None:
        area.mkdir()
        (area / "closed").touch()
        (area / "filter.sh").write_text(_IN_A_FILTER)
        (area / "pack.sh").write_text(_IN_A_PACK)
        self.area = area

    def words(self, stage: str) -> list[str]:
        script = f"sh {shlex.quote(str(self.area))}/{stage}.sh {shlex.quote(str(self.area))}"
        if stage == "pack":
            return ["git", "clone", "-q", f"--upload-pack={script}"]
        return ["git", "-c", f"filter.gate.smudge={script}", "clone", "-q"]

    def wait(self, process: subprocess.Popen[bytes]) -> None:
        def reached() -> bool:
            assert process.poll() is None, process.communicate()[0].decode()
            return (self.area / "reached").exists()

        wait_until(reached, "the clone to come half-way", 30)

    def open(self) -> None:
        (self.area / "closed").unlink()


@pytest.fixture
def gates(area: Path) -> Gates:
    return Gates(area / "gates")


@pytest.fixture(params=["unix", "tcp"])
def mortal(request: pytest.FixtureRequest, area: Path, share: Path) -> Iterator[EngineProcess]:
    """An engine of the test's own."""
    with EngineProcess(area / "mortal", request.param, rules=everything_below(share)).running() as engine:
        yield engine


def judge_clone(origin: Path, shared: Shared, name: str, local: Path) -> None:
    """A clone on the mount is complete and sound."""
    for path in (shared.here / name, shared.there / name):
        assert git("fsck", "--full", "--strict", cwd=path) == ""
        assert git("status", "--porcelain", cwd=path) == ""
    git("clone", "-q", origin, local)
    assert_same(worktree(shared.there / name), worktree(local))


@pytest.mark.parametrize("stage", ["pack", "filter"])
def test_an_engine_killed_in_a_clone(
    mortal: EngineProcess, origin: Path, share: Path, area: Path, gates: Gates, stage: str
) -> None:
    """The clone may fail, but ends; a second one is clean."""
    with mounted_here(share, area, mortal.address) as shared:
        with started([*gates.words(stage), f"file://{origin}", shared.here / "first"], None, VARIABLES) as clone:
            gates.wait(clone)
            mortal.kill()
            mortal.start()
            gates.open()
            said, _ = clone.communicate(timeout=60)
        if clone.returncode == 0:
            judge_clone(origin, shared, "first", area / "local-first")
        else:
            assert b"fatal: " in said or b"error: " in said
        git("clone", "-q", f"file://{origin}", shared.here / "second")
        judge_clone(origin, shared, "second", area / "local")


def test_an_engine_that_stays_dead_in_a_clone(
    mortal: EngineProcess, origin: Path, share: Path, area: Path, gates: Gates
) -> None:
    """The clone fails once the mount's timeout is over, and the mount goes away without it."""
    try:
        with mounted_here(share, area, mortal.address, more="timeout=1") as shared:
            with started([*gates.words("filter"), f"file://{origin}", shared.here / "first"], None, VARIABLES) as clone:
                gates.wait(clone)
                mortal.kill()
                gates.open()
                said, _ = clone.communicate(timeout=60)
                assert clone.returncode != 0 and b"Input/output error" in said
            run("umount", shared.here).check()
            wait_until(lambda: not daemons(shared.here), "the daemon to end")
    finally:
        mortal.kill()


@pytest.mark.parametrize("stage", ["pack", "filter"])
def test_a_daemon_killed_in_a_clone(
    mortal: EngineProcess, origin: Path, share: Path, area: Path, gates: Gates, stage: str
) -> None:
    """Its users are told; umount -l takes the rest away, and the directory can be mounted again."""
    with mounted_here(share, area, mortal.address) as shared:
        with started([*gates.words(stage), f"file://{origin}", shared.here / "first"], None, VARIABLES) as clone:
            gates.wait(clone)
            kill_daemon_of(shared.here)
            gates.open()
            said, _ = clone.communicate(timeout=60)
        assert clone.returncode != 0 and b"Transport endpoint is not connected" in said
        outcome = attempt("ls", shared.here)
        assert outcome.status != 0 and "Transport endpoint is not connected" in outcome.stdout
        run("umount", "-l", shared.here).check()
        assert not mounts_at(shared.here) and not daemons(shared.here)
        with mounted(share, shared.here, f"server={mortal.address}"):
            attempt("rm", "-rf", shared.here / "first")
            git("clone", "-q", f"file://{origin}", shared.here / "first")
            judge_clone(origin, shared, "first", area / "local")


def test_a_mount_over_what_a_dead_daemon_left(mortal: EngineProcess, share: Path, area: Path) -> None:
    """While processes still have it as their directory."""
    with mounted_here(share, area, mortal.address) as shared:
        (shared.there / "below").mkdir()
        with started(["sleep", "1000"], shared.here / "below") as sleeper:
            wait_until(lambda: os.readlink(f"/proc/{sleeper.pid}/cwd") == str(shared.here / "below"), "its start")
            kill_daemon_of(shared.here)
            mount(share, shared.here, f"server={mortal.address}").check()
            (shared.here / "below/new").write_text("x")
            assert (shared.there / "below/new").read_text() == "x"
            run("umount", shared.here).check()
    assert not mounts_at(shared.here)


def test_an_idle_mount_goes_without_a_trace(mortal: EngineProcess, share: Path, area: Path) -> None:
    before = {process.pid for process in our_processes()}
    descriptors = mortal.descriptors()
    with mounted_here(share, area, mortal.address) as shared:
        (shared.here / "file").write_text("x")
        assert len(daemons(shared.here)) == 1
        run("umount", shared.here).check()
        wait_until(lambda: not daemons(shared.here), "the daemon to end")
    assert {process.pid for process in our_processes()} == before
    wait_until(mortal.is_idle, "the engine to forget the mount")
    assert mortal.descriptors() == descriptors
