"""Programs that use a mount: a job of callers.py in a process of its own, told when to begin, and heard.

Or one call of single_calls.py.
"""

from __future__ import annotations

import contextlib
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

from harness.leaks import environment

CALLERS = Path(__file__).with_name("callers.py")
SINGLE_CALLS = Path(__file__).with_name("single_calls.py")


class Caller:
    """A job of callers.py, or of another script: it is ready, and `go` makes it begin."""

    def __init__(self, job: str, *arguments: object, within: Sequence[str] = (), script: Path = CALLERS) -> None:
        """`within`: what to put before the command, to have it run on a machine of harness.machines."""
        command = [*within, sys.executable, "-I", "-S", str(script), job, *map(str, arguments)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        self._said: queue.Queue[str] = queue.Queue()
        self._reader = threading.Thread(target=self._listen, daemon=True)
        self._reader.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._said.put(line.rstrip("\n"))
        self._said.put("(ended)")

    def go(self) -> Caller:
        return self.tell("")

    def tell(self, line: str) -> Caller:
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        return self

    def says(self, timeout_s: float = 10.0) -> str:
        try:
            return self._said.get(timeout=timeout_s)
        except queue.Empty:
            raise AssertionError(f"{self.process.args!r} said nothing within {timeout_s:g} s") from None

    def has_said(self) -> bool:
        """Whether `says` would not have to wait."""
        return not self._said.empty()

    def is_silent_for(self, seconds: float) -> bool:
        """Whether it says nothing for so long: this is what is tested, not a pause."""
        try:
            self._said.get(timeout=seconds)
        except queue.Empty:
            return True
        return False

    def kill(self, timeout_s: float = 10.0) -> float:
        """SIGKILL; how many seconds it took to die."""
        begun = time.monotonic()
        self.process.kill()
        self.process.wait(timeout_s)
        return time.monotonic() - begun

    def end(self) -> None:
        with contextlib.suppress(OSError):
            self.process.kill()
        self.process.wait(20)
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            with contextlib.suppress(BrokenPipeError):
                stream.close()


@contextlib.contextmanager
def calling(job: str, *arguments: object, script: Path = CALLERS) -> Iterator[Caller]:
    """A caller that is ready; killed at the end."""
    caller = Caller(job, *arguments, script=script)
    try:
        assert caller.says() == "ready"
        yield caller
    finally:
        caller.end()
