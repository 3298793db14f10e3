"""`make soak`: seeds of faults and deaths over all transports, one after the other, until the time is up.

Prints what was done, what befell it, and what was lost: 0, or it names the seeds and ends with 1. --seed repeats one.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_TEST = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(_TEST), *(str(_TEST / level) for level in ("level3_mount", "level4_programs")), str(_TEST.parent)]

from harness.engine_process import ALL_TRANSPORTS  # noqa: E402
from harness.leaks import end_processes, our_processes, unmount_below  # noqa: E402
from repositories import make_repository  # noqa: E402
from soak.event_sweep import sweep_events  # noqa: E402
from soak.killing import BOTH, CLIENT, ENGINE, STOPS  # noqa: E402
from soak.plays import CASES, play  # noqa: E402
from soak.stage import GRACE_S, SHORT_GRACE_S, Stage  # noqa: E402
from soak.sweep import sweep  # noqa: E402

#: Seeds of a kind in one round: of programs, one.
_SEEDS = {"faults": 40, ENGINE: 10, CLIENT: 10, BOTH: 5, STOPS: 10, "engine+faults": 10}
_ACTORS, _CALLS = 3, 60


class Soak:
    """Totals, and the means to add to them."""

    def __init__(self, area: Path, until: float) -> None:
        self.area, self.until = area, until
        self.operations: Counter[str] = Counter()
        self.faults: Counter[str] = Counter()
        self.seeds: Counter[str] = Counter()
        self.losses: list[str] = []
        self._stages = 0
        self._origin: Path | None = None

    @property
    def origin(self) -> Path:
        if self._origin is None:
            self._origin = make_repository(self.area)
        return self._origin

    @property
    def is_over(self) -> bool:
        return time.monotonic() >= self.until

    def round(self, transport: str, kind: str, seeds: range) -> None:
        """A stage, and seeds of one kind on it. What fails is noted; the stage may be of no use then."""
        self._stages += 1
        area = self.area / f"stage-{self._stages}"
        area.mkdir()
        grace_s = SHORT_GRACE_S if kind.endswith((CLIENT, BOTH)) or kind == "sweep" else GRACE_S
        more: dict[str, Any] = {"sweep": {"has_key": True}, "events": {"cache": "always"}}.get(kind, {})
        try:
            with self._stage(area, transport, grace_s, more) as stage:
                for seed in seeds:
                    _kinds(self)[kind](stage, seed)
                    self.seeds[f"{transport} {kind}"] += 1
                    if self.is_over:
                        break
        except Exception as failure:
            self.losses.append(str(failure) or repr(failure))
            print(f"LOST {failure}", flush=True)
        finally:
            unmount_below(str(area))
            end_processes(our_processes())
            shutil.rmtree(area)

    @contextlib.contextmanager
    def _stage(self, area: Path, transport: str, grace_s: int, more: dict[str, Any]) -> Iterator[Stage]:
        stage = Stage(area, transport, actors=_ACTORS, grace_s=grace_s, **more)
        try:
            with stage.set_up():
                yield stage
        finally:
            self.operations.update(stage.company.calls)
            self.faults.update(stage.faults)

    def report(self, seconds: float) -> None:
        def row(what: str, counts: Counter[str]) -> None:
            parts = ", ".join(f"{number} {name}" for name, number in sorted(counts.items()))
            print(f"{what:<11}{counts.total()}  ({parts})")

        print(f"{'seconds':<11}{seconds:.0f}")
        row("seeds", self.seeds)
        row("operations", self.operations)
        row("faults", self.faults)
        print(f"{'losses':<11}{len(self.losses)}")
        for loss in self.losses:
            print(loss)


def _kinds(soak: Soak) -> dict[str, Callable[[Stage, int], object]]:
    """How a seed of each kind is played."""

    def deaths(whom: str, and_faults: bool = False) -> Callable[[Stage, int], None]:
        return lambda stage, seed: stage.play_deaths(seed, whom, _CALLS, and_faults=and_faults)

    def program(name: str, whom: str) -> Callable[[Stage, int], None]:
        def run(stage: Stage, seed: int) -> None:
            play(stage, name, seed, whom, soak.origin)
            soak.operations[name] += 1

        return run

    def every_byte(stage: Stage, seed: int) -> None:
        soak.operations["swept"] += sweep(stage)

    def every_event(stage: Stage, seed: int) -> None:
        soak.operations["swept"] += sweep_events(stage)

    return {
        "faults": lambda stage, seed: stage.play_faults(seed, _CALLS),
        **{whom: deaths(whom) for whom in (ENGINE, CLIENT, BOTH, STOPS)},
        f"{ENGINE}+faults": deaths(ENGINE, and_faults=True),
        **{f"{name}-{whom}": program(name, whom) for name, whom in CASES},
        "sweep": every_byte,
        "events": every_event,
    }


def _is_possible(transport: str, kind: str) -> bool:
    """Over shared memory nobody sees messages pass."""
    return transport != "shm" or not kind.endswith(("+faults", "sweep", "events"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=300.0, help="for how long (default: %(default)g)")
    parser.add_argument("--transport", choices=ALL_TRANSPORTS, help="this one only")
    parser.add_argument("--only", metavar="KIND", help="this kind only: " + ", ".join(_kinds(Soak(Path(), 0))))
    parser.add_argument("--seed", type=int, help="this seed only, once")
    options = parser.parse_args()
    kinds = [options.only] if options.only else list(_kinds(Soak(Path(), 0)))
    transports = [options.transport] if options.transport else ALL_TRANSPORTS
    if os.geteuid() != 0:
        parser.error("mounts with allow_other need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # what was mounted and started ends, too
    begun = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="qtfs-soak-", dir=os.environ.get("TMPDIR", "/var/tmp")) as area:
        soak = Soak(Path(area), begun + options.seconds)
        _go_round(soak, transports, kinds, options.seed)
    soak.report(time.monotonic() - begun)
    return 1 if soak.losses else 0


def _go_round(soak: Soak, transports: list[str], kinds: list[str], seed: int | None) -> None:
    """Every kind over every transport, again and again with other seeds."""
    number = 0
    while True:
        for kind in kinds:
            count = _SEEDS.get(kind, 1)
            seeds = range(seed, seed + 1) if seed is not None else range(number * count, (number + 1) * count)
            for transport in transports:
                if _is_possible(transport, kind):
                    soak.round(transport, kind, seeds)
                if soak.is_over:
                    return
        number += 1
        if seed is not None:
            return


if __name__ == "__main__":
    sys.exit(main())
