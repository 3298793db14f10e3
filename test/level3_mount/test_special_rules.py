"""Special rules as programs meet them: names that this machine answers, hides or protects, on trees and on /proc."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from harness.engine_process import CHECKOUT, EngineProcess, Rules, everything_below
from harness.leaks import environment
from harness.mounts import MountProcess
from harness.waiting import wait_until
from kit import in_child, outcome

from qtfs_client.remote_host import mount_figures

pytestmark = pytest.mark.root

CACHES = ("auto", "none", "always")


def everywhere() -> Rules:
    return {kind: ["/"] for kind in everything_below("/")}


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that allows everything; when all mounts are gone, nothing may be left in it."""
    with EngineProcess(tmp_path_factory.mktemp("special"), rules=everywhere(), workers=8).running() as running:
        yield running
        wait_until(running.is_idle, f"the engine to let everything go; it has {running.figures()}")


Mounter = Callable[..., Path]


@pytest.fixture(params=CACHES)
def mounted(request: pytest.FixtureRequest, engine: EngineProcess, tmp_path: Path) -> Iterator[Mounter]:
    """Mount a directory of the server under rules: mounted(source, rules, more options)."""
    mounts: list[MountProcess] = []

    def mount(source: object, rules: str = "", options: str = "") -> Path:
        (tmp_path / "rules.toml").write_text(rules)
        words = f"driver=fuse3,cache={request.param},special_rules={tmp_path}/rules.toml,{options}"
        made = MountProcess(engine, Path(str(source)), tmp_path / f"mnt{len(mounts)}", words)
        made.start()
        mounts.append(made)
        return made.point

    try:
        yield mount
    except BaseException:
        for made in mounts:
            made.take_away()
        raise
    for made in mounts:
        made.stop()
        made.check_log()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """What is shared, but not through a mount."""
    top = tmp_path / "tree"
    for name in ("a", "b", "17", "a/deep"):
        (top / name).mkdir(parents=True)
        (top / name / "secret").write_text("secret")
        (top / name / "plain").write_text("plain")
    return top


def rule(path: object, action: str, **more: object) -> str:
    lines = [f'path = "{path}"', f'action = "{action}"', *(f"{key} = {value!r}" for key, value in more.items())]
    return "[[rule]]\n" + "\n".join(lines) + "\n"


# ---- hide


def test_hidden_names(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree, rule(tree / "*/secret", "hide") + rule(tree / "a/deep", "hide"))
    assert sorted(os.listdir(point / "a")) == ["plain"]
    assert sorted(os.listdir(point / "17")) == ["plain"]
    assert outcome(os.stat, point / "a/secret") == outcome(os.stat, point / "a/deep/plain") == "ENOENT"
    assert outcome(os.unlink, point / "a/secret") == outcome(os.rename, point / "a/secret", point / "x") == "ENOENT"
    for flags in (os.O_RDONLY, os.O_WRONLY):
        assert outcome(os.open, point / "a/secret", flags) == "ENOENT"
    assert outcome(os.open, point / "a/secret", os.O_CREAT | os.O_WRONLY) == "EACCES"
    assert outcome(os.mkdir, point / "a/secret") == outcome(os.mkfifo, point / "a/secret") == "EACCES"
    assert outcome(os.symlink, "x", point / "a/secret") == "EACCES"
    assert outcome(os.rename, point / "a/plain", point / "b/secret") == "ENOENT"
    assert outcome(os.link, point / "a/plain", point / "b/secret") == "EACCES"
    assert (tree / "a/secret").read_text() == (tree / "b/secret").read_text() == "secret"
    # What the process holds open is the same directory, however it got there.
    fd = os.open(point / "a", os.O_RDONLY)
    try:
        assert outcome(os.open, "secret", os.O_RDONLY, dir_fd=fd) == "ENOENT"
        assert os.listdir(fd) == ["plain"]
    finally:
        os.close(fd)


def test_directories_made_later_are_ruled_at_once(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree, rule(tree / "*/secret", "hide"))
    os.mkdir(point / "new")
    (tree / "new/secret").write_text("secret")
    assert outcome(os.stat, point / "new/secret") == "ENOENT" and os.listdir(point / "new") == []


def test_long_listings_with_long_hidden_stretches(mounted: Mounter, tree: Path) -> None:
    """A reply of nothing but hidden names is not the end of the directory."""
    for number in range(3000):
        (tree / "b" / str(number)).touch()
    for name in ("x", "y", "z"):
        (tree / "b" / name).touch()
    point = mounted(tree, rule(tree / "b/[pid]", "hide"))
    assert sorted(os.listdir(point / "b")) == ["plain", "secret", "x", "y", "z"]
    assert [entry.name for entry in os.scandir(point / "b") if entry.stat().st_size == 5] == ["plain"]


