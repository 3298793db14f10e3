"""Daemons killed while a thread of theirs waits for their own mount: they end, and who waits there gets an error."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from harness.fault_proxy import Action, FaultProxy, Message
from harness.mounts import MountProcess
from harness.server_machine import ServerMachine
from harness.waiting import wait_until

pytestmark = pytest.mark.root
SOON_S = 10.0
#: What a process gets from a mount whose daemon died, or dies.
GONE = (errno.ENOTCONN, errno.ECONNABORTED)


class Held:
    """Replies to one operation stay in the proxy."""

    def __init__(self, proxy: FaultProxy, operation: str) -> None:
        self.operation = operation
        self.passing = 0  # so many go on
        self.seen = threading.Event()
        self.released = threading.Event()
        proxy.fault = self._fault

    def _fault(self, message: Message) -> Action | None:
        if (message.where, message.operation) == ("reply", self.operation) and not self.released.is_set():
            if self.passing:
                self.passing -= 1
                return None
            self.seen.set()
            self.released.wait()
        return None


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerMachine]:
    with ServerMachine(tmp_path / "server", workers=8).running() as machine:
        for name in ("a", "b"):
            (machine.share / name).mkdir()
        yield machine


@pytest.fixture
def proxy(server: ServerMachine, tmp_path: Path) -> Iterator[FaultProxy]:
    with FaultProxy(tmp_path / "proxy.sock", server).running() as running:
        yield running


@contextlib.contextmanager
def held(proxy: FaultProxy, operation: str) -> Iterator[Held]:
    """At the end they go on, and the mount serves again whoever waits there."""
    hold = Held(proxy, operation)
    try:
        yield hold
    finally:
        hold.released.set()


@pytest.fixture
def mount(server: ServerMachine, proxy: FaultProxy, tmp_path: Path) -> Iterator[MountProcess]:
    process = MountProcess(
        server, server.share, tmp_path / "mnt", "driver=fuse3,cache=none,propagate", through=proxy.address
    )
    process.start()
    try:
        yield process
    finally:
        process.take_away()


def is_killed(mount: MountProcess) -> None:
    """The daemon, and it ends; who comes then gets an error."""
    assert mount.process is not None
    mount.process.kill()
    try:
        mount.process.wait(SOON_S)
    except subprocess.TimeoutExpired:
        # Others wait for it, this test among them.
        subprocess.run(["umount", "-f", mount.point], capture_output=True, check=False)
        raise
    with pytest.raises(OSError) as caught:
        os.listdir(mount.point)
    assert caught.value.errno in GONE


def waits_for_a_directory(daemon: psutil.Process) -> bool:
    """Whether it, or a child, is telling the kernel something, and waits for who uses a directory."""
    tasks = [task for process in (daemon, *daemon.children()) for task in Path(f"/proc/{process.pid}/task").iterdir()]
    return any("fuse_reverse_inval_entry" in (task / "stack").read_text() for task in tasks)


def test_while_it_looks_up_where_to_mount(server: ServerMachine, proxy: FaultProxy, mount: MountProcess) -> None:
    with held(proxy, "LOOKUP") as hold:
        server.mount_tmpfs("a", "f")
        assert hold.seen.wait(SOON_S)
        is_killed(mount)


def test_while_its_way_leads_through_a_mount_it_made(
    server: ServerMachine, proxy: FaultProxy, mount: MountProcess
) -> None:
    server.mount_tmpfs("a", "f")
    wait_until(lambda: os.path.ismount(mount.point / "a"), "the mount", SOON_S)
    server.run("mkdir a/inner")
    with held(proxy, "LOOKUP") as hold:
        hold.passing = 1  # "a", in the main mount
        server.run("mount -t tmpfs none a/inner")
        assert hold.seen.wait(SOON_S)
        is_killed(mount)


def test_while_it_looks_up_what_to_unmount(server: ServerMachine, proxy: FaultProxy, mount: MountProcess) -> None:
    server.mount_tmpfs("a", "f")
    wait_until(lambda: os.path.ismount(mount.point / "a"), "the mount", SOON_S)
    with held(proxy, "LOOKUP") as hold:
        server.umount("a")
        assert hold.seen.wait(SOON_S)
        is_killed(mount)


def test_while_somebody_keeps_a_directory_busy(server: ServerMachine, proxy: FaultProxy, mount: MountProcess) -> None:
    """What tells the kernel to look a name up again waits for who makes one beside it, who waits for the daemon."""
    with ThreadPoolExecutor(1) as pool, held(proxy, "MKDIR") as hold:
        made = pool.submit(os.mkdir, mount.point / "new")
        assert hold.seen.wait(SOON_S)
        server.mount_tmpfs("a", "f")
        daemon = psutil.Process(mount.pid)
        wait_until(lambda: waits_for_a_directory(daemon), "the daemon to wait for the directory", SOON_S)
        is_killed(mount)
        error = made.exception(SOON_S)
        assert isinstance(error, OSError) and error.errno in GONE
