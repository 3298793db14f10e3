"""Below a mount, a file system of the server hangs or is frozen: whoever is in there waits, and can be killed; the rest
goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.engine_process import ALL_TRANSPORTS, EngineProcess
from harness.freezing_fs import FreezingFs
from harness.mounts import MountProcess
from harness.stalling_fs import FILES, StallingFs
from harness.waiting import wait_until

from qtfs_client.remote_host import mount_figures

THREADS = 4
CROWD = 24
#: A caller that ends, or has caught a signal, is given two seconds for each of its requests, of which there are a few.
GIVEN_S = 20
#: Who is killed.
SOON_S = 5
#: Of one session in one file system, so many may wait in the engine, and who came before that was known: stuck.pyx.
MOST_OF_MOUNT = 8


@pytest.fixture(params=ALL_TRANSPORTS)
def mount(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[MountProcess]:
    """Few threads, and an engine with as few workers."""
    options = f"threads={THREADS},run_dir={tmp_path / 'run'}"
    with EngineProcess(tmp_path, request.param, workers=2).running() as engine:
        (engine.share / "plain").write_text("plain")
        with MountProcess(engine, engine.share, tmp_path / "mnt", options).running() as mounted:
            yield mounted
        wait_until(engine.is_idle, "the engine to be idle")


@pytest.fixture
def hung(mount: MountProcess) -> Iterator[StallingFs]:
    with StallingFs(mount.source / "hung").mounted() as fs:
        yield fs


@contextlib.contextmanager
def crowd(commands: list[list[str]]) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Processes; none is left at the end."""
    started = [subprocess.Popen(command, stdout=subprocess.DEVNULL) for command in commands]
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.wait(10)


def put_off(mount: MountProcess) -> int:
    """How many requests the daemon has set aside."""
    return int(mount_figures(str(mount.point), str(mount.point.with_name("run")))["pending"])


@contextlib.contextmanager
def crowded(mount: MountProcess, hung: StallingFs, there: Path) -> Iterator[None]:
    """So many hang in `there` that whatever else is asked of it is put off."""
    files = [str(there / os.fsdecode(name)) for name in FILES]
    # Known by name, since the kernel looks for one name of a directory after the other.
    assert subprocess.run(["cat", *files], timeout=15, capture_output=True, check=False).returncode == 0
    hung.hold()
    with crowd([["stat", files[i % len(files)]] for i in range(CROWD)]):
        wait_until(lambda: put_off(mount) > 0, "requests to be put off")
        yield
        hung.go()
    wait_until(lambda: put_off(mount) == 0, "nothing to be set aside any more")


def works(point: Path) -> bool:
    """Whether the rest of the mount is of use; TimeoutExpired: it hangs."""
    script = "set -e; cat plain; ls; : >new; mv new newer; rm newer; df . >/dev/null"
    return subprocess.run(["sh", "-c", script], cwd=point, timeout=15, capture_output=True, check=False).returncode == 0


