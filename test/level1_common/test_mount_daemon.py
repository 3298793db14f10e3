"""What mount.qtfs leaves in the background: that it ends with a parent that is killed, and its control socket."""

from __future__ import annotations

import json
import os
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import cast

import pytest
from harness.engine_process import CHECKOUT
from harness.leaks import environment
from harness.waiting import wait_until

from qtfs_client.control import ControlServer
from qtfs_client.sessions import Session

#: The parent is stopped before it can read that the mount stands, and then killed.
_KILLED_BEFORE_IT_READS = """
import os, signal, sys, time
from pathlib import Path
from qtfs_client.daemon import detach

def serve(ready):
    parent = os.getppid()
    os.kill(parent, signal.SIGSTOP)
    while "(python" in (text := Path(f"/proc/{parent}/stat").read_text()) and ") T " not in text:
        pass
    ready()
    signal.signal(signal.SIGTERM, lambda *_: os._exit(Path(sys.argv[1]).write_text("ended") - 5))
    os.kill(parent, signal.SIGKILL)
    for _ in range(15000):
        time.sleep(0.001)  # not pause(2): a handler in Python does not run in a call that began behind the signal

detach(serve, lambda: None)
"""


def test_a_daemon_ends_with_a_parent_that_never_read_that_the_mount_stands(tmp_path: Path) -> None:
    told = tmp_path / "told"
    command = [sys.executable, "-c", _KILLED_BEFORE_IT_READS, str(told)]
    subprocess.run(command, env=environment(PYTHONPATH=str(CHECKOUT)), timeout=20, check=False)
    wait_until(told.exists, "SIGTERM to the daemon")


class _NoSession:
    def stop(self) -> None:
        pass


Serve = Callable[[int], ControlServer]


@pytest.fixture
def serve(tmp_path: Path) -> Iterator[Serve]:
    """Serves the one path, and says a number for figures."""
    servers: list[ControlServer] = []

    def started(number: int) -> ControlServer:
        session = cast(Session, _NoSession())
        path = tmp_path / "control"
        servers.append(
            ControlServer(path, session, lambda *_: None, lambda: {"number": number}, lazy_cleanup=False)
        )
        return servers[-1]

    yield started
    for server in servers:
        server.close()


def _number(sock: socket.socket, path: Path) -> int:
    """What the figures say."""
    with sock, sock.makefile("rb") as replies:
        sock.settimeout(10)
        sock.connect(str(path))
        sock.sendall(b'{"operation": "FIGURES"}\n')
        return int(json.loads(replies.readline())["figures"]["number"])


def test_the_next_mount_of_a_number_has_its_socket(serve: Serve, tmp_path: Path) -> None:
    """Also while the daemon of the last one, which is unmounted, still has to end."""
    last = serve(1)
    serve(2)
    assert _number(socket.socket(socket.AF_UNIX), tmp_path / "control") == 2
    last.close()
    assert _number(socket.socket(socket.AF_UNIX), tmp_path / "control") == 2


def test_a_shortage_of_descriptors_does_not_end_it(
    serve: Serve, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    serve(1)
    caller, other = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    free = os.dup(0)
    os.close(free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (free, limits[1]))
    try:
        other.connect(str(tmp_path / "control"))
        wait_until(lambda: "Too many open files" in caplog.text, "an accept(2) that fails")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
        other.close()
    assert _number(caller, tmp_path / "control") == 1
