"""`engine --upgrade`: the next engine has everything that was open, and applications notice nothing.

doc/reliability.md, promise 2, over each transport.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, CHECKOUT
from harness.leaks import descriptor_count, environment, thread_count
from harness.waiting import wait_until
from kit import outcome
from lockers import lockers
from pairs import Pair, mounted
from soak.actors import Company, Scene

pytestmark = pytest.mark.root


@pytest.fixture(params=ALL_TRANSPORTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with mounted(tmp_path, request.param) as made:
        yield made
        assert made.engine.figures()["lost_handles"] == 0


# ---- what an engine that died would have lost


def test_files_without_a_name_go_on(pair: Pair) -> None:
    with contextlib.ExitStack() as stack:
        gone = stack.enter_context((pair.there / "gone").open("w+b", buffering=0))
        nameless = os.open(pair.there, os.O_TMPFILE | os.O_RDWR, 0o600)
        stack.callback(os.close, nameless)
        (pair.there / "directory").mkdir()
        directory = os.open(pair.there / "directory", os.O_RDONLY | os.O_DIRECTORY)
        stack.callback(os.close, directory)
        (pair.there / "place").mkdir()
        place = os.open(pair.there / "place", os.O_PATH | os.O_DIRECTORY)
        stack.callback(os.close, place)
        (pair.there / "place").rmdir()
        gone.write(b"before ")
        os.write(nameless, b"before ")
        (pair.there / "gone").unlink()
        (pair.there / "directory").rmdir()
        pair.engine.upgrade()
        gone.write(b"after")
        os.write(nameless, b"after")
        assert os.pread(gone.fileno(), 100, 0) == b"before after"
        assert os.pread(nameless, 100, 0) == b"before after"
        assert os.fstat(gone.fileno()).st_nlink == 0
        assert os.listdir(directory) == []
        assert os.fstatvfs(place).f_blocks > 0, "the engine has a node of it only"
        os.link(f"/proc/self/fd/{nameless}", pair.there / "named", src_dir_fd=directory, follow_symlinks=True)
    assert (pair.here / "named").read_bytes() == b"before after"


def test_a_fifo_keeps_what_was_not_read(pair: Pair) -> None:
    os.mkfifo(pair.here / "fifo")
    with contextlib.ExitStack() as stack:
        writer = os.open(pair.there / "fifo", os.O_RDWR)
        stack.callback(os.close, writer)
        os.write(writer, b"before ")
        pair.engine.upgrade()
        os.write(writer, b"after")
        assert os.read(writer, 100) == b"before after"


def test_a_directory_is_read_to_its_end(pair: Pair) -> None:
    names = {f"{number:05}-a-name-that-takes-some-room" for number in range(5000)}
    for name in names:
        (pair.here / name).touch()
    with os.scandir(pair.there) as entries:
        found = [next(entries).name for _ in range(100)]
        pair.engine.upgrade()
        found += [entry.name for entry in entries]
    assert len(found) == len(names)
    assert set(found) == names


@pytest.mark.parametrize("kind", ["posix", "flock", "ofd"])
def test_locks_are_held_throughout(pair: Pair, kind: str) -> None:
    """A local process that tries all the time does not get one."""
    (pair.here / "f").touch()
    over = threading.Event()
    taken: list[int] = []

    def grab() -> None:
        with (pair.here / "f").open("r+b") as local:
            while not over.is_set():
                with contextlib.suppress(BlockingIOError):
                    if kind == "flock":
                        fcntl.flock(local, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    else:
                        fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, 5)
                    taken.append(1)

    with lockers(pair.there / "f", pair.here / "f", kind=kind) as (there, here):
        assert there.lock(start=0, length=10) == "done"
        thief = threading.Thread(target=grab)
        thief.start()
        try:
            pair.engine.upgrade()
            pair.engine.upgrade()
        finally:
            over.set()
            thief.join()
        assert not taken
        if kind != "flock":
            assert here.lock(start=10, length=5) == "done"
        assert there.unlock() == "done"
        assert here.lock(start=0, length=5) == "done"


# ---- what waits


def test_a_waiting_lock_is_granted_by_the_next_engine(pair: Pair) -> None:
    (pair.here / "f").touch()
    with lockers(pair.there / "f", pair.here / "f") as (there, here):
        assert here.lock() == "done"
        there.wait()
        pair.engine.upgrade()
        assert here.unlock() == "done"
        assert there.says() == "done"


def _begun(action: object, *arguments: object) -> tuple[threading.Thread, list[object]]:
    results: list[object] = []
    thread = threading.Thread(target=lambda: results.append(outcome(action, *arguments)))  # type: ignore[arg-type]
    thread.start()
    return thread, results


def test_a_waiting_read_gets_what_comes(pair: Pair) -> None:
    os.mkfifo(pair.here / "fifo")
    fifo = os.open(pair.there / "fifo", os.O_RDWR)
    try:
        reader, results = _begun(os.read, fifo, 100)
        wait_until(lambda: pair.engine.figures()["requests"].get("READ", 0) >= 2, "the reader to wait")
        pair.engine.upgrade()
        with open(pair.here / "fifo", "wb", buffering=0) as local:
            local.write(b"here it is")
        reader.join(10)
        assert results == [b"here it is"]
    finally:
        os.close(fifo)


def test_a_write_that_is_half_done_goes_on(pair: Pair) -> None:
    """What does not fit into a FIFO waits; each byte of it arrives once."""
    os.mkfifo(pair.here / "fifo")
    data = os.urandom(300_000)
    fifo = os.open(pair.there / "fifo", os.O_RDWR)
    local = os.open(pair.here / "fifo", os.O_RDONLY | os.O_NONBLOCK)
    try:
        writer, results = _begun(os.write, fifo, data)
        wait_until(lambda: pair.engine.figures()["requests"].get("WRITE", 0) >= 2, "the writer to wait")
        found = os.read(local, 10_000)
        pair.engine.upgrade()
        pair.engine.upgrade()
        readable = select.poll()
        readable.register(local, select.POLLIN)
        while len(found) < len(data) and readable.poll(10_000) and (more := os.read(local, len(data))):
            found += more
        writer.join(10)
        assert results == [len(data)]
        assert found == data
    finally:
        os.close(local)
        os.close(fifo)


def test_an_open_that_waits_finds_its_partner(pair: Pair) -> None:
    os.mkfifo(pair.here / "fifo")
    opener, results = _begun(os.open, pair.there / "fifo", os.O_RDONLY)
    wait_until(lambda: pair.engine.figures()["requests"].get("OPEN", 0) >= 2, "the open to wait")
    pair.engine.upgrade()
    with open(pair.here / "fifo", "wb", buffering=0) as local:
        opener.join(10)
        local.write(b"found")
    [fifo] = results
    assert isinstance(fifo, int)
    assert os.read(fifo, 10) == b"found"
    os.close(fifo)


def test_who_polls_is_woken(pair: Pair) -> None:
    os.mkfifo(pair.here / "fifo")
    fifo = os.open(pair.there / "fifo", os.O_RDWR)
    try:
        poller = select.poll()
        poller.register(fifo, select.POLLIN)
        assert not poller.poll(0)
        pair.engine.upgrade()
        with open(pair.here / "fifo", "wb", buffering=0) as local:
            local.write(b"x")
            assert poller.poll(10_000)
    finally:
        os.close(fifo)


def test_many_files_without_a_name(pair: Pair) -> None:
    """Many batches, and descriptors beyond what select(2) knows."""
    files = []
    try:
        for number in range(600):
            files.append(os.open(pair.there / "f", os.O_CREAT | os.O_RDWR))
            os.write(files[-1], b"%d" % number)
            (pair.there / "f").unlink()
        pair.engine.upgrade()
        assert [int(os.pread(file, 10, 0)) for file in files] == list(range(600))
    finally:
        for file in files:
            os.close(file)
    pair.engine.upgrade()
    _still_serves(pair, pair.engine.pid)


# ---- under load, again and again


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_nobody_at_work_notices(tmp_path: Path, transport: str) -> None:
    """The checker of the soak test, files without a name included, while one engine follows the other."""
    with mounted(tmp_path, transport) as pair:
        company = Company(pair.there, pair.here, 3)
        over = threading.Event()
        failures: list[BaseException] = []
        upgrades: list[int] = []

        def upgrade() -> None:
            try:
                while not over.is_set():
                    pair.engine.upgrade()
                    upgrades.append(1)
            except BaseException as error:
                failures.append(error)

        thread = threading.Thread(target=upgrade)

        def end() -> None:
            over.set()
            thread.join()

        with company.running():
            try:
                company.play(Scene(seed=1, calls=1500), begun=thread.start, ended=end)
            finally:
                over.set()
        assert not failures
        assert len(upgrades) >= 3
        assert pair.engine.figures()["lost_handles"] == 0
        assert sum(company.calls.values()) > 0


def test_engines_leave_nothing_behind(pair: Pair) -> None:
    """Each has as many descriptors, threads and files as the one before it."""
    os.mkfifo(pair.here / "fifo")
    counts = []
    with (pair.there / "f").open("w+b", buffering=0) as file, (pair.there / "g").open("xb") as other:
        fifo = os.open(pair.there / "fifo", os.O_RDWR)
        fcntl.lockf(other, fcntl.LOCK_EX)
        (pair.there / "f").unlink()
        for number in range(6):
            pair.engine.upgrade()
            assert file.write(b"%d" % number) == 1
            os.listdir(pair.there)
            wait_until(lambda: pair.engine.figures()["sessions"][0]["event_channel"], "the client to be back")
            names = sorted(os.listdir(pair.engine.run_dir))
            wait_until(lambda: len(_openings(pair)) == 0, "openers to end")
            counts.append((_settled(pair), thread_count(pair.engine.pid), names))
        os.close(fifo)
    # One more for whoever reads the mount table, or closes something, at that moment.
    assert all(later <= counts[0][0] + 1 for later, _, _ in counts)
    assert [others for _, *others in counts[1:]] == [[*counts[0][1:]]] * 5


def _openings(pair: Pair) -> list[str]:
    tasks = Path(f"/proc/{pair.engine.pid}/task")
    return [task.name for task in tasks.iterdir() if (task / "comm").read_text() == "opener"]


def _settled(pair: Pair) -> int:
    """Descriptors of the engine, but for its connections: the client makes those anew as it needs them."""
    return descriptor_count(pair.engine.pid) - int(pair.engine.figures()["connections"])


# ---- what comes to nothing


def _still_serves(pair: Pair, pid: int) -> None:
    assert pair.engine.pid == pid
    (pair.there / "served").write_bytes(b"yes")
    assert (pair.here / "served").read_bytes() == b"yes"


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("handover.layout_number = lambda: 1", "the engine that runs refuses: what version .* keeps"),
        ("handover._OWN_DESCRIPTORS = 1 << 30", "descriptors are needed"),
        ("handover.address_name = lambda address: 'unix:///elsewhere'", "this engine listens at"),
    ],
    ids=["layout", "descriptors", "address"],
)
def test_a_refused_upgrade_changes_nothing(tmp_path: Path, script: str, message: str) -> None:
    with mounted(tmp_path, "unix") as pair:
        pid = pair.engine.pid
        with (pair.there / "f").open("w+b", buffering=0) as file:
            (pair.there / "f").unlink()
            with pytest.raises(AssertionError, match=rf"(?s)did not start \(1\):\n.*engine: .*{message}"):
                pair.engine.upgrade(script)
            file.write(b"x")
            _still_serves(pair, pid)


def _with_pid_file(path: Path) -> str:
    return f"import sys; sys.argv += ['--pid-file', {str(path)!r}]"


def test_a_pid_file_that_cannot_be_opened_is_noticed_in_time(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix") as pair:
        pid = pair.engine.pid
        with pytest.raises(AssertionError, match=r"(?s)did not start \(1\):\n.*engine: pid file .*missing/pid: No"):
            pair.engine.upgrade(_with_pid_file(tmp_path / "missing" / "pid"))
        _still_serves(pair, pid)


def test_a_refused_upgrade_leaves_pid_files_alone(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix") as pair:
        old, new = tmp_path / "old", tmp_path / "new"
        old.write_text("1\n")
        for path in (old, new):
            with pytest.raises(AssertionError, match="descriptors are needed"):
                pair.engine.upgrade(f"handover._OWN_DESCRIPTORS = 1 << 30; {_with_pid_file(path)}")
        assert old.read_text() == "1\n" and not new.exists()


def test_no_room_for_the_pid_does_not_end_the_new_engine(tmp_path: Path) -> None:
    """By then it is the only one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4k", "none", disk], check=True)
    try:
        (disk / "full").write_bytes(b"x")
        with mounted(tmp_path, "unix") as pair:
            pair.engine.expect_log("pid file .*disk/pid: No space left")
            pair.engine.upgrade(_with_pid_file(disk / "pid"))
            _still_serves(pair, pair.engine.pid)
        assert not (disk / "pid").exists()
    finally:
        subprocess.run(["umount", disk], check=True)


