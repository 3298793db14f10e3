"""What the server mounts below the exported directory, seen through a mount; both sides have their own tables."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness.engine_process import TRANSPORTS
from harness.leaks import descriptor_count, mounts_below, unmount_below
from harness.mounts import MountProcess
from harness.server_machine import ServerMachine
from harness.waiting import wait_until

#: The promise is 100 ms; on a machine that does other things as well, that is no bound for a test.
SOON_S = 20.0
STORM = 200
#: What a FUSE mount says that was taken away while somebody used it, or whose daemon died.
GONE = (errno.ENOTCONN, errno.ECONNABORTED, errno.ENODEV)
MountIt = Callable[..., AbstractContextManager[MountProcess]]


@pytest.fixture(autouse=True)
def _needs_root() -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can mount")


@pytest.fixture(params=TRANSPORTS)
def server(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[ServerMachine]:
    with ServerMachine(tmp_path / "server", request.param).running() as machine:
        for name in ("a", "b", "c"):
            (machine.share / name).mkdir()
            (machine.share / name / "under").touch()
        yield machine


@pytest.fixture
def mount(server: ServerMachine, tmp_path: Path) -> MountIt:
    """Mounts the server's share."""

    def mounted(options: str = "") -> AbstractContextManager[MountProcess]:
        return MountProcess(server, server.share, tmp_path / "mnt", f"driver=fuse3,{options}").running()

    return mounted


def names(directory: Path | int) -> set[str]:
    return set(os.listdir(directory))


def eventually(directory: Path, *expected: str) -> None:
    """Until a directory has these names."""
    wait_until(lambda: names(directory) == set(expected), f"{directory} to have {expected}", SOON_S)


def error_of(call: Callable[..., object], *arguments: object) -> int:
    with pytest.raises(OSError) as caught:
        call(*arguments)
    assert caught.value.errno is not None
    return caught.value.errno


# ---- one mount for all


@pytest.mark.parametrize("cache", ["none", "auto", "always"])
def test_a_mount_shows_at_the_next_lookup(server: ServerMachine, mount: MountIt, cache: str) -> None:
    """Even where names are trusted for a day; and a directory that is in use goes on as it was, as on one machine."""
    with mount(f"cache={cache}") as here:
        place = here.point / "a"
        assert names(place) == {"under"} and (place / "under").exists()
        busy = os.open(place, os.O_RDONLY | os.O_DIRECTORY)
        server.mount_tmpfs("a", "new")
        eventually(place, "new")
        assert not (place / "under").exists()
        os.stat("under", dir_fd=busy)
        server.umount("a")
        eventually(place, "under")
        assert names(busy) == {"under"}
        os.close(busy)


