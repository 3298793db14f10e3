"""libfuse's own example passthrough_ll: a FUSE file system in C that passes everything on to another one."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
from pathlib import Path

from daemons import Daemons, Unavailable, start, wait_mounted

_EXAMPLES = ("/usr/share/doc/libfuse3-dev/examples", "/usr/share/doc/fuse3-devel", "/usr/share/doc/fuse3/examples")
_SOURCE = "passthrough_ll.c"


def mount(backing: Path, top: Path, stack: contextlib.ExitStack) -> Daemons:
    """Without caches."""
    directory = backing.parent / "libfuse"
    directory.mkdir()
    for name in (_SOURCE, "passthrough_helpers.h"):
        (directory / name).write_bytes(_example(name))
    program = compile_fuse(directory / _SOURCE, directory / "passthrough_ll")
    command: list[str | Path] = [program, "-f", top, "-o", f"source={backing},cache=never"]
    daemon = start(stack, command, top.parent / f"{top.name}.log")
    wait_mounted(stack, daemon, top)
    # It complains of a limit that it sets itself.
    daemon.log.unlink()
    return Daemons((daemon.process.pid,))


def compile_fuse(source: Path, program: Path) -> Path:
    """The program, made of one file and libfuse. Raises Unavailable."""
    flags = subprocess.run(["pkg-config", "--cflags", "--libs", "fuse3"], check=False, capture_output=True, text=True)
    command = ["cc", "-O2", "-w", "-D_GNU_SOURCE", "-o", program, source, *flags.stdout.split()]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"it does not compile: {done.stderr.strip()}")
    return program


def _example(name: str) -> bytes:
    """An example of libfuse's as the distribution ships it, compressed or not."""
    for directory in map(Path, _EXAMPLES):
        if (directory / name).exists():
            return (directory / name).read_bytes()
        if (directory / f"{name}.gz").exists():
            return gzip.decompress((directory / f"{name}.gz").read_bytes())
    raise Unavailable(f"libfuse's example {name} is not installed")
