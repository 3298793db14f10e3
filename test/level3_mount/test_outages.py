"""A server that does not answer for long: what waits, for how long, and that nothing waits that need not.

doc/reliability.md, promise 3. test_faults.py has the short breaks.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from subprocess import PIPE

import pytest
from calling import calling
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.fault_proxy import Cut, Message, Pair, once, stopped
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import outcome
from lines import connected, engine_everywhere
from lockers import lockers

pytestmark = pytest.mark.root

#: Of a mount's end while its server is silent: what is dirty is given 5 s, telling the server 2 s.
END_S = 15.0
#: What is not to wait for the server at all; on a busy machine.
SOON_S = 5.0


def only_session(engine: EngineProcess) -> dict[str, int]:
    (session,) = engine.figures()["sessions"]
    found: dict[str, int] = session
    return found


@contextlib.contextmanager
def kernel_queue(point: Path, control: Path) -> Iterator[Path]:
    """A file that tells how many requests of a mount the kernel has under way."""
    control.mkdir()
    subprocess.run(["mount", "-t", "fusectl", "none", control], check=True)
    try:
        yield control / str(os.minor(point.stat().st_dev)) / "waiting"
    finally:
        subprocess.run(["umount", control], check=True)


# ---- ends


ENDS: dict[str, list[str]] = {
    "umount": ["umount"],
    "force": ["umount", "-f"],
    "lazy": ["umount", "-l"],
    "fusermount": ["fusermount3", "-u"],
    "signal": [],
}
#: Each way, and each transport; those that ask the server, and the last resort, over all of them.
ENDINGS = [
    *(("umount", transport) for transport in ALL_TRANSPORTS),
    *(("force", transport) for transport in ALL_TRANSPORTS),
    *(("signal", transport) for transport in ("tcp", "shm")),
    ("lazy", "shm"),
    ("fusermount", "unix"),
]


def _end(way: str, mount: MountProcess) -> str:
    """How it went: nothing, if all is well."""
    assert mount.process is not None
    try:
        if way == "signal":
            mount.process.terminate()
        else:
            subprocess.run([*ENDS[way], mount.point], capture_output=True, text=True, timeout=END_S, check=True)
        status = mount.process.wait(END_S)
    except subprocess.SubprocessError as failure:
        return str(failure)
    mount.process = None
    return f"the daemon ended with {status}" if status else ""


def test_every_way_to_end_a_mount_works_while_its_server_is_silent(tmp_path: Path) -> None:
    """Also if everything else waits for ever."""
    said: dict[str, str] = {}
    with engine_everywhere(tmp_path / "engine") as (engine, addresses), contextlib.ExitStack() as stack:
        mounts = {}
        for way, transport in ENDINGS:
            name, options = f"{way}-{transport}", "driver=fuse3,timeout=0,threads=2"
            mounts[name] = MountProcess(engine, engine.share, tmp_path / name, options, through=addresses[transport])
            stack.callback(mounts[name].take_away)
            mounts[name].start()
            os.statvfs(mounts[name].point)  # as mount.qtfs does when it is not in the foreground

        def end(name: str) -> None:
            said[name] = _end(name.partition("-")[0], mounts[name])

        with stopped(engine.pid):
            threads = [threading.Thread(target=end, args=(name,)) for name in mounts]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        assert said == dict.fromkeys(mounts, "")
        assert not any(os.path.ismount(mount.point) for mount in mounts.values())
        wait_until(engine.is_idle, "the engine to end the sessions that it has not been told of")
        for mount in mounts.values():
            mount.check_log()


# ---- who waits, and how long


def test_df_and_ls_fail_once_the_timeout_is_over(tmp_path: Path) -> None:
    """And at once from then on; when the engine goes on, so do they."""
    with engine_everywhere(tmp_path / "engine") as (engine, addresses), contextlib.ExitStack() as stack:
        mounts = [
            MountProcess(engine, engine.share, tmp_path / name, "driver=fuse3,timeout=1,threads=2", through=address)
            for name, address in addresses.items()
        ]
        points = [stack.enter_context(mount.running()).point for mount in mounts]
        programs = [[*words, point] for point in points for words in (["df"], ["ls"], ["stat", "-f"])]
        with stopped(engine.pid):
            for _ in range(2):
                for program in [subprocess.Popen(words, stdout=PIPE, stderr=PIPE) for words in programs]:
                    assert b"Input/output error" in program.communicate(timeout=SOON_S)[1], program.args
        for point in points:
            wait_until(lambda: outcome(os.listdir, point) == [], "the mount to go on")  # noqa: B023


def test_a_daemon_that_was_stopped_does_not_blame_the_server(tmp_path: Path) -> None:
    """Nor does it fail who waits for a lock, as long as that may take."""
    with connected(tmp_path, "timeout=1") as line:
        (line.here / "f").touch()
        with (line.here / "f").open("r+b") as file, lockers(line.there / "f") as (locker,):
            fcntl.lockf(file, fcntl.LOCK_EX)
            locker.wait()
            wait_until(lambda: line.proxy.count("request", "SETLKW"), "the request to wait on the server")
            with stopped(line.mount.pid):
                assert locker.caller.is_silent_for(2.5)
            assert locker.caller.is_silent_for(1)
            os.stat(line.there)
            fcntl.lockf(file, fcntl.LOCK_UN)
            assert locker.says() == "done"


def test_who_ends_in_an_outage_ends(tmp_path: Path) -> None:
    """Nobody can kill a process that closes its files at its exit. Its locks end when the server is back."""
    with connected(tmp_path, "timeout=0,threads=2") as line, contextlib.ExitStack() as stack:
        held = []
        for number in range(4):  # more than there are workers
            (line.here / str(number)).touch()
            held.append(stack.enter_context(calling("hold", "posix", line.there / str(number))))
        with stopped(line.engine.pid):
            for caller in held:
                caller.go()
            for caller in held:
                assert caller.process.wait(10) == 0
        for number in range(4):
            with (line.here / str(number)).open("r+b") as file:
                wait_until(lambda: outcome(fcntl.lockf, file, fcntl.LOCK_EX | fcntl.LOCK_NB) is None, "the lock")


@pytest.mark.parametrize("way", ["exit", "kill"])
def test_who_ends_in_an_outage_closes_many_files_in_the_time_of_one(tmp_path: Path, way: str) -> None:
    """The first of them is waited for, for two seconds."""
    count = 100
    with connected(tmp_path, f"timeout=0,threads=4,run_dir={tmp_path}/run") as line:
        for number in range(count):
            (line.here / str(number)).touch()
        with calling("open_many", line.there, count, "writes") as program:
            assert only_session(line.engine)["handles"] == count
            with stopped(line.engine.pid):
                program.process.kill() if way == "kill" else program.go()
                program.process.wait(10)
        Ends(line.mount, tmp_path / "run").check_nothing_is_open()


def test_more_files_than_can_be_put_aside(tmp_path: Path) -> None:
    """A program that had many files open dies in an outage: others get their errors, and the server its files."""
    count = 4200
    with connected(tmp_path, "timeout=1,threads=2") as line:
        for number in range(count):
            (line.here / str(number)).touch()
        with calling("open_many", line.there, count) as program:
            assert only_session(line.engine)["handles"] == count
            with kernel_queue(line.there, tmp_path / "fusectl") as queue, stopped(line.engine.pid):
                program.process.kill()
                program.process.wait(20)
                wait_until(lambda: int(queue.read_text()) == 0, "the kernel to be rid of all of them")
                with calling("stat", line.there / "absent") as caller:
                    assert caller.go().says() == "EIO"
        wait_until(lambda: only_session(line.engine)["handles"] == 0, "the engine to close them all", 20)


def test_what_was_given_up_leaves_nothing_on_the_server(tmp_path: Path) -> None:
    """The reply to a create is lost; once the mount has said EIO, nobody has that file."""
    with connected(tmp_path, "timeout=1") as line:
        with contextlib.ExitStack() as outage:

            def lose(message: Message) -> Cut:
                outage.enter_context(line.proxy.outage())
                return Cut(0)

            line.proxy.fault = once("reply", "CREATE", lose)
            assert outcome(os.open, line.there / "f", os.O_RDWR | os.O_CREAT) == "EIO"
            assert only_session(line.engine) | {"handles": 1, "nodes": 2} == only_session(line.engine)
        wait_until(lambda: only_session(line.engine)["handles"] == 0, "the file to be closed")
        wait_until(lambda: only_session(line.engine)["nodes"] == 1, "the lookup to be given back")


def test_a_mount_that_ends_as_its_server_is_back_leaves_no_session(tmp_path: Path) -> None:
    """Before it has been found to be back: the next attempt is due some tenths of a second later."""
    with (
        connected(tmp_path, "timeout=1") as line,
        line.proxy.outage(),
        calling("stat", line.there / "absent") as caller,
    ):
        assert caller.go().says() == "EIO"


# ---- a connection over which nothing comes any more


def test_a_channel_that_swallows_everything_is_replaced(tmp_path: Path) -> None:
    """As when a network forgets a connection: there is no error. The request takes effect once, and nobody is told."""
    with connected(tmp_path, "timeout=3") as line:
        old: set[Pair] = set()
        dead, over = threading.Event(), threading.Event()

        def swallow(message: Message) -> None:
            if (message.where, message.operation) == ("request", "MKDIR"):
                dead.set()
            if not dead.is_set():
                old.add(message.pair)
            elif message.pair in old and message.where == "reply":
                over.wait(60)

        line.proxy.fault = swallow
        wait_until(lambda: any(pair.is_event_channel for pair in old), "a PING")
        try:
            os.mkdir(line.there / "d")
            assert line.proxy.count("reply", "MKDIR") == 1
        finally:
            over.set()
        assert os.listdir(line.here) == ["d"]


# ---- beyond the grace time


def test_files_of_a_session_that_has_ended_are_stale(tmp_path: Path) -> None:
    """Never another file, also if it is in the place of the first; names work at once."""
    with connected(tmp_path, "timeout=0", grace_s=1) as line:
        (line.here / "f").write_text("first")
        with (line.there / "f").open("rb", buffering=0) as file:
            with line.proxy.outage():
                wait_until(lambda: not line.engine.figures()["sessions"], "the session's end")
                (line.here / "other").write_text("second")
                os.replace(line.here / "other", line.here / "f")
            assert (line.there / "f").read_text() == "second"
            with pytest.raises(OSError) as caught:
                file.read()
            assert caught.value.errno == errno.ESTALE
