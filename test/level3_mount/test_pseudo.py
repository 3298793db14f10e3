"""/proc, /sys and cgroups through a mount: walks of a changing tree, contents, writes that the kernel takes or refuses.

What a program gets through the mount is compared with what it gets from the file system itself.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness.engine_process import EngineProcess, Rules, everything_below
from harness.leaks import environment
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import outcome

pytestmark = pytest.mark.root

CACHES = ("auto", "none")
#: What find(1) and grep(1) may say of files that went, or that the kernel does not let anybody read.
#: A process that is a zombie by now has no network; one may work deeper than a path is long. find(1) quotes names.
VANISHED = re.compile(rb"No such file or directory|No such process|/net\W*: Invalid argument|File name too long")
#: In /proc; and what the kernel mounts there once somebody looks.
OF_A_PROCESS = re.compile(rb"/\d+(/|$)|/sys/fs/binfmt_misc/")
HIDDEN = {b"/kcore", b"/vmcore", b"/kmsg"}


def everywhere() -> Rules:
    return {kind: ["/"] for kind in everything_below("/")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that allows everything; when all mounts are gone, nothing may be left in it."""
    with EngineProcess(tmp_path_factory.mktemp("pseudo"), rules=everywhere(), workers=8).running() as running:
        yield running
        wait_until(running.is_idle, f"the engine to let everything go; it has {running.figures()}")


def _mounted(engine: EngineProcess, point: Path, cache: str, source: str, more: str = "") -> MountProcess:
    rules = point.with_name("no-rules")
    rules.touch()
    return MountProcess(engine, Path(source), point, f"driver=fuse3,cache={cache},special_rules={rules},{more}")


