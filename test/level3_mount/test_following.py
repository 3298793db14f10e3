"""The thread that follows the server's mounts: its daemon is killed meanwhile, or a user lays a link in its way."""

from __future__ import annotations

import contextlib
import errno
import os
import subprocess
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from harness.fault_proxy import Action, FaultProxy, Message
from harness.leaks import mounts_below, unmount_below
from harness.mounts import MountProcess
from harness.server_machine import ServerMachine
from harness.waiting import wait_until

pytestmark = pytest.mark.root
SOON_S = 10.0
#: What a process gets from a mount whose daemon died, or dies.
GONE = (errno.ENOTCONN, errno.ECONNABORTED)


class Held:
    """Replies to one operation stay in the proxy, but for the first `passing`."""

    def __init__(self, proxy: FaultProxy, operation: str, passing: int) -> None:
        self.seen = threading.Event()
        self.released = threading.Event()
        self._operation = operation
        self._passing = passing
        proxy.fault = self._fault

    def _fault(self, message: Message) -> Action | None:
        if (message.where, message.operation) == ("reply", self._operation) and not self.released.is_set():
            self._passing -= 1
            if self._passing < 0:
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
def held(proxy: FaultProxy, operation: str, passing: int = 0) -> Iterator[Held]:
    """At the end they go on."""
    hold = Held(proxy, operation, passing)
    try:
        yield hold
    finally:
        hold.released.set()


@pytest.fixture
def mount(server: ServerMachine, proxy: FaultProxy, tmp_path: Path) -> MountProcess:
    """Not started."""
    options = "driver=fuse3,cache=none,propagate"
    return MountProcess(server, server.share, tmp_path / "mnt", options, through=proxy.address)


@contextlib.contextmanager
def started(mount: MountProcess) -> Iterator[None]:
    """It need not end well."""
    mount.start()
    try:
        yield
    finally:
        mount.take_away()
        unmount_below(str(mount.point))


def is_killed(mount: MountProcess, others: Iterable[Future[None]] = ()) -> None:
    """The daemon, and it ends, and what works for it; who is there, or comes then, gets an error."""
    assert mount.process is not None
    helpers = psutil.Process(mount.pid).children(recursive=True)
    mount.process.kill()
    try:
        mount.process.wait(SOON_S)
        errors = [other.exception(SOON_S) for other in others]
        wait_until(lambda: all(map(has_ended, helpers)), "what worked for it to end", SOON_S)
    except BaseException:
        # Somebody waits for ever, perhaps this test itself.
        subprocess.run(["umount", "-f", mount.point], capture_output=True, check=False)
        raise
    with pytest.raises(OSError) as caught:
        os.listdir(mount.point)
    for error in (caught.value, *errors):
        assert isinstance(error, OSError) and error.errno in GONE, error


def has_ended(process: psutil.Process) -> bool:
    """Its parent is gone, and whoever inherits it may take his time."""
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def becomes_a_mount(path: Path) -> None:
    wait_until(lambda: os.path.ismount(path), f"{path} to be a mount", SOON_S)


def waits_for_a_directory(daemon: psutil.Process) -> bool:
    """Whether it, or a child, is telling the kernel something, and waits for who uses a directory."""
    with contextlib.suppress(OSError, psutil.Error):  # some come and go
        processes = [Path(f"/proc/{process.pid}/task") for process in (daemon, *daemon.children(recursive=True))]
        stacks = [(task / "stack").read_text() for tasks in processes for task in tasks.iterdir()]
        return any("fuse_reverse_inval_entry" in stack for stack in stacks)
    return False


def test_killed_at_any_lookup_on_the_way_to_a_mount_point(
    server: ServerMachine, proxy: FaultProxy, mount: MountProcess
) -> None:
    """The way leads through a mount that it made before."""
    server.mount_tmpfs("a", "f")
    server.run("mkdir a/inner")
    passing = 0
    while True:
        with started(mount):
            becomes_a_mount(mount.point / "a")
            with held(proxy, "LOOKUP", passing) as hold:
                server.run("mount -t tmpfs none a/inner")
                wait_until(lambda: hold.seen.is_set() or is_below(mount, "a/inner"), "a lookup, or the mount", SOON_S)
                if not hold.seen.is_set():
                    break
                is_killed(mount)
        server.umount("a/inner")
        passing += 1
    assert passing > 3


def is_below(mount: MountProcess, place: str) -> bool:
    """Whether something is mounted there; nobody is asked but the kernel."""
    return str(mount.point / place) in mounts_below(str(mount.point))


def test_killed_while_it_looks_up_what_to_unmount(
    server: ServerMachine, proxy: FaultProxy, mount: MountProcess
) -> None:
    server.mount_tmpfs("a", "f")
    with started(mount):
        becomes_a_mount(mount.point / "a")
        with held(proxy, "LOOKUP") as hold:
            server.umount("a")
            assert hold.seen.wait(SOON_S)
            is_killed(mount)


@pytest.mark.parametrize("others", [0, 3])
def test_killed_while_somebody_keeps_a_directory_busy(
    server: ServerMachine, proxy: FaultProxy, mount: MountProcess, others: int
) -> None:
    """What tells the kernel to look a name up again waits for who makes one beside it, and he for the daemon."""
    with started(mount), ThreadPoolExecutor() as pool, held(proxy, "MKDIR") as hold:
        made = [pool.submit(os.mkdir, mount.point / "new")]
        assert hold.seen.wait(SOON_S)
        made += [pool.submit(os.mkdir, mount.point / f"before-{number}") for number in range(others)]
        server.mount_tmpfs("a", "f")
        daemon = psutil.Process(mount.pid)
        wait_until(lambda: waits_for_a_directory(daemon), "the daemon to wait for the directory", SOON_S)
        made += [pool.submit(os.mkdir, mount.point / f"after-{number}") for number in range(others)]
        is_killed(mount, made)


def test_nothing_is_mounted_where_links_of_the_server_lead(
    server: ServerMachine, proxy: FaultProxy, mount: MountProcess, tmp_path: Path
) -> None:
    """They would lead to places of the client, which may have directories of the same name."""
    victim = tmp_path / "victim"
    (victim / "inner").mkdir(parents=True)
    server.run("mkdir -p x/inner")
    with started(mount):
        with held(proxy, "MOUNT") as hold:
            server.run("mount -t tmpfs none x/inner")
            assert hold.seen.wait(SOON_S)
            server.run(f"mv x y; ln -s '{victim}' x")
        refusal = "Too many levels of symbolic links"
        wait_until(lambda: refusal in mount.log() or mounts_below(str(victim)), "it to be refused, or mounted", SOON_S)
        assert mounts_below(str(victim)) == []
        server.mount_tmpfs("b")  # a reason to look again
        becomes_a_mount(mount.point / "y/inner")
