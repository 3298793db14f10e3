"""Programs on a mount whose engine or daemon dies meanwhile, and what must be there at the end.

An engine's death is nothing to them: they must succeed. A daemon's death ends them: then all that they were told is
done must be there, and at most the one thing more that they had asked for. To be imported with test/level4_programs on
the path, where the programs are.
"""

from __future__ import annotations

import contextlib
import shutil
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from programs import Worker, program, started, worker_words
from repositories import VARIABLES, git, worktree
from soak.killing import BOTH, CLIENT, ENGINE
from soak.stage import Fate, Stage
from trees import assert_same

LINES = 400
COMMITS = 40
STORM = 60
PATIENCE_S = 100.0
_FIO = (
    "fio", "--name=job", "--rw=randwrite", "--bsrange=512-64k", "--blockalign=512", "--size=4m", "--ioengine=psync",
    "--verify=crc32c", "--verify_fatal=1", "--fdatasync=16", "--minimal",
)  # fmt: skip


def play(stage: Stage, name: str, seed: int, whom: str, origin: Path) -> None:
    """One program by one seed: "clone" and the other `PLAYS`. `origin`: a repository that is not on the mount."""
    place = f"{name}-{seed}"
    (stage.engine.share / place).mkdir()
    with stage.fate(seed, whom, 2, spread=SPREAD[name], kind=f"{name}-{whom}") as fate:
        PLAYS[name](Scenery(stage, fate, whom, stage.mount.point / place, stage.engine.share / place, origin))
    shutil.rmtree(stage.engine.share / place)


class Scenery:
    """Where a program works: `there` by way of the mount, `here` on the server."""

    def __init__(self, stage: Stage, fate: Fate, whom: str, there: Path, here: Path, origin: Path) -> None:
        self.stage, self.fate, self.there, self.here, self.origin = stage, fate, there, here, origin
        self.is_mortal = whom in (CLIENT, BOTH)

    def run(self, process: subprocess.Popen[bytes]) -> tuple[bool, str]:
        """Let a program that waits for us go on to its end, under its fate: whether it ended well, and what it said."""
        self.fate.begin()
        said, _ = process.communicate(b"go\n" if process.stdin else None, timeout=PATIENCE_S)
        self.fate.revive()
        well = process.returncode == 0
        assert well or (self.is_mortal and self.fate.remounted), said.decode(errors="replace")[-2000:]
        return well, said.decode(errors="replace")

    @contextlib.contextmanager
    def worker(self, job: str, *arguments: object) -> Iterator[subprocess.Popen[bytes]]:
        """A job that is ready."""
        with started(worker_words(job, *arguments), stdin=subprocess.PIPE) as process:
            assert Worker(process).hear() == "ready"
            yield process

    def counted(self, job: str, *arguments: object) -> tuple[bool, int]:
        """Run a job that says numbers from 0: whether it ended well, and how many it said."""
        with self.worker(job, *arguments) as process:
            well, said = self.run(process)
        numbers = [int(line) for line in said.splitlines() if line.isdecimal()]
        assert numbers == list(range(len(numbers)))
        return well, len(numbers)


def _clone(scenery: Scenery) -> None:
    """git clone; the second attempt, where the first one may fail, is left alone."""
    words = ["git", "clone", "-q", f"file://{scenery.origin}"]
    with started([*words, scenery.there / "clone"], None, VARIABLES) as clone:
        well, _ = scenery.run(clone)
    if not well:
        shutil.rmtree(scenery.here / "clone", ignore_errors=True)
        git("clone", "-q", f"file://{scenery.origin}", scenery.there / "clone")
    git("clone", "-q", scenery.origin, scenery.here / "local")
    for path in (scenery.here / "clone", scenery.there / "clone"):
        assert git("fsck", "--full", "--strict", cwd=path) == ""
        assert git("status", "--porcelain", cwd=path) == ""
    assert_same(worktree(scenery.here / "clone"), worktree(scenery.here / "local"))


def _commit(scenery: Scenery) -> None:
    """sqlite: what was committed is there, and nothing else."""
    with contextlib.closing(sqlite3.connect(scenery.here / "base")) as base:
        base.execute("CREATE TABLE entries (who TEXT, number INTEGER, part INTEGER, filler TEXT)")
        base.execute("CREATE TABLE totals (number INTEGER)")
        base.execute("INSERT INTO totals VALUES (0)")
        base.commit()
    well, said = scenery.counted("insert_counted", scenery.there / "base", COMMITS)
    with contextlib.closing(sqlite3.connect(scenery.here / "base", timeout=30)) as base:
        assert base.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        numbers = [number for (number,) in base.execute("SELECT number FROM entries ORDER BY rowid")]
        assert base.execute("SELECT number FROM totals").fetchone() == (len(numbers),)
    _judge_numbers(numbers, well, said, COMMITS)


def _log(scenery: Scenery) -> None:
    """Each line once and whole and in order."""
    well, said = scenery.counted("append_counted", scenery.there / "log", LINES)
    lines = (scenery.here / "log").read_text().splitlines()
    numbers = [int(line.partition(" ")[0]) for line in lines]
    assert lines == [f"{number} {'x' * (number * 37 % 300)}" for number in numbers], "a line is torn"
    _judge_numbers(numbers, well, said, LINES)


def _judge_numbers(numbers: list[int], well: bool, said: int, wanted: int) -> None:
    """All that were said are there, in order; one more if its author died before it could say so."""
    assert numbers == list(range(len(numbers))), numbers
    most, least = (wanted, wanted) if well else (said + 1, said)
    assert least <= len(numbers) <= most, f"{len(numbers)} are there, and {said} were said"


def _fio(scenery: Scenery) -> None:
    """What fio wrote is there, as the mount and as the server see it."""
    data = scenery.here / "data"
    with started([*_FIO, f"--filename={scenery.there / 'data'}"], scenery.here) as process:
        scenery.run(process)
    program(*_FIO, f"--filename={data}", "--verify_only", cwd=scenery.here)


def _storm(scenery: Scenery) -> None:
    """Four at once, in directories of their own; every call succeeds, and nothing is left."""
    with contextlib.ExitStack() as stack:
        processes = []
        for number in range(4):
            (scenery.here / str(number)).mkdir()
            processes.append(stack.enter_context(scenery.worker("storm", scenery.there / str(number), STORM)))
        for process in processes[1:]:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            scenery.run(process)
    assert [[*(scenery.here / str(number)).iterdir()] for number in range(4)] == [[]] * 4


PLAYS: dict[str, Callable[[Scenery], None]] = {
    "clone": _clone, "commit": _commit, "log": _log, "fio": _fio, "storm": _storm,
}  # fmt: skip
#: Over how many messages their deaths are spread.
SPREAD = {"clone": 8, "commit": 2, "log": 1, "fio": 1.5, "storm": 4}
#: Who may die in which.
CASES = [
    *((name, ENGINE) for name in PLAYS),
    *((name, whom) for whom in (CLIENT, BOTH) for name in ("clone", "commit", "log")),
]