_KILL_OURSELVES = "os.kill(os.getpid(), signal.SIGKILL)"


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize(
    "script",
    [
        f"handover._place = lambda *unused: {_KILL_OURSELVES}",
        f"handover.Takeover.confirm = lambda *unused: {_KILL_OURSELVES}",
    ],
    ids=["in the middle", "before it has confirmed"],
)
def test_the_new_engine_is_killed(tmp_path: Path, transport: str, script: str) -> None:
    """The old one goes on as if nothing had happened, with what waits as well."""
    with mounted(tmp_path, transport) as pair, contextlib.ExitStack() as stack:
        os.mkfifo(pair.here / "fifo")
        os.mkfifo(pair.here / "lonely")
        pid = pair.engine.pid
        file = stack.enter_context((pair.there / "f").open("w+b", buffering=0))
        (pair.there / "f").unlink()
        fifo = os.open(pair.there / "fifo", os.O_RDWR)
        stack.callback(os.close, fifo)
        reader, read = _begun(os.read, fifo, 100)
        opener, opened = _begun(os.open, pair.there / "lonely", os.O_RDONLY)
        wait_until(lambda: pair.engine.figures()["requests"].get("OPEN", 0) >= 3, "the open to wait")
        opens = pair.engine.figures()["requests"]["OPEN"]
        for _ in range(3):
            with pytest.raises(AssertionError, match=r"did not start \(-9\)"):
                pair.engine.upgrade(script)
        assert pair.engine.figures()["requests"]["OPEN"] == opens, "nobody had to ask again"
        file.write(b"x")
        _still_serves(pair, pid)
        (pair.here / "fifo").write_bytes(b"here")
        reader.join(10)
        assert read == [b"here"]
        with open(pair.here / "lonely", "wb", buffering=0):
            opener.join(10)
        [descriptor] = opened
        assert isinstance(descriptor, int)
        os.close(descriptor)
        # One that is not killed succeeds then.
        pair.engine.upgrade()
        file.write(b"y")
        assert os.pread(file.fileno(), 10, 0) == b"xy"


