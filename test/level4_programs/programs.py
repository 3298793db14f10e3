"""What the tests of programs share: mounts as they need them, and programs that never outlive their test."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.leaks import end_processes, environment
from level5_commands.commandline import Outcome, Word, daemons, mounted

from qtfs_common.addresses import Address

Variables = Mapping[str, str] | None
WORKERS = Path(__file__).with_name("workers.py")


def over(*setups: str) -> pytest.MarkDecorator:
    """Run a test over these pairs of transport and cache mode: "unix-none", "tcp-auto"."""
    pairs = [tuple(setup.split("-")) for setup in setups]
    # Session scope, or every test would get an engine of its own.
    return pytest.mark.parametrize(("common_engine", "cache"), pairs, indirect=True, ids=setups, scope="session")


# ------------------------------------------------------------------------------------------------------------ mounts


@dataclass(frozen=True)
class Shared:
    """A directory of the server: `there` as the server sees it, `here` through the mount."""

    there: Path
    here: Path


@contextlib.contextmanager
def mounted_here(there: Path, area: Path, address: Address, cache: str = "auto", more: str = "") -> Iterator[Shared]:
    """Mount `there` on a new directory in `area`; at the end mount and daemon are gone, also if something failed."""
    here = area / f"point-{os.urandom(4).hex()}"
    here.mkdir()
    options = [f"server={address}", "driver=fuse3", *([f"cache={cache}"] if cache != "auto" else []), more]
    try:
        with mounted(there, here, ",".join(filter(None, options))):
            yield Shared(there, here)
    finally:
        end_processes(daemons(here))


# ---------------------------------------------------------------------------------------------------------- programs


@contextlib.contextmanager
def started(
    words: Sequence[Word], cwd: Path | None = None, variables: Variables = None, stdin: int = subprocess.DEVNULL
) -> Iterator[subprocess.Popen[bytes]]:
    """A program that runs beside the test; it and its children are killed at the end if they still run."""
    process = subprocess.Popen(
        words, cwd=cwd, env=environment(LC_ALL="C", **(variables or {})), stdin=stdin, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(20)
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def attempt(
    *words: Word, cwd: Path | None = None, timeout_s: float = 60.0, variables: Variables = None
) -> Outcome:
    """Run a program to its end, however it ends; both its outputs are in stdout."""
    with started(words, cwd, variables) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired as error:
            said = (error.stdout or b"").decode(errors="replace")
            raise AssertionError(f"{words} did not end within {timeout_s:g} s; it said:\n{said}") from None
    return Outcome(process.returncode, output.decode(errors="surrogateescape"), "")


def program(*words: Word, cwd: Path | None = None, timeout_s: float = 60.0, variables: Variables = None) -> str:
    """What a program says that must end with 0."""
    outcome = attempt(*words, cwd=cwd, timeout_s=timeout_s, variables=variables)
    assert outcome.status == 0, f"{words} ended with {outcome.status}:\n{outcome.stdout}"
    return outcome.stdout


# ----------------------------------------------------------------------------------------------------------- workers


def worker_words(job: str, *arguments: object) -> Sequence[Word]:
    """The command line of a job of `workers.py`."""
    return [sys.executable, "-I", "-S", str(WORKERS), job, *map(str, arguments)]


class Worker:
    """A job of `workers.py` under way. It says "ready", goes on at a line from us, and says what came of it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def hear(self, timeout_s: float = 20.0) -> str:
        """Its next line; what it printed instead, if it failed."""
        assert self.process.stdout is not None
        line, deadline = b"", time.monotonic() + timeout_s
        while not line.endswith(b"\n"):
            left = max(0.0, deadline - time.monotonic())
            heard, _, _ = select.select([self.process.stdout], [], [], left)
            assert heard, f"silent for {timeout_s:g} s: {self.process.args!r}"
            line += (byte := os.read(self.process.stdout.fileno(), 1))
            assert byte, line.decode()
        assert not line.startswith(b"Traceback"), self.process.stdout.read().decode()
        return line.decode().strip()


    def say(self, word: str = "go") -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{word}\n".encode())
        self.process.stdin.flush()

    def finish(self, timeout_s: float = 60.0) -> str:
        """Let it go on if it waits; what it says until its end, which must be a good one."""
        output, _ = self.process.communicate(b"go\n", timeout=timeout_s)
        assert self.process.returncode == 0, output.decode()
        return output.decode()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(20)


@contextlib.contextmanager
def worker(job: str, *arguments: object) -> Iterator[Worker]:
    """A job that is ready."""
    with started(worker_words(job, *arguments), stdin=subprocess.PIPE) as process:
        found = Worker(process)
        assert found.hear() == "ready"
        yield found


def all_at_once(*jobs: Sequence[object]) -> list[str]:
    """Start these jobs, let them all go on together, and return what each said."""
    with contextlib.ExitStack() as stack:
        workers = [stack.enter_context(worker(str(job), *arguments)) for job, *arguments in jobs]
        for one in workers:
            one.say()
        return [one.finish() for one in workers]