def test_a_working_directory_that_is_covered(server: ServerMachine, mount: MountIt) -> None:
    with mount("cache=always") as here:
        script = "cd a; echo ready; read line; ls; ls ../a; echo done; read line; ls ../a; ls"
        shell = subprocess.Popen(
            ["sh", "-c", script], cwd=here.point, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert shell.stdin is not None and shell.stdout is not None
        assert shell.stdout.readline() == "ready\n"
        server.mount_tmpfs("a", "new")
        eventually(here.point / "a", "new")
        shell.stdin.write("\n")
        shell.stdin.flush()
        assert [shell.stdout.readline() for _ in range(3)] == ["under\n", "new\n", "done\n"]
        server.umount("a")
        eventually(here.point / "a", "under")
        assert shell.communicate("\n")[0] == "under\nunder\n"


def test_a_working_directory_whose_mount_goes(server: ServerMachine, mount: MountIt) -> None:
    """It does not keep the server from unmounting, and then it is stale."""
    server.mount_tmpfs("a", "new")
    with mount("cache=none") as here:
        busy = os.open(here.point / "a", os.O_PATH)
        os.stat("new", dir_fd=busy)
        server.umount("a")
        assert error_of(os.stat, f"/proc/self/fd/{busy}/new") == errno.ESTALE
        eventually(here.point / "a", "under")
        os.close(busy)


@pytest.mark.parametrize("cache", ["auto", "always"])
def test_other_mounts_at_the_same_place(server: ServerMachine, mount: MountIt, cache: str) -> None:
    with mount(f"cache={cache}") as here:
        for number in range(8):
            server.mount_tmpfs("a", f"f{number}")
            eventually(here.point / "a", f"f{number}")
            assert (here.point / "a" / f"f{number}").read_text() == f"f{number}\n"
            server.umount("a")


def test_nested_stacked_and_bind_mounts(server: ServerMachine, mount: MountIt) -> None:
    with mount() as here:
        point = here.point
        server.mount_tmpfs("a", "lower")
        server.run("mkdir a/inner; mount -t tmpfs none a/inner; touch a/inner/deep; mount --bind b c; touch b/shared")
        eventually(point / "a/inner", "deep")
        eventually(point / "c", "under", "shared")
        assert os.stat(point / "c/shared").st_ino != os.stat(point / "b/shared").st_ino
        server.mount_tmpfs("a", "upper")
        eventually(point / "a", "upper")
        server.umount("a")
        eventually(point / "a", "lower", "inner")
        eventually(point / "a/inner", "deep")
        server.umount("c")
        eventually(point / "c", "under")


def test_a_mount_that_is_moved(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "moving")
    with mount() as here:
        eventually(here.point / "a", "moving")
        server.run("mount --move a b")
        eventually(here.point / "b", "moving")
        eventually(here.point / "a", "under")


def test_the_exported_directory_stays_what_it_was(server: ServerMachine, mount: MountIt) -> None:
    with mount("cache=none") as here:
        before = names(here.point)
        server.run(f"mount -t tmpfs none '{server.share}'")
        server.run(f"mkdir '{server.share}/other'")
        assert names(here.point) == before
        assert names(here.point / "a") == {"under"}


def test_every_path_has_its_own_file_system(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "f", options="size=8m")
    server.mount_tmpfs("b", "f", options="size=16m")
    with mount() as here:
        size = {place: os.statvfs(here.point / place) for place in ("a", "a/f", "b")}
        assert {place: s.f_frsize * s.f_blocks >> 20 for place, s in size.items()} == {"a": 8, "a/f": 8, "b": 16}
        words = ["df", "-B1M", "--output=size", here.point / "a", here.point / "b"]
        done = subprocess.run(words, capture_output=True, text=True, check=True)
        assert done.stdout.split()[1:] == ["8", "16"]
        same = [os.stat(server_side).st_ino for server_side in (here.point / "a/f", here.point / "b/f")]
        assert same[0] != same[1]


# ---- propagate


@dataclass
class Seen:
    """A line of findmnt(8)."""

    source: str
    type: str
    options: set[str]


def tree(point: Path) -> dict[str, Seen]:
    """What is mounted below a point, by relative path."""
    words = ["findmnt", "-R", "-n", "-r", "-o", "TARGET,SOURCE,FSTYPE,OPTIONS", point]
    lines = subprocess.run(words, capture_output=True, text=True, check=False).stdout.splitlines()
    found = {}
    for line in lines:
        target, source, kind, options = line.split(" ")
        found[os.path.relpath(target, point)] = Seen(source, kind, set(options.split(",")))
    found.pop(".", None)
    return found


def until_mounted(point: Path, *places: str) -> None:
    wanted = {str(point), *(str(point / place) for place in places)}
    try:
        wait_until(lambda: set(mounts_below(str(point))) == wanted, "the mounts to be these", SOON_S)
    except AssertionError:
        assert set(mounts_below(str(point))) == wanted
        raise


def test_mounts_come_and_go_with_the_servers(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "first")
    with mount("propagate") as here:
        until_mounted(here.point, "a")
        began = time.monotonic()
        server.mount_tmpfs("b", "second")
        until_mounted(here.point, "a", "b")
        # For whoever runs this with -s.
        print(f"propagated after {time.monotonic() - began:.3f} s, mount(8) on the server included")
        assert names(here.point / "a") == {"first"} and names(here.point / "b") == {"second"}
        found = tree(here.point)
        assert (found["b"].source, found["b"].type) == (f"{server.share}/b", "fuse.qtfs")
        server.run("mkdir b/inner; mount -t tmpfs none b/inner; touch b/inner/third")
        until_mounted(here.point, "a", "b", "b/inner")
        assert names(here.point / "b/inner") == {"third"}
        server.umount("b/inner")
        until_mounted(here.point, "a", "b")
        assert names(here.point / "b/inner") == set()
        server.umount("a")
        server.umount("b")
        until_mounted(here.point)
        assert names(here.point / "a") == names(here.point / "b") == {"under"}


def test_each_mount_has_its_device_number(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "f")
    server.run("mkdir a/inner; mount -t tmpfs none a/inner; head -c 200000 /dev/zero >a/inner/large")
    with mount("propagate") as here:
        point = here.point
        until_mounted(point, "a", "a/inner")
        assert len({os.stat(point / place).st_dev for place in (".", "a", "a/inner")}) == 3
        found = subprocess.run(["find", point, "-xdev", "-printf", "%P\n"], capture_output=True, text=True, check=True)
        assert set(found.stdout.split()) == {"a", "b", "c", "b/under", "c/under"}
        one, whole = (
            int(subprocess.run(["du", *words, point], capture_output=True, text=True, check=True).stdout.split()[0])
            for words in (("-skx",), ("-sk",))
        )
        assert whole >= one + 190
        assert os.path.ismount(point / "a/inner") and not os.path.ismount(point / "b")
        with pytest.raises(OSError, match="cross-device") as caught:
            os.rename(point / "a/f", point / "a/inner/f")
        assert caught.value.errno == errno.EXDEV


def test_options_are_those_of_the_main_mount(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "f")
    with mount("propagate,ro,nosuid,noexec,cache=none") as here:
        until_mounted(here.point, "a")
        assert {"ro", "nosuid", "nodev", "noexec"} <= tree(here.point)["a"].options
        assert error_of((here.point / "a/f").write_text, "x") == errno.EROFS


def test_of_stacked_mounts_only_the_topmost_is_there(server: ServerMachine, mount: MountIt) -> None:
    with mount("propagate") as here:
        server.mount_tmpfs("a", "lower")
        server.run("mkdir a/inner; mount -t tmpfs none a/inner")
        until_mounted(here.point, "a", "a/inner")
        server.mount_tmpfs("a", "upper")
        until_mounted(here.point, "a")
        eventually(here.point / "a", "upper")
        server.umount("a")
        until_mounted(here.point, "a", "a/inner")
        eventually(here.point / "a", "lower", "inner")


def test_a_busy_mount_goes_with_the_servers(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "f")
    with mount("propagate") as here:
        until_mounted(here.point, "a")
        busy = os.open(here.point / "a", os.O_PATH)
        os.stat("f", dir_fd=busy)
        server.umount("a")
        until_mounted(here.point)
        assert error_of(os.listdir, f"/proc/self/fd/{busy}") in (*GONE, errno.ESTALE)
        os.close(busy)
        server.mount_tmpfs("b", "f")
        until_mounted(here.point, "b")
        open_file = (here.point / "b/f").open()
        wait_until(lambda: not server.try_umount("b"), "the open file to hold the mount")
        assert open_file.read() == "f\n"
        open_file.close()
        server.umount("b")
        until_mounted(here.point)


def test_storms_settle(server: ServerMachine, mount: MountIt) -> None:
    server.run(f"for i in $(seq {STORM}); do mkdir b/$i; done")
    everything = [f"b/{number}" for number in range(1, STORM + 1)]
    with mount("propagate") as here:
        before = descriptor_count(here.pid)
        server.run(f"for i in $(seq {STORM}); do mount -t tmpfs t$i b/$i; touch b/$i/n$i; done")
        until_mounted(here.point, *everything)
        for number in range(1, STORM + 1, 7):
            assert names(here.point / f"b/{number}") == {f"n{number}"}
        server.run(f"for i in $(seq {STORM}); do umount -l b/$i; [ $((i % 3)) = 0 ] || mount -t tmpfs u$i b/$i; done")
        left = [place for number, place in enumerate(everything, 1) if number % 3]
        until_mounted(here.point, *left)
        wait_until(lambda: names(here.point / "b/1") == set(), "the second file system to be there")
        server.run(f"for i in $(seq {STORM}); do [ $((i % 3)) = 0 ] || umount -l b/$i; done")
        until_mounted(here.point)
        wait_until(lambda: descriptor_count(here.pid) <= before + STORM // 4, "the descriptors to be closed")


def test_what_is_unmounted_here_stays_away(server: ServerMachine, mount: MountIt) -> None:
    server.mount_tmpfs("a", "f")
    with mount("propagate") as here:
        until_mounted(here.point, "a")
        subprocess.run(["umount", here.point / "a"], check=True)
        server.mount_tmpfs("b")         # a reason to compare
        until_mounted(here.point, "b")
        assert names(here.point / "a") == {"f"}, "it is seen through the main mount"
        server.umount("a")
        server.mount_tmpfs("a", "g")
        until_mounted(here.point, "a", "b")
        assert names(here.point / "a") == {"g"}


def test_mounts_that_get_none_of_their_own(server: ServerMachine, mount: MountIt) -> None:
    (server.share / "file").write_text("below")
    (server.share / "other").write_text("above")
    with mount("propagate") as here:
        server.run("mount --bind other file")
        server.mount_tmpfs("a")
        until_mounted(here.point, "a")
        wait_until(lambda: (here.point / "file").read_text() == "above", "the mounted file")
        server.umount("file")


def test_mounts_come_back_with_the_server(server: ServerMachine, mount: MountIt) -> None:
    """An engine that was started again knows nothing; its machine still has its mounts."""
    with mount("propagate,timeout=20") as here:
        server.mount_tmpfs("a", "f")
        until_mounted(here.point, "a")
        namespace = os.open(f"/proc/{server.pid}/ns/mnt", os.O_RDONLY)
        server.stop()
        server.within = ("nsenter", f"--mount=/proc/{os.getpid()}/fd/{namespace}")
        server.start()
        os.close(namespace)
        wait_until(lambda: names(here.point / "a") == {"f"} and os.path.ismount(here.point / "a"), "the mount", 20)


# ---- a system that grants no threads

_NO_THREADS = """
import os, threading
start = threading.Thread.start
def scarce(thread):
    if os.path.exists({flag!r}) and thread._target.__name__ in {functions!r}:
        print("refused a thread", flush=True)
        raise RuntimeError("can't start new thread")
    start(thread)
threading.Thread.start = scarce
"""


class Scarcity:
    """A mount that propagates, and that gets no threads for some functions while `flag` is there."""

    def __init__(self, server: ServerMachine, tmp_path: Path, *functions: str) -> None:
        self.flag = tmp_path / "no threads"
        script = _NO_THREADS.format(flag=str(self.flag), functions=functions)
        self.mount = MountProcess(server, server.share, tmp_path / "mnt", "driver=fuse3,propagate", script=script)

    def until_refused(self, times: int) -> None:
        wait_until(lambda: self.mount.log().count("refused a thread") >= times, "threads to be refused", SOON_S)


@pytest.mark.parametrize("function", ["_serve", "run_events", "run_worker"])
def test_who_uses_a_mount_waits_for_its_threads(server: ServerMachine, tmp_path: Path, function: str) -> None:
    server.mount_tmpfs("a", "f")
    scarce = Scarcity(server, tmp_path, function)
    with ThreadPoolExecutor(1) as pool, scarce.mount.running() as here:
        until_mounted(here.point, "a")
        scarce.flag.touch()
        listed = pool.submit(names, here.point / "a")
        try:
            scarce.until_refused(3)
            assert not listed.done()
        finally:
            scarce.flag.unlink()
        assert listed.result(SOON_S) == {"f"}
        server.mount_tmpfs("b", "g")
        until_mounted(here.point, "a", "b")


def test_a_mount_below_one_without_threads_waits(server: ServerMachine, tmp_path: Path) -> None:
    server.mount_tmpfs("a", "f")
    scarce = Scarcity(server, tmp_path, "_serve")
    with scarce.mount.running() as here:
        until_mounted(here.point, "a")
        scarce.flag.touch()
        server.run("mkdir a/inner; mount -t tmpfs none a/inner; touch a/inner/deep")
        scarce.until_refused(2)
        scarce.flag.unlink()
        until_mounted(here.point, "a", "a/inner")
        assert names(here.point / "a/inner") == {"deep"}


def test_mounts_go_without_a_thread(server: ServerMachine, tmp_path: Path) -> None:
    server.mount_tmpfs("a", "f")
    scarce = Scarcity(server, tmp_path, "_end_sessions")
    with scarce.mount.running() as here:
        until_mounted(here.point, "a")
        scarce.flag.touch()
        server.umount("a")
        server.mount_tmpfs("b", "g")
        until_mounted(here.point, "b")
        scarce.until_refused(1)


# ---- ends


@pytest.fixture
def started(server: ServerMachine, tmp_path: Path) -> Iterator[MountProcess]:
    """A mount with two others on it, that the test ends."""
    server.mount_tmpfs("a", "f")
    server.run("mkdir a/inner; mount -t tmpfs none a/inner; touch a/inner/deep")
    process = MountProcess(server, server.share, tmp_path / "mnt", "driver=fuse3,propagate")
    try:
        process.start()
        until_mounted(process.point, "a", "a/inner")
        assert names(process.point / "a/inner") == {"deep"}
        yield process
    finally:
        process.take_away()
        unmount_below(str(process.point))


def has_ended(process: MountProcess) -> None:
    assert process.process is not None
    assert process.process.wait(20) == 0, process.log()
    assert mounts_below(str(process.point)) == []
    process.check_log()


def test_umount_is_busy_and_recursive_umount_ends_all(started: MountProcess) -> None:
    done = subprocess.run(["umount", started.point], capture_output=True, text=True, check=False)
    assert done.returncode != 0 and "busy" in done.stderr
    # The daemon may just be looking at the mount that it made last.
    wait_until(lambda: subprocess.run(["umount", "-R", started.point], check=False).returncode == 0, "the end", SOON_S)
    has_ended(started)


@pytest.mark.parametrize("command", [["umount", "-l"], ["fusermount3", "-u", "-z"]], ids=" ".join)
def test_a_lazy_umount_ends_all(started: MountProcess, command: list[str]) -> None:
    subprocess.run([*command, started.point], check=True)
    has_ended(started)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(started: MountProcess, number: signal.Signals) -> None:
    """Somebody who still uses one of the mounts gets ENOTCONN."""
    busy = os.open(started.point / "a/inner", os.O_PATH)
    os.kill(started.pid, number)
    has_ended(started)
    assert error_of(os.listdir, f"/proc/self/fd/{busy}") in GONE
    os.close(busy)


def test_mounting_again_after_the_daemon_was_killed(started: MountProcess, server: ServerMachine) -> None:
    started.kill()
    assert str(started.point / "a/inner") in mounts_below(str(started.point))
    assert error_of(os.listdir, started.point / "a") in GONE
    with MountProcess(server, server.share, started.point, "driver=fuse3,propagate").running() as again:
        wait_until(lambda: _answers(again.point / "a/inner"), "the new mounts", SOON_S)
        until_mounted(again.point, "a", "a/inner")
        assert names(again.point / "a/inner") == {"deep"}


def _answers(directory: Path) -> bool:
    """Whether the dead mounts are gone, and the new ones there."""
    with contextlib.suppress(OSError):
        os.listdir(directory)
        return True
    return False


# ---- two machines


@pytest.fixture
def remote(tmp_path: Path) -> Iterator[ServerMachine]:
    """A server that is reached over a network of its own, and demands a key."""
    if shutil.which("ip") is None:
        pytest.skip("ip(8) is not installed")
    key = tmp_path / "key"
    key.write_text("a key for two machines\n")
    key.chmod(0o600)
    number = os.getpid() % 250 + 1
    ours, theirs, network = f"qtfs{number}a", f"qtfs{number}b", f"198.18.{number}"  # RFC 2544: no real network
    # The link is there before the engine listens; with the engine's namespace it goes.
    prelude = (
        f"ip link set lo up; until ip link show {theirs} >/dev/null 2>&1; do sleep 0.02; done;"
        f'ip addr add {network}.2/24 dev {theirs}; ip link set {theirs} up; exec "$@"'
    )
    words = ("unshare", "--net", "--mount", "--propagation", "private", "sh", "-euc", prelude, "sh")
    machine = ServerMachine(tmp_path / "server", within=words, arguments=["--key-file", str(key)])
    machine.listen = f"tcp://{network}.2:12345"
    subprocess.run(["ip", "link", "add", ours, "type", "veth", "peer", "name", theirs], check=True)
    try:
        subprocess.run(["ip", "addr", "add", f"{network}.1/24", "dev", ours], check=True)
        subprocess.run(["ip", "link", "set", ours, "up"], check=True)
        mover = threading.Thread(target=_move_link, args=(machine, theirs))
        mover.start()
        with machine.running():
            mover.join()
            yield machine
    finally:
        subprocess.run(["ip", "link", "del", ours], check=False, capture_output=True)


def _move_link(machine: ServerMachine, link: str) -> None:
    """Give an end of the link to the machine as soon as it has a network namespace of its own."""
    here = os.readlink("/proc/self/ns/net")

    def moved() -> bool:
        with contextlib.suppress(OSError, AssertionError):
            if os.readlink(f"/proc/{machine.pid}/ns/net") != here:
                words = ["ip", "link", "set", link, "netns", str(machine.pid)]
                return subprocess.run(words, check=False).returncode == 0
        return False

    wait_until(moved, "the engine's network namespace")


def test_two_machines(remote: ServerMachine, tmp_path: Path) -> None:
    """Nothing is shared but the network: what is mounted over there appears here, is used, and goes."""
    place = remote.share / "a"
    place.mkdir()
    remote.mount_tmpfs("a", "before")
    options = f"driver=fuse3,propagate,key_file={tmp_path / 'key'}"
    with MountProcess(remote, remote.share, tmp_path / "mnt", options).running() as here:
        until_mounted(here.point, "a")
        assert str(place) not in mounts_below(str(place)), "the server's mount is the server's"
        (here.point / "a/written").write_text("over the network")
        assert remote.run("cat a/written").stdout == "over the network"
        remote.run("mkdir a/inner; mount -t tmpfs none a/inner; echo deep >a/inner/file")
        until_mounted(here.point, "a", "a/inner")
        assert (here.point / "a/inner/file").read_text() == "deep\n"
        assert os.stat(here.point / "a").st_dev != os.stat(here.point / "a/inner").st_dev
        remote.umount("a/inner")
        until_mounted(here.point, "a")
        remote.umount("a")
        until_mounted(here.point)
        assert names(here.point / "a") == set()
