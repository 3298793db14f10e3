"""The conformance set of level 3, run in the guest: what programs do on mounts has the outcome it has on a local disk.

    conformance.py [--here SHARE] [--expected FILE] [--trees FILE] LOCAL MOUNT...

All mounts are of one directory of the server, SHARE if that is in this guest. LOCAL is an empty directory beside it; of
each mount a subdirectory is used that has its name. FILEs are pickles by a scenario's name: outcomes that the server
tells, where LOCAL is another file system; and, written here, the tree that it has left.

Scenarios about many files make a quarter of them here. Prints what differs, and ends with 1 if anything does.
"""

from __future__ import annotations

import argparse
import pickle
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

LEVEL3 = Path(__file__).resolve().parents[1] / "level3_mount"
sys.path.insert(0, str(LEVEL3))

import kit  # noqa: E402
from kit import in_child, tree  # noqa: E402
from scenarios import ALL, what_fuse_has_no_request_for  # noqa: E402

Scenario = Callable[[], Any]
_SHOWN = 200
_LESS = 4


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for name in ("--here", "--expected", "--trees"):
        parser.add_argument(name, type=Path)
    parser.add_argument("local", type=Path)
    parser.add_argument("mounts", type=Path, nargs="+")
    return parser.parse_args()


def _difference(found: Any, expected: Any) -> Iterator[str]:
    """A line about where two values part, or none."""
    one, other = repr(found), repr(expected)
    if one != other:
        at = max(next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), 0) - _SHOWN // 2, 0)
        yield f"...{one[at : at + _SHOWN]}... instead of ...{other[at : at + _SHOWN]}..."


class Run:
    """All scenarios on all mounts, and what came of them."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.local: Path = arguments.local
        self.here: Path | None = arguments.here
        self.mounts: list[Path] = arguments.mounts
        self.told: dict[str, Any] = pickle.loads(arguments.expected.read_bytes()) if arguments.expected else {}
        self.trees: dict[str, Any] = {}
        self.failures = 0

    def everything(self) -> None:
        for mount in self.mounts:
            (mount / mount.name).mkdir()
        for scenario in ALL:
            begin = time.monotonic()
            try:
                self._compare(scenario)
                print(f"passed {scenario.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
            except Exception:
                self._report(f"{scenario.__name__}: {traceback.format_exc()}")
        for mount in self.mounts:
            found = in_child(what_fuse_has_no_request_for, self._fresh(mount / mount.name, "fuse"))
            if found != ["ENOTSUP"] * 3:
                self._report(f"{what_fuse_has_no_request_for.__name__} on {mount.name}: {found}")

    def _compare(self, scenario: Scenario) -> None:
        name = scenario.__name__
        beside = self._fresh(self.local, name)
        expected = in_child(scenario, beside)
        expected = self.told.get(name, expected)
        self.trees[name] = left = tree(beside)
        for mount in self.mounts:
            there = self._fresh(mount / mount.name, name)
            self._judge(f"{name} on {mount.name}", in_child(scenario, there), expected)
            self._judge(f"the tree of {name} on {mount.name}", tree(there), left)
            if self.here is not None:
                self._judge(f"{name} on the server", tree(self.here / mount.name / name), left)

    @staticmethod
    def _fresh(parent: Path, name: str) -> str:
        (parent / name).mkdir()
        return str(parent / name)

    def _judge(self, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            for line in _difference(found, expected):
                self._report(f"{what}: {line}")

    def _report(self, text: str) -> None:
        self.failures += 1
        print(f"FAILED {text}", flush=True)


def main() -> int:
    arguments = _arguments()
    begin = time.monotonic()
    kit.less = _LESS
    run = Run(arguments)
    run.everything()
    if arguments.trees:
        arguments.trees.write_bytes(pickle.dumps(run.trees))
    names = ", ".join(mount.name for mount in run.mounts)
    seconds = time.monotonic() - begin
    print(f"{len(ALL)} scenarios on {names}: {run.failures} differ ({seconds:.0f} s)", flush=True)
    return 1 if run.failures else 0


if __name__ == "__main__":
    sys.exit(main())
