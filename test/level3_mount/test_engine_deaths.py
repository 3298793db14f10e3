"""An engine that is killed and started again: open files, directories, locks and requests under way go on.

doc/reliability.md, promise 2, over each transport.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import select
import signal
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import IOBase
from pathlib import Path
from typing import BinaryIO

import pytest
from disks import ext4, tmpfs
from harness.distant_engine import DistantEngine
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS
from harness.kernel_caches import drops
from harness.leaks import descriptors, environment
from harness.waiting import wait_until
from kit import linkat_fd, outcome, renameat2
from lockers import lockers
from pairs import Pair, mounted

from qtfs_client.drivers.apart import place_of

pytestmark = pytest.mark.root

RENAME_NOREPLACE, RENAME_EXCHANGE = 1, 2


@pytest.fixture(params=ALL_TRANSPORTS)
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Pair]:
    with mounted(tmp_path, request.param) as made:
        yield made


# ---- what stays


def test_open_files_go_on(pair: Pair) -> None:
    (pair.here / "read").write_bytes(b"0123456789")
    (pair.here / "log").write_bytes(b"first\n")
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context((pair.there / "read").open("rb", buffering=0))
        writer = stack.enter_context((pair.there / "new").open("xb", buffering=0))
        log = stack.enter_context((pair.there / "log").open("ab", buffering=0))
        assert reader.read(4) == b"0123"
        writer.write(b"before ")
        log.write(b"before\n")
        pair.replace_engine()
        assert reader.read(6) == b"456789"
        writer.write(b"after")
        log.write(b"after\n")
        os.fsync(writer.fileno())
        assert os.fstat(writer.fileno()).st_size == 12
    assert (pair.here / "new").read_bytes() == b"before after"
    assert (pair.here / "log").read_bytes() == b"first\nbefore\nafter\n"


def test_a_file_goes_on_under_another_name_and_without_permission(pair: Pair) -> None:
    with (pair.there / "old").open("xb", buffering=0) as file:
        file.write(b"one ")
        (pair.there / "old").rename(pair.there / "new")
        (pair.there / "new").chmod(0)
        pair.replace_engine()
        file.write(b"two")
    assert (pair.here / "new").read_bytes() == b"one two"


def test_the_kernel_keeps_what_it_knows(pair: Pair) -> None:
    """Names that were looked up before lead to the same nodes: a working directory, and files below it."""
    deep = pair.there / "a" / "b" / "c"
    deep.mkdir(parents=True)
    (deep / "f").write_text("here")
    ino = (deep / "f").stat().st_ino
    directory = os.open(deep, os.O_RDONLY | os.O_DIRECTORY)
    try:
        pair.replace_engine()
        assert os.stat("f", dir_fd=directory).st_ino == ino
        with open("g", "x", opener=lambda name, flags: os.open(name, flags, dir_fd=directory)) as made:
            made.write("there")
    finally:
        os.close(directory)
    assert (pair.here / "a/b/c/g").read_text() == "there"


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_what_the_kernel_has_cached_stays_and_what_changed_meanwhile_is_told(tmp_path: Path, transport: str) -> None:
    """Shown by what both ends count: reads that come to the engine, and notices to the kernel."""
    with mounted(tmp_path, transport, f"cache=auto,run_dir={tmp_path}/run") as pair:
        ends = Ends(pair.mount, tmp_path / "run")
        for name in ("same", "changed"):
            (pair.here / name).write_text("old")
        dropped = drops()
        with (pair.there / "same").open("rb", buffering=0) as same, (pair.there / "changed").open("rb") as changed:
            assert (same.read(), changed.read()) == (b"old", b"old")
            before = ends.client
            pair.engine.kill()
            (pair.here / "changed").write_text("newer")
            pair.engine.start()
            assert os.pread(same.fileno(), 3, 0) == b"old"
            assert pair.engine.figures()["requests"].get("READ", 0) == 0 or drops() != dropped
            assert (pair.there / "changed").read_text() == "newer"
            assert ends.client["invalidations"] > before["invalidations"]
            assert ends.client["begun_anew"] == 0
        ends.check_nothing_is_open()


def test_a_directory_is_read_to_its_end(pair: Pair) -> None:
    names = {f"{number:05}-a-name-that-takes-some-room" for number in range(5000)}
    for name in names:
        (pair.here / name).touch()
    with os.scandir(pair.there) as entries:
        found = [next(entries).name for _ in range(100)]
        pair.replace_engine()
        found += [entry.name for entry in entries]
    assert len(found) == len(names)
    assert set(found) == names


@pytest.mark.parametrize("kind", ["posix", "flock"])
def test_locks_are_held_again(pair: Pair, kind: str) -> None:
    (pair.here / "f").touch()
    with lockers(pair.there / "f", pair.here / "f", kind=kind) as (there, here):
        assert there.lock(start=0, length=10) == "done"
        pair.replace_engine()
        assert here.lock(start=5, length=1) == "EAGAIN"
        if kind == "posix":
            assert here.lock(start=10, length=5) == "done"
        assert there.unlock() == "done"
        assert here.lock(start=0, length=5) == "done"


def test_a_lock_that_somebody_else_took_meanwhile_is_an_error(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix") as pair:
        (pair.here / "f").touch()
        (pair.here / "other").touch()
        with (pair.there / "f").open("r+b", buffering=0) as file, (pair.there / "other").open("r+b") as other:
            fcntl.lockf(file, fcntl.LOCK_EX)
            pair.engine.kill()
            with (pair.here / "f").open("r+b") as local:
                fcntl.lockf(local, fcntl.LOCK_EX | fcntl.LOCK_NB)
                pair.engine.start()
                assert outcome(os.pwrite, file.fileno(), b"mine?", 0) == "EIO"
                assert outcome(os.pwrite, other.fileno(), b"fine", 0) == 4


def test_a_waiting_lock_is_granted_by_the_next_engine(pair: Pair) -> None:
    (pair.here / "f").touch()
    with lockers(pair.there / "f", pair.here / "f") as (there, here):
        assert here.lock() == "done"
        there.wait()
        pair.replace_engine()
        assert here.unlock() == "done"
        assert there.says() == "done"


def test_only_what_has_no_name_is_lost(pair: Pair) -> None:
    (pair.here / "kept").write_bytes(b"kept")
    os.mkfifo(pair.here / "fifo")
    with contextlib.ExitStack() as stack:
        gone = stack.enter_context((pair.there / "gone").open("w+b", buffering=0))
        kept = stack.enter_context((pair.there / "kept").open("r+b", buffering=0))
        fifo = os.open(pair.there / "fifo", os.O_RDWR | os.O_NONBLOCK)
        stack.callback(os.close, fifo)
        os.unlink(pair.there / "gone")
        pair.replace_engine()
        assert outcome(os.write, gone.fileno(), b"x") in ("EIO", "ESTALE")
        assert outcome(os.write, fifo, b"x") == "EIO"
        assert outcome(os.pread, kept.fileno(), 10, 0) == b"kept"
    assert pair.engine.figures()["lost_handles"] >= 1


def test_who_polls_is_woken(pair: Pair) -> None:
    """cgroup.events would do as well: a file that the kernel makes up, which epoll(7) waits for across the death."""
    (pair.here / "proc").mkdir()
    subprocess.run(["mount", "-t", "proc", "proc", pair.here / "proc"], check=True)
    try:
        with (pair.there / "proc/self/mounts").open("rb", buffering=0) as mounts:
            poller = select.poll()
            poller.register(mounts, select.POLLPRI | select.POLLERR)
            poller.poll(0)
            pair.replace_engine()
            (pair.here / "more").mkdir()
            subprocess.run(["mount", "-t", "tmpfs", "none", pair.here / "more"], check=True)
            assert poller.poll(10_000)
    finally:
        for name in ("proc", "more"):
            subprocess.run(["umount", "-l", pair.here / name], check=False, capture_output=True)


def test_a_second_death_changes_nothing(pair: Pair) -> None:
    with (pair.there / "f").open("xb", buffering=0) as file:
        fcntl.lockf(file, fcntl.LOCK_EX)
        for number in range(4):
            file.write(b"%d" % number)
            pair.replace_engine()
        with (pair.here / "f").open("rb+") as local:
            assert outcome(fcntl.lockf, local, fcntl.LOCK_EX | fcntl.LOCK_NB) == "EAGAIN"
    assert (pair.here / "f").read_bytes() == b"0123"


def test_sigterm_and_start_lose_nothing_either(pair: Pair) -> None:
    with (pair.there / "f").open("xb", buffering=0) as file:
        file.write(b"one ")
        pair.engine.stop()
        pair.engine.start()
        file.write(b"two")
    assert (pair.here / "f").read_bytes() == b"one two"


# ---- what is under way: killed inside the system call, after its effect


#: For strace(1): the call is held when it has had its effect, or before it.
AFTER, BEFORE = "delay_exit=60000000", "delay_enter=60000000"


@dataclass(frozen=True)
class Deed:
    """Something that is not to be done twice, and the system call in which the engine is killed."""

    name: str
    call: str
    begin: Callable[[Path], object]
    do: Callable[[Path], object]
    expected: object
    when: str = AFTER
    look: Callable[[Path], object] = lambda where: sorted(os.listdir(where))


def _append(where: Path) -> int:
    with (where / "f").open("ab", buffering=0) as file:
        return file.write(b"once")


def _contents(where: Path) -> bytes:
    return (where / "f").read_bytes()


def _exclusive(where: Path) -> None:
    os.close(os.open(where / "new", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o400))


def _nothing(where: Path) -> None:
    del where


def _touch(where: Path) -> None:
    (where / "f").touch()


def _allocate(where: Path) -> None:
    with (where / "f").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, 5000)


DEEDS = [
    Deed("mkdir", "mkdirat", _nothing, lambda d: (d / "new").mkdir(), ["new"]),
    Deed("rmdir", "unlinkat", lambda d: (d / "f").mkdir(), lambda d: (d / "f").rmdir(), []),
    Deed("unlink", "unlinkat", _touch, lambda d: (d / "f").unlink(), []),
    Deed("rename", "renameat", _touch, lambda d: os.rename(d / "f", d / "g"), ["g"]),
    Deed("link", "linkat", _touch, lambda d: os.link(d / "f", d / "g"), ["f", "g"]),
    Deed("symlink", "symlinkat", _nothing, lambda d: (d / "new").symlink_to("f"), ["new"]),
    Deed("mkfifo", "mknodat", _nothing, lambda d: os.mkfifo(d / "new"), ["new"]),
    Deed("create", "umask", _nothing, _exclusive, ["new"], when=f"{BEFORE}:when=2"),
    Deed("append", "pwritev2", lambda d: (d / "f").write_bytes(b"first "), _append, b"first once", look=_contents),
    Deed("setxattr", "setxattr", _touch, lambda d: os.setxattr(d / "f", "user.a", b"b", os.XATTR_CREATE), b"b",
         look=lambda d: os.getxattr(d / "f", "user.a")),
    # Not FALLOC_FL_COLLAPSE_RANGE and the like, which are not the same if done twice: the kernel's FUSE refuses them.
    Deed("fallocate", "fallocate", _touch, _allocate, 5000, look=lambda d: (d / "f").stat().st_size),
]


@contextlib.contextmanager
def delayed(engine: DistantEngine, *injections: tuple[str, str]) -> Iterator[None]:
    """The engine's system calls take a minute, before their effect or after it: pairs of a name and AFTER or BEFORE."""
    words = [word for call, when in injections for word in ("-e", f"inject={call}:{when}")]
    calls = ",".join(call for call, _ in injections)
    tracer = subprocess.Popen(
        ["strace", "-f", "-q", "-p", str(engine.pid), "-e", f"trace={calls}", *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment(),
    )
    try:
        tasks = Path(f"/proc/{engine.pid}/task")
        wait_until(lambda: all(_is_traced(task) for task in tasks.iterdir()), "strace to hold every thread")
        yield
    finally:
        tracer.kill()
        tracer.wait()


def _is_traced(task: Path) -> bool:
    return "TracerPid:\t0\n" not in (task / "status").read_text()


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize("deed", DEEDS, ids=lambda deed: deed.name)
def test_killed_after_the_effect_and_before_the_reply(tmp_path: Path, deed: Deed, transport: str) -> None:
    with mounted(tmp_path, transport, f"cache=none,run_dir={tmp_path}/run") as pair:
        deed.begin(pair.here)
        os.listdir(pair.there)
        result: list[object] = []
        before = outcome(deed.look, pair.here)
        doer = threading.Thread(target=lambda: result.append(outcome(deed.do, pair.there)))
        with delayed(pair.engine, (deed.call, deed.when)):
            doer.start()
            wait_until(lambda: outcome(deed.look, pair.here) != before, "the effect")
            os.kill(pair.engine.pid, signal.SIGKILL)
        assert not result
        pair.replace_engine()
        doer.join(20)
        assert result == [4 if deed.name == "append" else None]
        assert deed.look(pair.here) == deed.expected
        assert pair.engine.figures()["continued"] == 1
        Ends(pair.mount, tmp_path / "run").check_nothing_is_open()


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_killed_after_a_file_without_a_name_was_made(tmp_path: Path, transport: str) -> None:
    """It ends with the engine. Who asked for it gets another one, which is as good."""
    with mounted(tmp_path, transport, f"cache=none,run_dir={tmp_path}/run") as pair:
        os.listdir(pair.there)
        made: list[int] = []

        def held() -> set[str]:
            return {path for path in descriptors(pair.engine.pid).values() if path.startswith(f"{pair.here}/#")}

        doer = threading.Thread(target=lambda: made.append(os.open(pair.there, os.O_RDWR | os.O_TMPFILE, 0o600)))
        with delayed(pair.engine, ("umask", f"{BEFORE}:when=2")):
            doer.start()
            wait_until(held, "the effect")
            os.kill(pair.engine.pid, signal.SIGKILL)
        assert not made
        pair.replace_engine()
        doer.join(20)
        (fd,) = made
        try:
            assert len(held()) == 1
            os.write(fd, b"text")
            linkat_fd(fd, str(pair.there / "named"))
        finally:
            os.close(fd)
        assert (pair.here / "named").read_bytes() == b"text"
        assert pair.engine.figures()["continued"] == 1
        Ends(pair.mount, tmp_path / "run").check_nothing_is_open()


#: What is not to be done at all has no effect to be known by: the next engine has to come to the same refusal.
UNBEGUN = [
    Deed("mkdir", "mkdirat", _touch, lambda d: (d / "new").mkdir(), None),
    Deed("setxattr", "setxattr", _touch, lambda d: os.setxattr(d / "f", "user.a", b"b", os.XATTR_REPLACE), "ENODATA"),
]


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
@pytest.mark.parametrize("deed", UNBEGUN, ids=lambda deed: deed.name)
def test_killed_before_the_effect(tmp_path: Path, deed: Deed, transport: str) -> None:
    with mounted(tmp_path, transport, "cache=none") as pair:
        deed.begin(pair.here)
        before = deed.look(pair.here)
        result: list[object] = []
        doer = threading.Thread(target=lambda: result.append(outcome(deed.do, pair.there)))
        with delayed(pair.engine, (deed.call, BEFORE)):
            doer.start()
            wait_until(lambda: pair.engine.figures()["requests"].get(deed.name.upper()), "the request")
            os.kill(pair.engine.pid, signal.SIGKILL)
        assert deed.look(pair.here) == before
        pair.replace_engine()
        doer.join(20)
        assert result == [deed.expected]
        assert deed.look(pair.here) == (before if deed.expected else ["f", "new"])


# ---- many calls at once, each in the system call that it is about


def _data(where: Path, name: str = "f") -> None:
    (where / name).write_bytes(name.encode() * 10)


def _both(where: Path) -> list[bytes]:
    return [(where / name).read_bytes() for name in ("f", "g")]


def _two(where: Path) -> None:
    _data(where, "f")
    _data(where, "g")


def _copy(where: Path) -> None:
    """A part, from one file to the middle of the other."""
    with (where / "f").open("rb") as source, (where / "g").open("r+b") as target:
        assert os.copy_file_range(source.fileno(), target.fileno(), 4, 0, 3) == 4


def _copy_within(where: Path) -> None:
    """To the end of the same file: were its length asked for again, there would be more to copy."""
    with (where / "f").open("r+b") as file:
        assert os.copy_file_range(file.fileno(), file.fileno(), 100, 4, 10) == 6


def _lock(where: Path, lock: Callable[[BinaryIO, int], object]) -> BinaryIO:
    """Who asked for it in vain would hear EAGAIN. The lock ends with what is returned."""
    file = (where / "f").open("r+b")
    lock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return file


def _is_locked(where: Path) -> bool:
    """By anybody: /proc/locks."""
    status = (where / "f").stat()
    wanted = f"{os.major(status.st_dev):02x}:{os.minor(status.st_dev):02x}:{status.st_ino}"
    return any(wanted in line.split() for line in Path("/proc/locks").read_text().splitlines())


AT_ONCE = [
    Deed("chmod", "fchmodat", _touch, lambda d: (d / "f").chmod(0o604), 0o100604,
         look=lambda d: (d / "f").stat().st_mode),
    Deed("chown", "fchownat", _touch, lambda d: os.chown(d / "f", 1001, 2001), (1001, 2001),
         look=lambda d: ((d / "f").stat().st_uid, (d / "f").stat().st_gid)),
    Deed("utime", "utimensat", _touch, lambda d: os.utime(d / "f", (1, 2)), 2.0,
         look=lambda d: (d / "f").stat().st_mtime),
    Deed("truncate", "truncate", _data, lambda d: os.truncate(d / "f", 4), b"ffff", look=_contents),
    Deed("setxattr", "setxattr", _touch, lambda d: os.setxattr(d / "f", "user.a", b"b", os.XATTR_CREATE), b"b",
         look=lambda d: os.getxattr(d / "f", "user.a")),
    Deed("removexattr", "removexattr", lambda d: (_touch(d), os.setxattr(d / "f", "user.a", b"b")),
         lambda d: os.removexattr(d / "f", "user.a"), [], look=lambda d: os.listxattr(d / "f")),
    Deed("exchange", "renameat2", _two, lambda d: renameat2(f"{d}/f", f"{d}/g", RENAME_EXCHANGE),
         [b"g" * 10, b"f" * 10], look=_both),
    Deed("noreplace", "renameat2", _touch, lambda d: renameat2(f"{d}/f", f"{d}/g", RENAME_NOREPLACE), ["g"]),
    Deed("copy", "copy_file_range", _two, _copy, [b"f" * 10, b"gggffffggg"], look=_both),
    Deed("copy-within", "copy_file_range", _data, _copy_within, b"f" * 16, look=_contents),
    Deed("lockf", "fcntl", _touch, lambda d: _lock(d, fcntl.lockf), True, look=_is_locked),
    Deed("flock", "flock", _touch, lambda d: _lock(d, fcntl.flock), True, look=_is_locked),
]  # fmt: skip


@dataclass
class UnderWay:
    """AT_ONCE, each in a directory of its own. Half of them are on another file system: of one, eight requests wait at
    most."""

    pair: Pair

    def __post_init__(self) -> None:
        self.places = {deed.name: f"{'ab'[number % 2]}/{deed.name}" for number, deed in enumerate(AT_ONCE)}
        self.results: dict[str, object] = {}
        self._doers = [threading.Thread(target=self._do, args=(deed,)) for deed in AT_ONCE]

    def _do(self, deed: Deed) -> None:
        self.results[deed.name] = outcome(deed.do, self.pair.there / self.places[deed.name])

    def prepare(self) -> None:
        for deed in AT_ONCE:
            where = self.pair.here / self.places[deed.name]
            where.mkdir()
            deed.begin(where)
        self.before = self.look()

    def look(self) -> dict[str, object]:
        return {deed.name: outcome(deed.look, self.pair.here / self.places[deed.name]) for deed in AT_ONCE}

    @property
    def expected(self) -> dict[str, object]:
        return {deed.name: deed.expected for deed in AT_ONCE}

    def begin(self) -> None:
        for doer in self._doers:
            doer.start()

    def have_come(self) -> bool:
        """Whether the engine has begun to execute all of them."""
        asked = self.pair.engine.figures()["requests"]
        wanted = {"SETATTR": 4, "SETXATTR": 1, "REMOVEXATTR": 1, "RENAME": 2, "COPY_FILE_RANGE": 2, "SETLK": 2}
        return all(asked.get(name, 0) >= count for name, count in wanted.items())

    def end(self) -> None:
        for doer in self._doers:
            doer.join(20)

    def let_go(self) -> None:
        """What is locked."""
        for result in self.results.values():
            if isinstance(result, IOBase):
                result.close()


@pytest.mark.parametrize("when", [AFTER, BEFORE], ids=["after", "before"])
@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_killed_in_many_calls_at_once(tmp_path: Path, transport: str, when: str) -> None:
    """After the effect of each and before its reply, or before its effect: all take effect once, and succeed."""
    options = f"cache=none,threads=24,run_dir={tmp_path}/run"
    with mounted(tmp_path, transport, options, workers=24) as pair, tmpfs(pair.here / "b"):
        (pair.here / "a").mkdir()
        calls = UnderWay(pair)
        calls.prepare()
        for place in calls.places.values():
            os.listdir(pair.there / place)
        injections = {(deed.call, when) for deed in AT_ONCE}
        with delayed(pair.engine, *injections):
            calls.begin()
            if when == AFTER:
                wait_until(lambda: calls.look() == calls.expected, "the effects")
            else:
                wait_until(calls.have_come, "the requests")
            os.kill(pair.engine.pid, signal.SIGKILL)
        assert not calls.results
        if when == BEFORE:
            assert calls.look() == calls.before
        pair.replace_engine()
        calls.end()
        assert {name: result for name, result in calls.results.items() if isinstance(result, str)} == {}
        assert calls.results.keys() == calls.expected.keys()
        assert calls.look() == calls.expected
        assert pair.engine.figures()["continued"] == len(AT_ONCE)
        calls.let_go()
        Ends(pair.mount, tmp_path / "run").check_nothing_is_open()


# ---- limits


def test_after_the_grace_time_a_session_begins_anew(tmp_path: Path) -> None:
    with mounted(tmp_path, "unix", "cache=none", grace="1") as pair:
        (pair.here / "f").write_bytes(b"f")
        with (pair.there / "f").open("rb", buffering=0) as file:
            pair.engine.kill()
            left = next((pair.engine.run_dir / "sessions").iterdir())
            os.truncate(left, 100)      # as useless as one that is too old
            pair.engine.start()
            assert outcome(file.read, 1) in ("ESTALE", "EIO")
        assert (pair.there / "f").read_bytes() == b"f"
        assert not left.exists()


def _number_again(directory: Path, number: int) -> Path:
    """A new file whose inode has that number, which a removed one had."""
    for attempt in range(200):
        path = directory / f"again{attempt}"
        path.touch()
        if path.stat().st_ino == number:
            return path
    raise AssertionError(f"no inode got the number {number} again")


@pytest.mark.parametrize("transport", ALL_TRANSPORTS)
def test_an_inode_number_that_lives_again_is_one_node(tmp_path: Path, transport: str) -> None:
    """The kernel still knows the file that had the number before: none of its names may lead to a third node."""
    with mounted(tmp_path, transport) as pair, ext4(pair.here / "disk") as here, contextlib.ExitStack() as stack:
        there = pair.there / "disk"
        (here / "before").touch()
        before = os.open(there / "before", os.O_PATH)
        stack.callback(os.close, before)
        number = (here / "before").stat().st_ino
        pair.replace_engine()  # nobody has it open any more
        (here / "before").unlink()
        again = _number_again(here, number).name
        known = place_of(str(there / again)).node
        pair.replace_engine()
        os.link(there / again, there / "link")
        assert place_of(str(there / "link")).node == known
        assert os.lstat(there / again).st_nlink == os.lstat(there / "link").st_nlink == 2