@pytest.fixture(scope="module", params=CACHES)
def proc(
    request: pytest.FixtureRequest, engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """/proc, mounted with -o proc."""
    point = tmp_path_factory.mktemp("proc") / "mnt"
    with _mounted(engine, point, request.param, "/proc", "proc,local_proc=/proc").running() as mount:
        yield mount.point


@pytest.fixture(scope="module", params=CACHES)
def sys_(
    request: pytest.FixtureRequest, engine: EngineProcess, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Path]:
    """/sys."""
    point = tmp_path_factory.mktemp("sys") / "mnt"
    with _mounted(engine, point, request.param, "/sys").running() as mount:
        yield mount.point


@contextlib.contextmanager
def coming_and_going() -> Iterator[None]:
    """Processes that live for a few milliseconds, with threads that do so too, as long as the body runs."""
    stop = threading.Event()
    program = "import threading; [threading.Thread(target=int).start() for _ in range(5)]"

    def churn() -> None:
        while not stop.wait(0.01):
            subprocess.run([sys.executable, "-S", "-c", program], check=True, env=environment())

    threads = [threading.Thread(target=churn) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


@contextlib.contextmanager
def sleeping(*before: str) -> Iterator[int]:
    """A process that sleeps; its number. Killed, if it still is there."""
    process = subprocess.Popen([*before, "sleep", "600"])
    try:
        wait_until(lambda: os.readlink(f"/proc/{process.pid}/exe").endswith("sleep"), "sleep to be executed")
        wait_until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_SLEEPING, "it to have been loaded")
        yield process.pid
    finally:
        process.kill()
        process.wait()


def run(*command: object) -> subprocess.CompletedProcess[bytes]:
    """A program of the system's, without what make sanitize preloads: that waits for itself where /proc is a mount."""
    plain = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return subprocess.run([str(word) for word in command], capture_output=True, check=False, timeout=110, env=plain)


def complaints(done: subprocess.CompletedProcess[bytes]) -> set[bytes]:
    """What a walk complains of besides files that vanished; not about which file."""
    return {line.rpartition(b": ")[2] for line in done.stderr.splitlines() if not VANISHED.search(line)}


# ---- walks


@pytest.mark.slow
@pytest.mark.parametrize("proc", ["auto"], indirect=True)
def test_a_walk_of_all_of_proc_while_processes_come_and_go(proc: Path) -> None:
    with coming_and_going():
        here = run("find", "/proc")
        there = run("find", proc)
        looked = run("find", proc, "-maxdepth", "3", "-not", "-path", "*/task/*", "-ls")
    assert complaints(there) <= complaints(here)
    assert complaints(looked) <= complaints(run("find", "/proc", "-maxdepth", "3", "-ls"))
    names = {line.removeprefix(bytes(proc)) for line in there.stdout.splitlines()}
    ours = {line.removeprefix(b"/proc") for line in here.stdout.splitlines()}
    me = b"/%d/" % os.getpid()
    assert {b"/cpuinfo", b"/sys/kernel/ostype", me + b"status", me + b"task" + me + b"fd/0", me + b"ns/net"} <= names
    # Not of processes, whose threads (there may be thousands) come and go too.
    assert {name for name in names if not OF_A_PROCESS.match(name)} == {
        name for name in ours if not OF_A_PROCESS.match(name)
    } - HIDDEN
    assert len(looked.stdout.splitlines()) > 1000


def lost_and_invented(look: Callable[[str], set[bytes]], here: str, there: Path) -> tuple[set[bytes], set[bytes]]:
    """What a look through the mount lacks of what two looks around it found, and what it has that neither found.

    Something may come and go, or go and come, in between: the best of some attempts counts.
    """
    best: tuple[set[bytes], set[bytes]] | None = None
    for _ in range(5):
        before, found, after = look(here), look(str(there)), look(here)
        assert before & after, "there is something to compare"
        differences = (before & after) - found, found - (before | after)
        if best is None or len(differences[0]) + len(differences[1]) < len(best[0]) + len(best[1]):
            best = differences
        if best == (set(), set()):
            break
    assert best is not None
    return best


@pytest.mark.slow
def test_a_walk_of_all_of_sys_finds_what_is_there(sys_: Path) -> None:
    """cgroups and slabs change while we look; so do devices, but not often."""

    def names(top: str) -> set[bytes]:
        pruned = [f"{top}/fs/cgroup", f"{top}/kernel/slab", f"{top}/kernel/debug", f"{top}/kernel/tracing"]
        tests = [word for path in pruned for word in ("-path", path, "-prune", "-o")]
        done = run("find", top, *tests, "-printf", "%P %y %m %l\\n")
        assert not complaints(done)
        return set(done.stdout.splitlines())

    assert lost_and_invented(names, "/sys", sys_) == (set(), set())
    assert len(names(str(sys_))) > 1000


def test_names_at_the_top_are_the_servers(proc: Path) -> None:
    hidden = {"kcore", "kmsg", "vmcore"}
    here = {name for name in os.listdir("/proc") if not name.isdigit()}
    assert {name for name in os.listdir(proc) if not name.isdigit()} == here - hidden


def test_a_processs_own_directory(proc: Path) -> None:
    """Names, types, links and stable contents of a process that sleeps."""
    with sleeping() as pid:
        here, there = Path(f"/proc/{pid}"), proc / str(pid)
        assert {entry.name: entry.is_dir(follow_symlinks=False) for entry in os.scandir(there)} == {
            entry.name: entry.is_dir(follow_symlinks=False) for entry in os.scandir(here) if entry.name != "mem"
        }
        for name in ("cmdline", "environ", "comm", "maps", "cgroup", "limits", "mountinfo", "uid_map", "oom_score_adj"):
            assert (there / name).read_bytes() == (here / name).read_bytes(), name
        for name in ("exe", "cwd", "root", "fd/0", "fd/1", "ns/net", "ns/pid"):
            assert os.readlink(there / name) == os.readlink(here / name), name


def grep(top: str) -> Callable[[str], set[bytes]]:
    """All lines of all files below a directory of some /proc or /sys, with the files' names in it."""

    def look(base: str) -> set[bytes]:
        done = run("grep", "-rsa", "", f"{base}/{top}")
        return {line.removeprefix(base.encode()) for line in done.stdout.splitlines()}

    return look


@pytest.mark.parametrize("top", ["sys/kernel", "sys/net/core", "sys/vm", "bus", "tty"])
def test_grep_over_a_part_of_proc(proc: Path, top: str) -> None:
    """All that reads the same twice reads so through the mount."""
    assert lost_and_invented(grep(top), "/proc", proc)[0] == set()


@pytest.mark.parametrize("top", ["class/net/lo/", "devices/system/cpu", "module", "kernel/mm", "bus"])
def test_grep_over_a_part_of_sys(sys_: Path, top: str) -> None:
    assert lost_and_invented(grep(top), "/sys", sys_)[0] == set()


STABLE = ("version", "cmdline", "filesystems", "devices", "modules", "config.gz", "1/mounts", "1/mountinfo", "cgroups")


@pytest.mark.parametrize("name", STABLE)
def test_stable_files(proc: Path, name: str) -> None:
    """Whole, whatever size stat(2) says they have."""
    if not os.path.exists(f"/proc/{name}"):
        assert not (proc / name).exists()
        return
    expected = Path(f"/proc/{name}").read_bytes()
    assert (proc / name).read_bytes() == expected
    with (proc / name).open("rb", buffering=0) as file:
        assert b"".join(iter(lambda: file.read(17), b"")) == expected
    assert os.stat(proc / name).st_size == os.stat(f"/proc/{name}").st_size


def test_ps_and_lsblk(proc: Path, sys_: Path) -> None:
    """As they are, on a root file system that has the server's /proc and /sys."""
    local = proc.parent / "local_proc"
    local.mkdir(exist_ok=True)
    with sleeping() as pid:
        script = f"mount --bind {proc} /proc && ps -e -o pid=,comm="
        done = run("unshare", "-m", "sh", "-c", script)
        assert done.returncode == 0, done.stderr
        found = dict(line.split(None, 1) for line in done.stdout.decode().splitlines())
        assert found[str(pid)] == "sleep" and "1" in found
    root = sys_.parent
    if not (root / "sys").exists():
        (root / "sys").symlink_to(sys_)
    here, there = run("lsblk", "-rno", "NAME,SIZE,RO"), run("lsblk", "-rno", "NAME,SIZE,RO", "--sysroot", root)
    assert there.stdout == here.stdout or not Path("/sys/block").is_dir()


def test_a_process_that_ends_in_the_middle(proc: Path) -> None:
    """ENOENT by name, ESRCH or nothing by what is open: never an old answer, never a wait."""
    with sleeping() as pid:
        top = proc / str(pid)
        directory = os.open(top, os.O_RDONLY)
        status = os.open(top / "status", os.O_RDONLY)
        tasks = os.open(top / "task", os.O_RDONLY)
        assert b"sleep" in os.pread(status, 4096, 0)
    gone = ("ENOENT", "ESRCH")
    try:
        assert outcome(os.stat, top) == outcome(os.listdir, top) == "ENOENT"
        assert outcome(os.pread, status, 4096, 0) in gone
        assert outcome(os.open, "status", os.O_RDONLY, dir_fd=directory) in gone
        assert outcome(os.listdir, directory) in (*gone, [])
        assert outcome(os.listdir, tasks) in (*gone, [])
        assert str(pid) not in os.listdir(proc)
    finally:
        for fd in (directory, status, tasks):
            os.close(fd)


def test_a_name_that_comes_is_there_at_once(engine: EngineProcess, tmp_path: Path) -> None:
    """Though it was not there before; even where nothing is asked twice that could be remembered."""
    top = hierarchy("cgroup2", "cgroup.procs")
    with _mounted(engine, tmp_path / "mnt", "always", str(top)).running() as mount:
        assert outcome(os.stat, mount.point / f"qtfs-test-{os.getpid()}") == "ENOENT"
        with cgroup(top) as name:
            assert os.path.isdir(mount.point / name)
        assert outcome(os.stat, mount.point / name) == "ENOENT"


def test_a_number_that_is_used_again(proc: Path) -> None:
    """The names of the process that has it now, not of the one before."""
    for _ in range(20):
        with sleeping() as pid:
            here, there = ((top / str(pid) / "stat").read_bytes().split() for top in (Path("/proc"), proc))
            assert (there[0], there[21]) == (here[0], here[21]), "who it is, and since when"
        assert outcome(os.stat, proc / str(pid)) == "ENOENT"


# ---- writes


def compare(here: Path, there: Path, texts: list[bytes]) -> None:
    """Each text written to the file itself and through the mount has the same outcome, that very write's."""
    for text in texts:
        found = []
        for path in (here, there):
            fd = os.open(path, os.O_WRONLY)
            found.append((outcome(os.write, fd, text), here.read_bytes()))
            os.close(fd)
        assert found[0] == found[1], text[:40]


@contextlib.contextmanager
def cgroup(top: Path) -> Iterator[str]:
    """A cgroup of ours below the root of a hierarchy; its name."""
    name = f"qtfs-test-{os.getpid()}"
    (top / name).mkdir()
    try:
        yield name
    finally:
        for below in (top / name).glob("*/"):
            wait_until(lambda below=below: outcome(os.rmdir, below) is None, "the cgroup below to be empty")
        wait_until(lambda: outcome(os.rmdir, top / name) is None, "the cgroup to be empty")


def hierarchy(kind: str, file: str) -> Path:
    """Where a hierarchy is mounted whose groups have a file."""
    for line in Path("/proc/self/mounts").read_text().splitlines():
        _, point, found, options, *_ = line.split()
        if found == kind and (kind == "cgroup2" or file.split(".")[0] in options.split(",")):
            return Path(point)
    pytest.skip(f"no {kind} with {file} is mounted here")


V1 = ("cgroup", "pids.max", [b"7", b"max\n", b"x", b"-1", b"99999999999999999999", b"", b"7" * 5000, b"8\n9\n"])
V2 = ("cgroup2", "cgroup.max.descendants", V1[2])


@pytest.mark.parametrize(("kind", "file", "texts"), [V1, V2], ids=["v1", "v2"])
@pytest.mark.parametrize("cache", CACHES)
def test_limits_of_a_cgroup_and_processes_into_it(
    engine: EngineProcess, tmp_path: Path, kind: str, file: str, texts: list[bytes], cache: str
) -> None:
    """From a mount of /sys/fs/cgroup, as container managers do it."""
    top = hierarchy(kind, file)
    with _mounted(engine, tmp_path / "mnt", cache, str(top)).running() as mount, cgroup(top) as name:
        here, there = top / name, mount.point / name
        assert sorted(os.listdir(there)) == sorted(os.listdir(here))
        compare(here / file, there / file, texts)
        assert (there / file).read_bytes() == (here / file).read_bytes()
        made = there / "made"
        os.mkdir(made)
        with sleeping() as pid:
            (made / "cgroup.procs").write_text(f"{pid}\n")
            assert f":/{name}/made\n" in Path(f"/proc/{pid}/cgroup").read_text()
            assert (made / "cgroup.procs").read_text() == f"{pid}\n"
            assert outcome(os.rmdir, made) == "EBUSY"
            for bad in ("0x", "99999999", "-5"):
                with pytest.raises(OSError) as through:
                    (made / "cgroup.procs").write_text(bad)
                with pytest.raises(OSError) as itself:
                    (here / "made/cgroup.procs").write_text(bad)
                assert through.value.errno == itself.value.errno
            subprocess.run(["sh", "-c", f"echo {pid} >> {there}/cgroup.procs"], check=True)
            assert (made / "cgroup.procs").read_text() == ""
        os.rmdir(made)
        assert not (here / "made").exists()


MEMBERS = [("cgroup2", ["cgroup.procs", "cgroup.threads"]), ("cgroup", ["cgroup.procs", "tasks"])]


@pytest.mark.parametrize(("kind", "names"), MEMBERS, ids=["v2", "v1"])
def test_zero_does_not_move_the_engine(engine: EngineProcess, tmp_path: Path, kind: str, names: list[str]) -> None:
    """"0" means who writes, and to the kernel that is the engine."""
    top = hierarchy(kind, "pids.max")
    with _mounted(engine, tmp_path / "mnt", "auto", str(top)).running() as mount, cgroup(top) as name:
        for file in names:
            for text in ("0", "0\n", " 0x0", "-0"):
                assert outcome((mount.point / name / file).write_text, text) == "ESRCH"
            assert (top / name / "cgroup.procs").read_text() == ""
        for file in names:
            assert outcome((mount.point / name / file).write_text, "0x") == "EINVAL"
        if kind == "cgroup":
            (mount.point / name / "notify_on_release").write_text("0")


SYSCTL = "sys/net/ipv4/ip_local_port_range"


def test_writes_to_proc_arrive_whole_or_fail_as_they_do_there(proc: Path) -> None:
    file = Path("/proc") / SYSCTL
    before = file.read_bytes()
    try:
        texts = [b"32768 60999", b"x", b"70000 80000", b"1024\t65000\n", b" " * 5000 + b"1 2", b""]
        compare(file, proc / SYSCTL, texts)
    finally:
        file.write_bytes(before)


def test_a_map_that_takes_one_write_takes_it_from_here(proc: Path) -> None:
    """uid_map, user_namespaces(7): at offset 0, whole, once."""
    with sleeping("unshare", "-U") as pid:
        there = proc / str(pid)
        lines = "".join(f"{n} {n} 1\n" for n in range(300))
        (there / "uid_map").write_text(lines)
        assert len(Path(f"/proc/{pid}/uid_map").read_text().splitlines()) == 300
        assert outcome((there / "uid_map").write_text, lines) == "EPERM"
        (there / "oom_score_adj").write_text("321")
        assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "321\n"
        # Only a process itself may do this, and whoever asks, it is the engine that writes.
        assert outcome((there / "comm").write_text, "renamed") == "EINVAL"


@pytest.mark.parametrize("size", [4095, 4096, 4097, 8192, 100_000, 1 << 20])
def test_writes_larger_than_a_page(sys_: Path, proc: Path, size: int) -> None:
    """One write there: what it takes of too much, or why not, is what it takes of as much on the server itself."""
    writes: list[tuple[Path, Path]] = [(Path("/proc") / SYSCTL, proc / SYSCTL)]
    found = next(Path("/sys/module").glob("*/uevent"), None)
    if found is not None:
        writes.append((found, sys_ / found.relative_to("/sys")))
    for here, there in writes:
        before = here.read_bytes() if here.name != "uevent" else b""
        results = []
        for path in (here, there):
            fd = os.open(path, os.O_WRONLY)
            results.append(outcome(os.write, fd, b"z" * size))
            os.close(fd)
        assert results[0] == results[1], (here, results)
        assert before == (here.read_bytes() if before else b"")


def test_what_is_protected_on_the_server_is_here(proc: Path, sys_: Path) -> None:
    for path in (proc / "sys/kernel/core_pattern", proc / "sys/kernel/sysrq", sys_ / "power/state"):
        if path.exists():
            assert outcome(path.write_bytes, b"0") == "EROFS"
    assert not (proc / "kcore").exists() and not (proc / "1/mem").exists()


def refused(call: Callable[[], object]) -> int | None:
    with pytest.raises(OSError) as caught:
        call()
    return caught.value.errno


def test_errors_of_a_walk_are_those_of_the_server(proc: Path) -> None:
    """A process's files that even root may not read, and names that never were."""
    for name in ("999999999", "1/none", "kcore", "self/none"):
        assert refused(lambda name=name: os.stat(proc / name)) == errno.ENOENT