def test_the_new_engine_is_killed_when_all_is_its_own(pair: Pair) -> None:
    """That is a crash: what has a name goes on."""
    with (pair.there / "f").open("xb", buffering=0) as file:
        file.write(b"one ")
        with pytest.raises(AssertionError, match=r"did not start \(-9\)"):
            pair.engine.upgrade(f"cli.run.__globals__['listening'] = lambda *unused: {_KILL_OURSELVES}")
        pair.engine.kill()
        pair.engine.start()
        file.write(b"two")
    assert (pair.here / "f").read_bytes() == b"one two"


def test_the_old_engine_is_killed(pair: Pair) -> None:
    """So is that, and the new one says that it has nothing."""
    script = """
confirm = handover.Takeover.confirm
def kill_and_confirm(self):
    os.kill(self._talk.peer()[0], signal.SIGKILL)
    confirm(self)
handover.Takeover.confirm = kill_and_confirm
"""
    with (pair.there / "f").open("xb", buffering=0) as file:
        file.write(b"one ")
        with pytest.raises(AssertionError, match=r"(?s)did not start \(1\):.*engine: the engine that ran has died"):
            pair.engine.upgrade(script)
        pair.engine.kill()
        pair.engine.start()
        file.write(b"two")
    assert (pair.here / "f").read_bytes() == b"one two"


def test_no_engine_to_take_over_from(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix") as pair:
        pair.engine.stop()
        command = [*pair.engine.command(), "--upgrade"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20,
                              env=environment(PYTHONPATH=str(CHECKOUT)))
        assert done.returncode == 1
        assert "runs here: start one without --upgrade" in done.stderr
        pair.engine.start()


_AS_NOBODY = """
import json, os, socket, sys
directory = os.open(sys.argv[1], os.O_PATH)
os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
sock.connect(f"/proc/self/fd/{directory}/{sys.argv[2]}")
sock.send(json.dumps({"upgrade": 1}).encode())
print(sock.recv(65536).decode())
"""


def test_another_user_gets_nothing(tmp_path: Path) -> None:
    """Even if somebody opened the run directory and the socket to him."""
    with mounted(tmp_path, "unix") as pair:
        [path] = pair.engine.run_dir.glob("upgrade-*.sock")
        assert path.stat().st_mode & 0o777 == 0o600
        path.chmod(0o666)
        pair.engine.run_dir.chmod(0o711)
        command = [sys.executable, "-c", _AS_NOBODY, pair.engine.run_dir, path.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
        assert "user 65534 may not have" in done.stdout
        _still_serves(pair, pair.engine.pid)