# ---- readonly


def test_read_only_trees(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree, rule(tree / "a", "readonly") + rule(tree / "a/deep/plain", "remote"))
    inside = point / "a/deep/secret"
    assert inside.read_text() == "secret" and sorted(os.listdir(point / "a/deep")) == ["plain", "secret"]
    refused: dict[str, Callable[[], object]] = {
        "open": lambda: os.open(inside, os.O_RDWR),
        "append": lambda: os.open(inside, os.O_WRONLY | os.O_APPEND),
        "truncate": lambda: os.truncate(inside, 0),
        "open and truncate": lambda: os.open(inside, os.O_RDONLY | os.O_TRUNC),
        "chmod": lambda: os.chmod(inside, 0o600),
        "chown": lambda: os.chown(inside, 1, 1),
        "utime": lambda: os.utime(inside, (1, 1)),
        "setxattr": lambda: os.setxattr(inside, "user.x", b"1"),
        "create": lambda: os.open(point / "a/new", os.O_CREAT | os.O_WRONLY),
        "mkdir": lambda: os.mkdir(point / "a/new"),
        "symlink": lambda: os.symlink("x", point / "a/deep/new"),
        "unlink": lambda: os.unlink(inside),
        "rmdir": lambda: os.rmdir(point / "a/deep"),
        "rename in": lambda: os.rename(inside, point / "a/new"),
        "rename out": lambda: os.rename(inside, point / "new"),
        "rename onto": lambda: os.rename(point / "b/plain", inside),
        "rename itself": lambda: os.rename(point / "a", point / "new"),
        "link": lambda: os.link(inside, point / "new"),
        "tmpfile": lambda: os.open(point / "a", os.O_TMPFILE | os.O_RDWR),
    }
    assert {name: outcome(call) for name, call in refused.items()} == dict.fromkeys(refused, "EROFS")
    assert os.access(inside, os.R_OK)
    (point / "a/deep/plain").write_text("changed")
    (point / "b/plain").write_text("changed")
    assert (tree / "a/deep/plain").read_text() == (tree / "b/plain").read_text() == "changed"
    assert sorted(os.listdir(tree / "a/deep")) == ["plain", "secret"]
    assert (tree / "a/deep/secret").read_text() == "secret"


def test_a_rule_above_the_source_holds_for_all_of_the_mount(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree / "a", rule(tree, "readonly"))
    assert (point / "deep/plain").read_text() == "plain"
    assert outcome(os.truncate, point / "deep/plain", 0) == outcome(os.mkdir, point / "new") == "EROFS"


# ---- local


def test_links_to_this_machine(mounted: Mounter, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "here").mkdir()
    (tmp_path / "here/b").write_text("local")
    (tmp_path / "here/17").write_text("local 17")
    point = mounted(
        tree,
        rule(tree / "*", "local", target=f"{tmp_path}/here/{{name}}")
        + rule(tree / "a", "remote")
        + rule(tree / "a/plain", "local", target="../b"),
    )
    assert os.readlink(point / "b") == f"{tmp_path}/here/b" and (point / "b").read_text() == "local"
    assert (point / "17").read_text() == "local 17" and (point / "a/plain").read_text() == "local"
    assert os.readlink(point / "not there") == f"{tmp_path}/here/not there"
    assert outcome(open, point / "not there") == "ENOENT"
    found = os.lstat(point / "b")
    assert stat.S_ISLNK(found.st_mode) and found.st_nlink == 1
    assert {entry.name: entry.is_symlink() for entry in os.scandir(point)} == {"a": False, "b": True, "17": True}
    assert outcome(os.unlink, point / "b") == outcome(os.rename, point / "b", point / "c") == "EPERM"
    assert outcome(os.symlink, "x", point / "b") == outcome(os.mkdir, point / "b") == "EEXIST"
    assert outcome(os.link, point / "b", point / "a/new", follow_symlinks=False) == "EPERM"
    assert outcome(os.chown, point / "b", 1, 1, follow_symlinks=False) == "EROFS"
    assert outcome(os.listxattr, point / "b", follow_symlinks=False) == []
    assert outcome(os.getxattr, point / "b", "user.x", follow_symlinks=False) == "ENODATA"
    assert (tree / "b/plain").read_text() == "plain"


SHOW_LINKS = """
import os, sys, threading
os.chdir(sys.argv[1])
found = []
threads = [threading.Thread(target=lambda: found.append((threading.get_native_id(), os.readlink("thread-self"))))
           for _ in range(5)]
for each in threads: each.start()
for each in threads: each.join()
print(os.getpid(), os.readlink("self"), *(f"{tid}={link}" for tid, link in found))
"""


