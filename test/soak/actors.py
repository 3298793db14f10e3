"""A company of actors (`actor.py`) on one mount, and the judgement of what they share.

    with Company(there, here, 3).running() as company:
        company.play(Scene(seed=5, calls=50))

They are processes of their own: a thread of ours would hold files of the mount, and a child that we start to take their
place would wait for the mount before it lets go of them.
"""

from __future__ import annotations

import contextlib
import json
import queue
import shutil
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from harness.leaks import environment

ACTOR = Path(__file__).with_name("actor.py")
#: Names of the directory that actors read in pieces.
MANY = 800
#: A call that takes longer hangs.
PATIENCE_S = 60.0


@dataclass(frozen=True)
class Scene:
    """What actors do for one seed."""

    seed: int
    calls: int = 50
    #: The daemon may be killed.
    mortal: bool = False
    #: Files may lose their last name while they are open.
    orphans: bool = True


class ActorProcess:
    def __init__(self, name: str, there: Path, here: Path, progress: Path) -> None:
        self.name = name
        self.progress = progress
        progress.write_bytes(bytes(8))
        self.process = subprocess.Popen(
            [sys.executable, "-S", str(ACTOR), name, str(there), str(here), str(progress)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(),
        )  # fmt: skip
        self._answers: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._answers.put(line)
        self._answers.put("")

    def tell(self, **order: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()

    def hear(self) -> dict[str, Any]:
        """Its next answer."""
        try:
            line = self._answers.get(timeout=PATIENCE_S)
        except queue.Empty:
            raise AssertionError(f"actor {self.name} hangs in {self._wchan()}") from None
        assert line, f"actor {self.name} ended with {self.process.wait(5)}"
        answer: dict[str, Any] = json.loads(line)
        assert "wrong" not in answer, answer["wrong"]
        return answer

    def _wchan(self) -> str:
        return Path(f"/proc/{self.process.pid}/wchan").read_text()

    def end(self) -> None:
        self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


class Company:
    """So many actors at `there`, which is `here` on the server. `calls` counts theirs, of all scenes."""

    def __init__(self, there: Path, here: Path, size: int = 3) -> None:
        self.there, self.here = there, here
        self.calls: Counter[str] = Counter()
        #: How often each found the daemon dead, in this scene.
        self.downs: Counter[str] = Counter()
        self._names = [f"actor{number}" for number in range(size)]
        self._actors: list[ActorProcess] = []
        many = here / "many"
        many.mkdir()
        for number in range(MANY):
            (many / f"{number:06}-{'n' * (number % 120)}").touch()

    @contextlib.contextmanager
    def running(self) -> Iterator[Company]:
        try:
            for name in self._names:
                progress = self.there.with_name(f"{name}.progress")
                self._actors.append(ActorProcess(name, self.there, self.here, progress))
            self._all_hear()
            yield self
        finally:
            for actor in self._actors:
                actor.end()

    def made(self) -> int:
        """How many calls they have made so far, as they make them."""
        return sum(int.from_bytes(actor.progress.read_bytes(), "little") for actor in self._actors)

    def _all_hear(self) -> list[dict[str, Any]]:
        return [actor.hear() for actor in self._actors]

    def _all(self, revive: Callable[[], None] = lambda: None, **order: object) -> list[dict[str, Any]]:
        for actor in self._actors:
            actor.tell(**order)
        answers = self._all_hear()
        while down := [actor for actor, answer in zip(self._actors, answers, strict=True) if "down" in answer]:
            revive()
            for actor in down:
                self.downs[actor.name] += 1
                actor.tell()
            answers = [a.hear() if a in down else answer for a, answer in zip(self._actors, answers, strict=True)]
        return answers

    def play(
        self,
        scene: Scene,
        *,
        begun: Callable[[], None] = lambda: None,
        ended: Callable[[], None] = lambda: None,
        revive: Callable[[], None] = lambda: None,
    ) -> None:
        """One seed, from empty directories to the judgement; AssertionError if anything is not as it must be.

        `begun` and `ended` are called before and after the actors' calls; `revive` when all of them have ended or
        found that the daemon is dead: it mounts anew.
        """
        self.downs.clear()
        place = self.here / f"scene-{scene.seed}"
        place.mkdir()
        for name in ("log", "flock", "lockf"):
            (place / name).touch()
        self._all(do="prepare", seed=scene.seed, place=place.name, mortal=scene.mortal, orphans=scene.orphans)
        begun()
        self._all(revive, do="act", calls=scene.calls)
        ended()
        judged = self._all(revive, do="judge")
        for answer in judged:
            self.calls.update(answer["kinds"])
        _judge_log(place, dict(zip(self._names, judged, strict=True)))
        _judge_counts(place, judged)
        _judge_races(place, judged)
        shutil.rmtree(place)


def _judge_log(place: Path, judged: dict[str, dict[str, Any]]) -> None:
    """Each line once and whole, and those of each actor in order."""
    found: dict[str, list[int]] = {name: [] for name in judged}
    for line in (place / "log").read_text().splitlines():
        name, number, filler = line.split(" ")
        assert name in found and not filler.strip("x"), f"the log has a torn line: {line!r}"
        found[name].append(int(number))
    for name, numbers in found.items():
        sure, unsure = judged[name]["sure"]["lines"], judged[name]["unsure"]["lines"]
        expected = sorted({*sure, *(number for number in numbers if number in unsure)})
        assert numbers == expected, f"{name}'s lines in the log: {numbers} instead of {expected}"


def _judge_counts(place: Path, judged: list[dict[str, Any]]) -> None:
    """What was added under locks."""
    total = sum(int((place / name).read_text() or "0") for name in ("flock", "lockf"))
    sure = sum(answer["sure"]["counted"] for answer in judged)
    unsure = sum(len(answer["unsure"]["counted"]) for answer in judged)
    assert sure <= total <= sure + unsure, f"counted {total} instead of {sure} (to {sure + unsure})"


def _judge_races(place: Path, judged: list[dict[str, Any]]) -> None:
    """Every name that is there was created by one of them."""
    won = sorted(number for answer in judged for number in answer["sure"]["won"])
    unsure = {number for answer in judged for number in answer["unsure"]["won"]}
    found = sorted(int(path.name.removeprefix("race-")) for path in place.glob("race-*"))
    assert len(set(won)) == len(won), f"several created the same name: {won}"
    assert set(won) <= set(found) <= {*won, *unsure}, f"created {found}, by somebody {won}, perhaps {sorted(unsure)}"
