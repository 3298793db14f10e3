"""A FUSE file system that does nothing: what an operation costs before anybody has done any work for it."""

from __future__ import annotations

import contextlib
from pathlib import Path

from daemons import Daemons, start, wait_mounted
from passthrough import compile_fuse

_SOURCE = Path(__file__).with_name("nothing.c")


def mount(backing: Path, top: Path, stack: contextlib.ExitStack) -> Daemons:
    """`backing` is not used."""
    program = compile_fuse(_SOURCE, backing.parent / "nothing-program")
    daemon = start(stack, [program, top], top.parent / f"{top.name}.log")
    wait_mounted(stack, daemon, top)
    return Daemons((daemon.process.pid,))