def test_each_caller_has_its_own_self(mounted: Mounter) -> None:
    """-o proc: many processes and threads at once, and what they see behind the link is themselves."""
    point = mounted("/proc", options="proc,local_proc=/proc")
    command = [sys.executable, "-c", SHOW_LINKS, str(point)]
    programs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment()) for _ in range(8)]
    for program in programs:
        words = program.communicate(timeout=60)[0].split()
        assert words[:2] == [str(program.pid), f"/proc/{program.pid}"]
        for word in words[2:]:
            tid, link = word.split("=")
            assert link == f"/proc/{program.pid}/task/{tid}"
    status = subprocess.run(["cat", point / "self/status"], capture_output=True, text=True, check=True).stdout
    assert status.startswith("Name:\tcat\n")
    assert stat.S_ISLNK(os.lstat(point / "self").st_mode) and {"self", "thread-self"} <= set(os.listdir(point))


def test_mounts_are_those_of_the_servers_first_process(mounted: Mounter) -> None:
    for options in ("", "proc"):
        point = mounted("/proc", options=options)
        assert os.readlink(point / "mounts") == "1/mounts"
        assert (point / "mounts").read_text() == Path("/proc/1/mounts").read_text()


def test_without_proc_self_is_the_callers_on_this_machine(mounted: Mounter) -> None:
    """Never the engine's, though it is the engine that reads the link."""
    point = mounted("/proc")
    assert os.readlink(point / "self") == "/proc/self"
    assert os.readlink(point / "thread-self") == "/proc/thread-self"
    status = subprocess.run(["cat", point / "self/comm"], capture_output=True, text=True, check=True).stdout
    assert status == "cat\n"


