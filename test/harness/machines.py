"""Two machines: a network and a mount namespace for each, and a cable between them.

    with two_machines() as (server, client):
        subprocess.run(client.command("cat", "/proc/net/dev"))

A command that runs there keeps its pid: nsenter(1) becomes it. All goes with the last process in there.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from harness.leaks import environment
from harness.waiting import wait_until

Word = str | os.PathLike[str]


@dataclass(frozen=True)
class Machine:
    """The namespaces of a process that sleeps in them."""

    pid: int
    address: str

    @property
    def within(self) -> Sequence[str]:
        """What to put before a command."""
        return ("nsenter", f"--target={self.pid}", "--net", "--mount", "--")

    def command(self, *words: Word) -> list[str]:
        return [*self.within, *map(os.fspath, words)]

    def run(self, *words: Word) -> str:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, env=environment(), check=False)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout


@contextmanager
def _machine(address: str) -> Iterator[Machine]:
    words = ["unshare", "--net", "--mount", "--propagation", "private", "sleep", "infinity"]
    process = subprocess.Popen(words, env=environment())
    try:
        ours = os.readlink("/proc/self/ns/net")
        wait_until(lambda: _namespace(process.pid) not in (None, ours), "the namespaces")
        wait_until(lambda: "sleep" in _name(process.pid), "the mount namespace")  # made before sleep(1) is executed
        yield Machine(process.pid, address)
    finally:
        process.kill()
        process.wait()


def _namespace(pid: int) -> str | None:
    with contextlib.suppress(OSError):
        return os.readlink(f"/proc/{pid}/ns/net")
    return None


def _name(pid: int) -> str:
    with open(f"/proc/{pid}/comm") as file:
        return file.read()


@contextmanager
def two_machines() -> Iterator[tuple[Machine, Machine]]:
    """10.99.0.1 and 10.99.0.2; raises AssertionError where namespaces or veth are not to be had."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(_machine(f"10.99.0.{number}")) for number in (1, 2))
        one.run("ip", "link", "add", "cable", "type", "veth", "peer", "name", "cable", "netns", str(two.pid))
        for machine in (one, two):
            machine.run("ip", "address", "add", f"{machine.address}/24", "dev", "cable")
            for device in ("lo", "cable"):
                machine.run("ip", "link", "set", device, "up")
        yield one, two
