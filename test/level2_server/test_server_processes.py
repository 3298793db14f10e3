"""KILL, SETAFFINITY, GETAFFINITY, PROCESSES: who can be reached, and that nobody else ever is."""

from __future__ import annotations

import errno
import os
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from harness.engine_process import EngineProcess, everything_below
from harness.errands import Process, get_affinity, kill, processes, set_affinity
from harness.leaks import environment
from harness.session import Session
from harness.waiting import wait_until
from harness.wire import ADMIN, NOBODY, Who

from qtfs_common.whitelist import Type

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="other users' processes are for root")

#: A command whose name fits, and one of which the kernel keeps 15 bytes.
NAME, LONG_NAME = "qtfs-victim", "qtfs-victim-with-a-long-name"


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    area = tmp_path_factory.mktemp("processes")
    rules = everything_below(area / "share") | {Type.KILL: [NAME, LONG_NAME, "python3"]}
    with EngineProcess(area, rules=rules).running() as engine:
        yield engine


@pytest.fixture
def asking(own: EngineProcess) -> Iterator[Session]:
    with Session(own.address, own.share) as session:
        yield session


@contextmanager
def victim(directory: Path, name: str = NAME, who: Who = ADMIN) -> Iterator[subprocess.Popen[bytes]]:
    """A process that sleeps under a name."""
    program = directory / name
    program.write_bytes(Path("/bin/sleep").read_bytes())
    program.chmod(0o755)
    directory.chmod(0o755)
    with subprocess.Popen([program, "1000"], env=environment(), user=who.uid, group=who.gid) as process:
        try:
            wait_until(lambda: Path(f"/proc/{process.pid}/comm").read_text().strip() == name[:15], "its name")
            yield process
        finally:
            process.kill()


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory that other users can reach."""
    path = Path(f"/tmp/qtfs-victims-{os.getpid()}")
    path.mkdir()
    yield path
    for file in path.iterdir():
        file.unlink()
    path.rmdir()


@contextmanager
def refused(number: int) -> Iterator[None]:
    with pytest.raises(OSError) as raised:
        yield
    assert raised.value.errno == number, raised.value


def entry(session: Session, pid: int) -> Process | None:
    return next((process for process in processes(session, pid - 1) if process.pid == pid), None)


@pytest.mark.parametrize("name", [NAME, LONG_NAME])
def test_a_signal(asking: Session, directory: Path, name: str) -> None:
    with victim(directory, name) as process:
        kill(asking, process.pid, 0)
        assert process.poll() is None
        kill(asking, process.pid, signal.SIGTERM)
        assert process.wait(10) == -signal.SIGTERM
        with refused(errno.ESRCH):
            kill(asking, process.pid, 0)


def test_a_zombie_is_there_until_it_is_reaped(asking: Session, directory: Path) -> None:
    with victim(directory) as process:
        kill(asking, process.pid, signal.SIGKILL)
        wait_until(lambda: (found := entry(asking, process.pid)) is not None and found.state == "Z", "the zombie")


@pytest.mark.parametrize("pid", [0, -1, -2, -(1 << 31)])
def test_groups_and_everybody_are_refused(asking: Session, pid: int) -> None:
    with refused(errno.EINVAL):
        kill(asking, pid, 0)
    with refused(errno.EINVAL):
        set_affinity(asking, pid, {0})
    with refused(errno.EINVAL):
        get_affinity(asking, pid)


@pytest.mark.parametrize("number", [65, 100, 1 << 31, 0xFFFFFFFF])
def test_no_such_signal(asking: Session, directory: Path, number: int) -> None:
    with victim(directory) as process, refused(errno.EINVAL):
        kill(asking, process.pid, number)


def test_what_is_not_listed(asking: Session, own: EngineProcess, directory: Path) -> None:
    assert own.process is not None
    with victim(directory, "qtfs-other") as other:
        for pid in (1, other.pid):
            for attempt in (
                lambda pid=pid: kill(asking, pid, 0),
                lambda pid=pid: set_affinity(asking, pid, {0}),
                lambda pid=pid: get_affinity(asking, pid),
            ):
                with refused(errno.EPERM):
                    attempt()
            assert entry(asking, pid) is None
        assert other.poll() is None
    assert own.figures()["denials"]["KILL"] >= 6


def test_a_reload_holds_at_once(own: EngineProcess, asking: Session, directory: Path) -> None:
    before = own.whitelist.read_text()
    with victim(directory) as process:
        kill(asking, process.pid, 0)
        own.reload(everything_below(own.share))
        with refused(errno.EPERM):
            kill(asking, process.pid, 0)
        assert processes(asking) == []
    own.reload(everything_below(own.share) | {Type.KILL: [NAME, LONG_NAME, "python3"]})
    assert own.whitelist.read_text() == before


def test_another_process_with_the_number_is_not_meant(asking: Session, directory: Path) -> None:
    """`start` tells processes apart that have had one pid."""
    with victim(directory) as process:
        found = entry(asking, process.pid)
        assert found is not None
        for wrong in (found.start - 1, found.start + 1, 1):
            with refused(errno.ESRCH):
                kill(asking, process.pid, signal.SIGKILL, wrong)
            with refused(errno.ESRCH):
                set_affinity(asking, process.pid, {0}, wrong)
        assert process.poll() is None
        kill(asking, process.pid, signal.SIGKILL, found.start)
        assert process.wait(10) == -signal.SIGKILL


def test_a_number_that_was_given_out_again(asking: Session, directory: Path) -> None:
    """A process of the same name gets the very pid: who means the first one does not reach the second."""
    # Somebody else may be given it in the meantime, and keep it.
    assert any(_is_given_out_again(asking, directory) for _ in range(10)), "the pid could not be had again"


def _is_given_out_again(asking: Session, directory: Path) -> bool:
    with victim(directory) as first:
        found = entry(asking, first.pid)
        assert found is not None
        first.kill()
        first.wait()
    time.sleep(2 / os.sysconf("SC_CLK_TCK"))  # so that the second begins in another tick
    for _ in range(10):
        Path("/proc/sys/kernel/ns_last_pid").write_text(str(found.pid - 1))
        with victim(directory) as second:
            if second.pid != found.pid:
                continue
            with refused(errno.ESRCH):
                kill(asking, found.pid, signal.SIGKILL, found.start)
            with refused(errno.ESRCH):
                set_affinity(asking, found.pid, {0}, found.start)
            assert second.poll() is None
            return True
    return False


def test_kill_while_processes_come_and_go(asking: Session, directory: Path) -> None:
    """Signals to a pid that is given out over and over reach listed processes only."""
    last = Path("/proc/sys/kernel/ns_last_pid")
    with victim(directory) as process:
        pid = process.pid
    stop = threading.Event()
    killed = []

    def spawn() -> None:
        while not stop.is_set():
            last.write_text(str(pid - 1))
            with subprocess.Popen(["/bin/sleep", "0.01"]) as bystander:
                killed.append(bystander.wait())

    thread = threading.Thread(target=spawn)
    thread.start()
    try:
        outcomes = {asking.ask("KILL", struct.pack("<iIQ", pid, signal.SIGKILL, 0)).error for _ in range(500)}
    finally:
        stop.set()
        thread.join()
    assert errno.EPERM in outcomes and outcomes <= {errno.ESRCH, errno.EPERM}
    assert set(killed) == {0}


def test_whom_other_users_may_signal(asking: Session, directory: Path) -> None:
    with victim(directory) as of_root, victim(directory, LONG_NAME, NOBODY) as of_nobody:
        with refused(errno.EPERM):
            kill(asking, of_root.pid, signal.SIGKILL, who=NOBODY)
        with refused(errno.EPERM):
            set_affinity(asking, of_root.pid, {0}, who=NOBODY)
        with refused(errno.EPERM):
            kill(asking, of_nobody.pid, signal.SIGKILL, who=Who(1000, 1000))
        set_affinity(asking, of_nobody.pid, {0}, who=NOBODY)
        kill(asking, of_nobody.pid, signal.SIGTERM, who=NOBODY)
        assert of_nobody.wait(10) == -signal.SIGTERM and of_root.poll() is None


def test_affinity(asking: Session, directory: Path) -> None:
    with victim(directory) as process:
        everywhere = os.sched_getaffinity(process.pid)
        assert get_affinity(asking, process.pid) == everywhere
        one = min(everywhere)
        set_affinity(asking, process.pid, {one})
        assert os.sched_getaffinity(process.pid) == get_affinity(asking, process.pid) == {one}
        with refused(errno.EINVAL):
            set_affinity(asking, process.pid, set())
        with refused(errno.EINVAL):
            set_affinity(asking, process.pid, {63})


_THREADED = """
import threading, time
thread = threading.Thread(target=time.sleep, args=(1000,), daemon=True)
thread.start()
open(f"/proc/self/task/{thread.native_id}/comm", "w").write("another-name")
print(thread.native_id, flush=True)
thread.join()
"""


def test_a_thread_goes_by_its_process(asking: Session) -> None:
    """As libvirt binds virtual processors: by thread ids, whose threads have names of their own."""
    command = ["python3", "-c", _THREADED]
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment()) as process:
        try:
            assert process.stdout is not None
            thread = int(process.stdout.readline())
            comm = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: comm.read_text() == "python3\n", "its name")
            everywhere = os.sched_getaffinity(process.pid)
            set_affinity(asking, thread, {min(everywhere)})
            assert os.sched_getaffinity(thread) == get_affinity(asking, thread) == {min(everywhere)}
            assert os.sched_getaffinity(process.pid) == everywhere
            with refused(errno.ESRCH):
                kill(asking, thread, 0)
        finally:
            process.kill()


def test_the_list(asking: Session, directory: Path) -> None:
    with victim(directory) as first, victim(directory, LONG_NAME, NOBODY) as second:
        found = {process.pid: process for process in processes(asking)}
        assert list(found) == sorted(found)
        one, two = found[first.pid], found[second.pid]
        assert (one.name, one.parent, one.uid, one.state) == (NAME.encode(), os.getpid(), 0, "S")
        assert (two.name, two.uid) == (LONG_NAME[:15].encode(), NOBODY.uid)
        stat = Path(f"/proc/{first.pid}/stat").read_text()
        assert one.start == int(stat.rpartition(")")[2].split()[19])
        assert abs(one.started_s - time.time()) < 60
        assert all(process.name in (NAME.encode(), LONG_NAME[:15].encode(), b"python3") for process in found.values())


def test_the_list_in_pages(asking: Session, directory: Path) -> None:
    with victim(directory) as first, victim(directory, LONG_NAME) as second:
        wanted = [process.pid for process in processes(asking)]
        assert {first.pid, second.pid} <= set(wanted)
        paged: list[int] = []
        while page := processes(asking, paged[-1] if paged else 0, 60):
            assert len(page) == 1
            paged += [process.pid for process in page]
        assert paged == wanted
        for size in (0, 40, (1 << 20) + 1):
            with refused(errno.EINVAL):
                processes(asking, 0, size)