def test_processes_of_listed_commands_are_this_machines(mounted: Mounter, tmp_path: Path) -> None:
    """A process called bash is taken from here, others from the server, and by tomorrow's name tomorrow."""
    script = "echo ready; read x; exec -a sleeping sleep 600"
    bash = subprocess.Popen(["bash", "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    sleep = subprocess.Popen(["sleep", "600"])
    try:
        assert bash.stdout is not None and bash.stdin is not None
        bash.stdout.readline()
        point = mounted("/proc", options="proc,local_proc=/proc")
        assert os.readlink(point / str(bash.pid)) == f"/proc/{bash.pid}"
        assert (point / str(bash.pid) / "comm").read_text() == "bash\n"
        assert stat.S_ISDIR(os.lstat(point / str(sleep.pid)).st_mode)
        kinds = {entry.name: entry.is_symlink() for entry in os.scandir(point)}
        assert kinds[str(bash.pid)] and not kinds[str(sleep.pid)]
        bash.stdin.write(b"go\n")
        bash.stdin.close()
        wait_until(lambda: stat.S_ISDIR(os.lstat(point / str(bash.pid)).st_mode), "the other name to count")
        assert (point / str(bash.pid) / "comm").read_text() == "sleep\n"
    finally:
        for process in (bash, sleep):
            process.kill()
            process.wait()


def test_rules_go_on_below_a_process_that_is_not_local(mounted: Mounter) -> None:
    point = mounted("/proc", rule("/proc/[pid]/environ", "hide"), "proc")
    own = point / str(os.getpid())
    assert "environ" not in os.listdir(own) and "status" in os.listdir(own)
    assert outcome(open, own / "environ") == "ENOENT"
    assert outcome(open, own / "task" / str(os.getpid()) / "environ") != "ENOENT"


# ---- replace


def test_a_file_of_this_machine_instead(mounted: Mounter, tree: Path, tmp_path: Path) -> None:
    (tmp_path / "one").write_text("one")
    point = mounted(tree, rule(tree / "a/plain", "replace", file=str(tmp_path / "one")))
    file = point / "a/plain"
    assert file.read_text() == "one"
    with file.open("rb") as opened:
        (tmp_path / "one").write_text("two, and longer")
        assert opened.read() == b"one", "content is of the time of opening"
    assert file.read_text() == "two, and longer"
    found = os.stat(file)
    assert stat.S_ISREG(found.st_mode) and stat.S_IMODE(found.st_mode) == 0o444 and found.st_size == 0
    for flags in (os.O_WRONLY, os.O_RDWR, os.O_RDONLY | os.O_TRUNC):
        assert outcome(os.open, file, flags) == "EROFS"
    assert outcome(os.truncate, file, 0) == outcome(os.chmod, file, 0o600) == "EROFS"
    assert outcome(os.unlink, file) == "EPERM"
    assert outcome(os.rename, point / "b/plain", file) == "EPERM"
    (tmp_path / "one").unlink()
    assert outcome(open, file) == "ENOENT"
    assert (tree / "a/plain").read_text() == "plain"


def test_a_commands_output(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree, rule(tree / "[pid]/plain", "replace", command=["/bin/echo", "for", "{pid}"]))
    for _ in range(2):
        done = subprocess.run(["sh", "-c", f"echo for $$; exec cat {point}/17/plain"], capture_output=True, check=True)
        mine, read = done.stdout.splitlines()
        assert read == mine
    assert (point / "a/plain").read_text() == "plain"


def test_parts_of_a_replaced_file(mounted: Mounter, tree: Path, tmp_path: Path) -> None:
    data = os.urandom(3 << 20)
    (tmp_path / "large").write_bytes(data)
    point = mounted(tree, rule(tree / "a/plain", "replace", file=str(tmp_path / "large")))
    fd = os.open(point / "a/plain", os.O_RDONLY)
    try:
        assert os.pread(fd, 100, 1 << 20) == data[1 << 20 : (1 << 20) + 100]
        assert os.pread(fd, 100, len(data) - 10) == data[-10:] and os.pread(fd, 100, len(data)) == b""
        assert b"".join(iter(lambda: os.read(fd, 70_001), b"")) == data
        assert os.lseek(fd, 0, os.SEEK_DATA) == 0 and os.lseek(fd, 0, os.SEEK_HOLE) == len(data)
        assert outcome(os.lseek, fd, len(data), os.SEEK_DATA) == "ENXIO"
        os.fsync(fd)
        os.statvfs(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize("mounted", ["auto"], indirect=True)
def test_a_slow_command_keeps_nobody_else_waiting(mounted: Mounter, tree: Path) -> None:
    """Not even on a mount with a single channel."""
    rules = rule(tree / "a/plain", "replace", command=["/bin/sleep", "3.25"])
    point = mounted(tree, rules, "threads=1")
    done = threading.Event()
    slow = threading.Thread(target=lambda: ((point / "a/plain").read_bytes(), done.set()))
    slow.start()
    wait_until(lambda: _sleeps("3.25"), "the command to run")
    for _ in range(100):
        assert (point / "b/plain").read_text() == "plain"
    assert not done.is_set()
    slow.join()
    assert done.is_set()


def _sleeps(argument: str) -> bool:
    return any(process.info["cmdline"] == ["/bin/sleep", argument] for process in psutil.process_iter(["cmdline"]))


@pytest.mark.parametrize("stopped_first", [False, True])
@pytest.mark.parametrize("mounted", ["auto"], indirect=True)
def test_who_waits_for_a_command_can_be_killed(
    mounted: Mounter, tree: Path, tmp_path: Path, stopped_first: bool
) -> None:
    """Also who was to stop before: the kernel tells of the first signal only."""
    run_dir = str(tmp_path / "run")
    point = mounted(tree, rule(tree / "a/plain", "replace", command=["/bin/sleep", "4.5"]), f"run_dir={run_dir}")
    reader = subprocess.Popen(["cat", point / "a/plain"])
    wait_until(lambda: _sleeps("4.5"), "the command to run")
    begun = time.monotonic()
    if stopped_first:
        asked = mount_figures(str(point), run_dir)["requests"]
        reader.send_signal(signal.SIGSTOP)
        wait_until(lambda: mount_figures(str(point), run_dir)["requests"] > asked, "the kernel to tell of it")
    reader.send_signal(signal.SIGKILL)
    reader.wait()
    assert time.monotonic() - begun < 3
    wait_until(lambda: not _sleeps("4.5"), "the command to end")


# ---- who cannot


def test_llfuse_refuses_rules_that_concern_it(engine: EngineProcess, tree: Path, tmp_path: Path) -> None:
    pytest.importorskip("llfuse")
    (tmp_path / "mnt").mkdir()
    (tmp_path / "rules").write_text(rule(tree / "a", "hide"))
    options = f"server={engine.address},driver=llfuse,special_rules={tmp_path}/rules"
    done = subprocess.run(
        [sys.executable, "-m", "qtfs_client.cli", str(tree), str(tmp_path / "mnt"), "-o", options],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=str(CHECKOUT)),
        check=False,
    )
    assert done.returncode == 32
    assert f"a special rule is for {tree}/a, and driver llfuse knows none: use driver=fuse3" in done.stderr


def test_rules_of_other_paths_cost_nothing(mounted: Mounter, tree: Path) -> None:
    point = mounted(tree, rule("/elsewhere/[pid]", "hide"), "proc")
    assert sorted(os.listdir(point)) == ["17", "a", "b"]
    assert in_child(lambda: Path("a/secret").read_text(), str(point)) == "secret"