def test_a_crowd_that_hangs_leaves_the_rest_of_the_mount_alone(
    mount: MountProcess, hung: StallingFs
) -> None:
    files = [str(mount.point / "hung" / os.fsdecode(name)) for name in FILES]
    assert subprocess.run(["cat", *files], timeout=15, capture_output=True, check=False).returncode == 0
    hung.hold()
    with crowd([["stat", files[i % len(files)]] for i in range(CROWD)]) as waiting:
        wait_until(lambda: hung.held() >= THREADS, "as many requests as threads to hang")
        assert works(mount.point)
        assert all(process.poll() is None for process in waiting)
        for process in waiting[: CROWD // 2]:
            process.kill()
            process.wait(5)
        assert works(mount.point)
        hung.go()
        for process in waiting[CROWD // 2 :]:
            assert process.wait(15) == 0


def test_processes_that_end_with_files_of_it_open_do_not_wait_for_it(mount: MountProcess, hung: StallingFs) -> None:
    script = "import sys, time; held = [open(name, 'wb') for name in sys.argv[1:]]; print(); time.sleep(600)"
    files = [str(mount.point / "hung" / os.fsdecode(name)) for name in FILES]
    writers = [subprocess.Popen([sys.executable, "-c", script, *files], stdout=subprocess.PIPE) for _ in range(4)]
    try:
        for writer in writers:
            assert writer.stdout is not None
            writer.stdout.readline()
        with crowded(mount, hung, mount.point / "hung"):
            # One after the other, so that what the first closed is tried again meanwhile, which no figure may show.
            for writer in writers:
                writer.kill()
                writer.wait(GIVEN_S)
            assert works(mount.point)
    finally:
        for writer in writers:
            writer.kill()
            writer.communicate()


def test_a_caught_signal_ends_a_call_that_was_put_off(mount: MountProcess, hung: StallingFs) -> None:
    script = "import os, signal, sys; signal.signal(14, lambda *_: os._exit(7)); signal.alarm(1); os.stat(sys.argv[1])"
    with crowded(mount, hung, mount.point / "hung"):
        command = [sys.executable, "-c", script, str(mount.point / "hung" / "f0")]
        assert subprocess.run(command, timeout=GIVEN_S, check=False).returncode == 7


def test_what_is_known_of_a_root_that_hangs_is_told(mount: MountProcess, hung: StallingFs, tmp_path: Path) -> None:
    """So umount(8) comes to its end."""
    whole = MountProcess(mount.engine, hung.point, tmp_path / "whole", f"threads={THREADS},run_dir={tmp_path / 'run'}")
    with whole.running():
        os.statvfs(whole.point)  # as a mount in the background has done by itself (wait_for_answer)
        with crowded(whole, hung, whole.point):
            _ask_and_unmount(whole.point)


def _ask_and_unmount(point: Path) -> None:
    command = [sys.executable, "-c", "import os, sys; os.stat(sys.argv[1]); os.statvfs(sys.argv[1])", point]
    assert subprocess.run(command, timeout=GIVEN_S, check=False).returncode == 0
    umount = subprocess.run(["umount", point], timeout=GIVEN_S, capture_output=True, text=True, check=False)
    assert "busy" in umount.stderr


# ---- a frozen file system: what would change it waits


def _fsync(path: Path) -> list[str]:
    script = "import os, sys; file = open(sys.argv[1], 'ab', 0); file.write(b'+'); os.fsync(file)"
    return [sys.executable, "-c", script, str(path)]


#: What waits, by name: a command on a file "f" in a directory of its own, and what is there afterwards, by name.
WAITERS: dict[str, tuple[Callable[[Path], list[str]], dict[str, str]]] = {
    "mkdir": (lambda d: ["mkdir", str(d / "new")], {"f": "text", "new": "directory"}),
    "create": (lambda d: ["sh", "-c", f"set -C; : >{d}/new"], {"f": "text", "new": ""}),
    "unlink": (lambda d: ["unlink", str(d / "f")], {}),
    "rename": (lambda d: ["mv", "-T", str(d / "f"), str(d / "g")], {"g": "text"}),
    "link": (lambda d: ["link", str(d / "f"), str(d / "g")], {"f": "text", "g": "text"}),
    "symlink": (lambda d: ["ln", "-s", "absent", str(d / "new")], {"f": "text", "new": "-> absent"}),
    "chmod": (lambda d: ["chmod", "755", str(d / "f")], {"f": "text, executable"}),
    "truncate": (lambda d: ["truncate", "-c", "-s", "2", str(d / "f")], {"f": "te"}),
    "append": (lambda d: ["sh", "-c", f"printf + >>{d}/f"], {"f": "text+"}),
    "fsync": (lambda d: _fsync(d / "f"), {"f": "text+"}),
}


def contents(directory: Path) -> dict[str, str]:
    return {path.name: _content(path) for path in directory.iterdir()}


def _content(path: Path) -> str:
    if path.is_symlink():
        return f"-> {path.readlink()}"
    if path.is_dir():
        return "directory"
    return path.read_text() + (", executable" if path.stat().st_mode & 0o100 else "")


@pytest.fixture
def ice(mount: MountProcess, tmp_path: Path) -> Iterator[FreezingFs]:
    """Twice what each of WAITERS needs: for those that wait on, and for those that are killed."""
    with FreezingFs(tmp_path / "image", mount.source / "ice").mounted() as fs:
        for group in ("waits", "dies"):
            for name in WAITERS:
                (fs.point / group / name).mkdir(parents=True)
                (fs.point / group / name / "f").write_text("text")
        (fs.point / "read").write_text("text")
        yield fs


def test_changes_of_a_frozen_file_system_wait_alone_and_are_made_once(mount: MountProcess, ice: FreezingFs) -> None:
    """Who is killed meanwhile dies, and what he wanted is done, or not. Reading goes on."""
    here, there = ice.point, mount.point / "ice"
    before = {group: {name: contents(here / group / name) for name in WAITERS} for group in ("waits", "dies")}
    # In turns, so that there are some of both among those that hang in the engine and those that are put off.
    commands = [command(there / group / name) for name, (command, _) in WAITERS.items() for group in before]
    with contextlib.ExitStack() as stack:
        with ice.frozen():
            processes = stack.enter_context(crowd(commands))
            going, dying = processes[::2], processes[1::2]

            def all_wait() -> bool:
                hanging, others = mount.engine.figures()["stuck"], put_off(mount)
                return hanging >= MOST_OF_MOUNT and others > 0 and hanging + others == len(commands)

            wait_until(all_wait, "some to hang, and the others to be put off")
            assert works(mount.point)
            for side in (here, there):
                reader = subprocess.run(["cat", side / "read"], capture_output=True, timeout=SOON_S, check=False)
                assert reader.stdout == b"text"
            assert all(process.poll() is None for process in processes)
            for process in dying:
                process.kill()
            for process in dying:
                assert process.wait(SOON_S) == -signal.SIGKILL
            assert works(mount.point)
            assert all(process.poll() is None for process in going)
            assert {name: contents(here / "waits" / name) for name in WAITERS} == before["waits"]
        assert [process.wait(GIVEN_S) for process in going] == [0] * len(WAITERS)
    wait_until(lambda: put_off(mount) == 0 and mount.engine.figures()["stuck"] == 0, "nothing to wait any more")
    for name, (_, after) in WAITERS.items():
        assert contents(here / "waits" / name) == contents(there / "waits" / name) == after
        found = contents(here / "dies" / name)
        assert found in (before["dies"][name], after), f"{name}: {found}"
