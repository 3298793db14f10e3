"""mount.qtfs killed before or after the mount stands, and mounting over what is left: doc/reliability.md, promise 4."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from commandline import MOUNT, daemons, kill_daemon_of, mount, mounts_at, run
from harness.engine_process import EngineProcess
from harness.fault_proxy import FaultProxy, Message
from harness.leaks import environment
from harness.waiting import wait_until
from machines import Machines
from namespaces import Namespace

FAILURE, INTERRUPTED = 32, 8
GRACE_S = 2


@pytest.fixture
def source(served: EngineProcess) -> Path:
    (served.share / "file").write_text("content")
    return served.share


# ------------------------------------------------------------------------------------------------ killed in the middle


@contextmanager
def _mute(path: Path) -> Iterator[threading.Event]:
    """Somebody who listens, takes what comes and says nothing; the event tells that somebody has come."""
    came = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def serve() -> None:
            with suppress(OSError), listener.accept()[0] as connection:
                came.set()
                while connection.recv(4096):
                    pass

        thread = threading.Thread(target=serve)
        thread.start()
        yield came
        listener.shutdown(socket.SHUT_RDWR)
        thread.join()


@contextmanager
def _mounting(area: Path, *words: object) -> Iterator[subprocess.Popen[bytes]]:
    """mount.qtfs in a session of its own, as from a terminal; it complains to `area`/stderr."""
    with (area / "stderr").open("wb") as complaints:
        command = [MOUNT, *map(str, words)]
        process = subprocess.Popen(command, env=environment(), stderr=complaints, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_killed_in_the_handshake(tmp_path: Path, point: Path, number: signal.Signals) -> None:
    """Also if it would wait for ever; SIGINT as by Ctrl-C is an exit status of mount(8)."""
    with (
        _mute(tmp_path / "mute") as came,
        _mounting(tmp_path, "/srv", point, "-o", f"server=unix://{tmp_path}/mute,timeout=0") as process,
    ):
        assert came.wait(20)
        process.send_signal(number)
        assert process.wait(10) == (INTERRUPTED if number == signal.SIGINT else -number)
        assert (tmp_path / "stderr").read_text() == ("mount.qtfs: interrupted\n" if number == signal.SIGINT else "")
        wait_until(lambda: not daemons(point), "the other process to end")


def test_killed_before_the_server_has_answered(
    served: EngineProcess, source: Path, tmp_path: Path, point: Path
) -> None:
    """The mount stands already, but nobody was told so."""
    asked, over = threading.Event(), threading.Event()

    def hold(message: Message) -> None:
        if message.where == "request" and message.operation in ("GETATTR", "STATFS"):
            asked.set()
            over.wait(60)

    with FaultProxy(tmp_path / "proxy", served).running() as proxy:
        proxy.fault = hold
        try:
            with _mounting(tmp_path, source, point, "-o", f"server=unix://{tmp_path}/proxy,timeout=0") as process:
                assert asked.wait(20) and mounts_at(point)
                process.kill()
                process.wait(20)
                wait_until(lambda: not daemons(point), "the daemon to end", 20)
            assert not mounts_at(point)
        finally:
            over.set()


def test_one_timeout_for_all_that_is_asked(served: EngineProcess, tmp_path: Path, point: Path) -> None:
    """A server that lets us wait for its name already has used up most of our time."""
    timeout_s = 1.2

    def welcome(message: Message) -> None:
        time.sleep(timeout_s * 0.75)  # the slow server is what is tested

    with FaultProxy(tmp_path / "proxy", served).running() as proxy:
        proxy.fault = welcome
        options = f"server=unix://{tmp_path}/proxy,timeout={timeout_s:g}"
        mount(served.share, point, options).refused(FAILURE, "does not answer: timed out")
        assert proxy.count("request", "MOUNT") == 0, "the request came after all"


# ------------------------------------------------------------------------------------------- what a dead daemon leaves


@pytest.fixture(scope="module")
def tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    with EngineProcess(tmp_path_factory.mktemp("tcp"), "tcp").running() as engine:
        (engine.share / "file").write_text("content")
        yield engine


def test_mounting_from_fstab_over_what_a_dead_daemon_left(tcp: EngineProcess, tmp_path: Path, point: Path) -> None:
    """Who works there stays, and gets ENOTCONN; the new mount is for those who come. To mount -a, a dead one is one."""
    (tmp_path / "scratch").mkdir()
    namespace = Namespace(tmp_path / "scratch", variables={"point": str(point)})
    namespace.fstab = [f"{tcp.share} {point} qtfs server={tcp.address} 0 0"]
    outcome = namespace.run("""
        mount "$point"
        (cd "$point" && exec sleep 60) & sleeper=$!
        while [ "$(readlink /proc/$sleeper/cwd)" != "$point" ]; do sleep 0.05; done
        kill -9 $(pgrep -f "[q]tfs_client.cli .*$point")
        while stat -f "$point" >/dev/null 2>&1; do sleep 0.05; done
        mount -a -t qtfs
        ! ls "$point"
        mount "$point"
        cat "$point/file"; echo
        ! ls "/proc/$sleeper/cwd/"
        findmnt -n "$point" | wc -l
        kill $sleeper
        umount "$point"
    """).check()
    assert outcome.stdout.split() == ["content", "1"]
    assert outcome.stderr.count("Transport endpoint is not connected") == 2, outcome.stderr


@contextmanager
def _holding(path: str) -> Iterator[None]:
    file = os.open(path, os.O_RDONLY)
    try:
        yield
    finally:
        with suppress(OSError):  # close(2) says that nobody answers any more
            os.close(file)


def test_mounting_over_a_dead_mount_with_its_children(tmp_path: Path) -> None:
    machines = Machines(tmp_path, options="propagate")
    machines.engine.arguments = ("--grace", str(GRACE_S))
    with machines.running() as both:
        (both.share / "d").mkdir()
        both.on_server('mount -t tmpfs none "$share/d"; echo content >"$share/d/file"').check()

        def is_shown() -> bool:
            return both.on_client('findmnt -n "$point/d" && cat "$point/d/file"').stdout.endswith("content\n")

        wait_until(is_shown, "the child")
        (daemon,) = both.daemons()
        with _holding(f"/proc/{both.client.pid}/root{both.point}/d/file"):
            os.kill(daemon, signal.SIGKILL)
            wait_until(lambda: both.on_client('stat -f "$point"').status != 0, "the mount to be dead")
            assert "not connected" in both.on_client('cat "$point/d/file"').stderr
            both.mount().check()
            wait_until(is_shown, "the child of the new mount")
        assert len([line for line in both.client.mountinfo().splitlines() if "fuse.qtfs" in line]) == 2
        # The dead daemon's session keeps the file open until its grace is over.
        wait_until(lambda: both.on_server('umount "$share/d"').status == 0, "the server to be rid of it", GRACE_S + 10)
        wait_until(lambda: "fuse.qtfs" in both.client.mountinfo() and not is_shown(), "the child to go")


def _mount_dead(point: Path, type_: str) -> None:
    """A FUSE mount that nobody serves."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR)
    data = f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()
    status = libc.mount(b"other", os.fsencode(point), type_.encode(), 0, data)
    os.close(device)
    assert status == 0, os.strerror(ctypes.get_errno())


def test_nothing_else_is_taken_away(served: EngineProcess, source: Path, point: Path) -> None:
    """Neither a dead mount of something else, nor a qtfs mount that lives."""
    _mount_dead(point, "fuse.other")
    mount(source, point, f"server={served.address}").refused(FAILURE, "not connected")
    assert [each.type for each in mounts_at(point)] == ["fuse.other"]
    run("umount", point).check()
    mount(source, point, f"server={served.address}").check()
    mount(source, point, f"server={served.address}").refused(FAILURE, "busy")
    _mount_dead(point, "fuse.qtfs")
    mount(source, point, f"server={served.address}").refused(FAILURE, "busy")
    assert len(mounts_at(point)) == 1 and (point / "file").read_text() == "content"
    kill_daemon_of(point)
    with pytest.raises(OSError) as caught:
        os.stat(point)
    assert caught.value.errno == errno.ENOTCONN
