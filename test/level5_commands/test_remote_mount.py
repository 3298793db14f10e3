"""`mount -t qtfs.TYPE` and `qtctl`: an engine and a client in two mount namespaces."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import run
from harness.engine_process import everything_below
from harness.leaks import environment
from harness.waiting import wait_until
from machines import QTCTL, Machines

from qtfs_common.whitelist import Type


@pytest.fixture
def both(tmp_path: Path) -> Iterator[Machines]:
    """Both machines; what the whitelist allows is below the share, and processes called sleep."""
    rules = everything_below(tmp_path / "share") | {Type.KILL: ["sleep"]}
    with Machines(tmp_path, rules).running() as machines:
        yield machines


def options_of(row: list[str]) -> set[str]:
    return {*row[5].split(","), *row[-1].split(",")}


# ---- mount(8)


def test_a_tmpfs(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client("""
        mount -t qtfs.tmpfs -o size=1m,nosuid,noexec none "$point/d"
        echo content >"$point/d/file"
        cat "$point/d/file"
    """).check()
    ((*row,),) = both.mounted_on_server("d")
    assert row[-3] == "tmpfs" and {"size=1024k", "nosuid", "noexec"} <= options_of(row)
    assert both.on_server('cat "$share/d/file"').check().stdout == "content\n"
    assert not (both.share / "d/file").exists(), "it is mounted in the server's namespace and nowhere else"
    assert both.on_client('! grep "$point/d" /proc/self/mountinfo').check().stdout == ""
    both.on_client('"$qtctl" umount "$point/d"').check()
    assert not both.mounted_on_server("d")


def test_a_mount_that_propagates_back(tmp_path: Path) -> None:
    """With -o propagate a remote mount is one of the client too, and still the server's to unmount."""
    with Machines(tmp_path, options="propagate").running() as both:
        (both.share / "d").mkdir()
        both.on_client('mount -t qtfs.tmpfs none "$point/d"').check()
        wait_until(lambda: str(both.point / "d") in both.client.mountinfo(), "the mount on the client")
        inner = 'mkdir "$point/d/inner"; mount -t qtfs.tmpfs none "$point/d/inner"; touch "$point/d/inner/f"'
        both.on_client(inner).check()
        wait_until(lambda: str(both.point / "d/inner") in both.client.mountinfo(), "the other mount on the client")
        both.on_client('"$qtctl" umount "$point/d/inner"; "$qtctl" umount "$point/d"').check()
        assert not both.mounted_on_server()
        wait_until(lambda: str(both.point / "d") not in both.client.mountinfo(), "the mounts to go")


def test_a_bind_mount_within_the_mount(both: Machines) -> None:
    (both.share / "from").mkdir()
    (both.share / "from/file").write_text("bound")
    (both.share / "to").mkdir()
    outcome = both.on_client("""
        mount -t qtfs.bind -o ro "$point/from" "$point/to"
        cat "$point/to/file"
        ! echo no 2>/dev/null >"$point/to/new"
    """).check()
    assert outcome.stdout == "bound"
    ((*row,),) = both.mounted_on_server("to")
    assert "ro" in row[5].split(",")
    both.on_client('"$qtctl" umount "$point/to"').check()


def test_a_source_named_as_the_server_names_it(both: Machines) -> None:
    (both.share / "from").mkdir()
    (both.share / "to").mkdir()
    both.on_client('"$qtctl" mount --bind "$share/from" "$point/to"').check()
    assert both.mounted_on_server("to")
    both.on_client('"$qtctl" umount "$point/to"').check()


def test_rbind_takes_what_is_below(both: Machines) -> None:
    for name in ("from/inner", "once", "with"):
        (both.share / name).mkdir(parents=True)
    both.on_client("""
        mount -t qtfs.tmpfs none "$point/from/inner"
        echo deep >"$point/from/inner/file"
        mount -t qtfs.bind "$point/from" "$point/once"
        mount -t qtfs.rbind "$point/from" "$point/with"
        ! test -e "$point/once/inner/file"
        test "$(cat "$point/with/inner/file")" = deep
        for name in with once; do "$qtctl" umount -l "$point/$name"; done
        "$qtctl" umount "$point/from/inner"
    """).check()
    assert not both.mounted_on_server()


def test_move(both: Machines) -> None:
    for name in ("a", "b"):
        (both.share / name).mkdir()
    both.on_client("""
        mount -t qtfs.tmpfs none "$point/a"
        echo moved >"$point/a/file"
        mount -t qtfs.move "$point/a" "$point/b"
        test "$(cat "$point/b/file")" = moved
    """).check()
    assert not both.mounted_on_server("a") and both.mounted_on_server("b")
    both.on_client('"$qtctl" umount "$point/b"').check()


def test_remount(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client("""
        mount -t qtfs.tmpfs none "$point/d"
        mount -t qtfs.tmpfs -o remount,ro none "$point/d"
        ! echo no 2>/dev/null >"$point/d/file"
        mount -t qtfs.tmpfs -o remount,rw,size=2m none "$point/d"
        echo yes >"$point/d/file"
        "$qtctl" mount -o remount,bind,noexec "$point/d"
    """).check()
    ((*row,),) = both.mounted_on_server("d")
    assert {"rw", "noexec", "size=2048k"} <= options_of(row)
    both.on_client('"$qtctl" umount "$point/d"').check()


def test_propagation(both: Machines) -> None:
    (both.share / "d/e").mkdir(parents=True)

    def kinds() -> list[bool]:
        return [any(word.startswith("shared:") for word in row[6:]) for row in both.mounted_on_server()]

    both.on_client("""
        mount -t qtfs.tmpfs -o make-shared none "$point/d"
        mkdir "$point/d/e"
        mount -t qtfs.tmpfs none "$point/d/e"
    """).check()
    assert kinds() == [True, True], "what is mounted on a shared mount is shared"
    both.on_client('"$qtctl" mount --make-private "$point/d"').check()
    assert kinds() == [False, True]
    both.on_client('mount -t qtfs.none -o make-rprivate none "$point/d"').check()
    assert kinds() == [False, False]
    both.on_client('"$qtctl" umount "$point/d/e"; "$qtctl" umount "$point/d"').check()


def test_an_overlay_of_translated_directories(both: Machines) -> None:
    for name in ("low:er", "lower2", "upper", "work", "merged"):
        (both.share / name).mkdir()
    (both.share / "low:er/one").write_text("1")
    (both.share / "lower2/two").write_text("2")
    outcome = both.on_client("""
        options="lowerdir=$point/low\\:er:$point/lower2,upperdir=$point/upper,workdir=$point/work"
        mount -t qtfs.overlay overlay "$point/merged" -o "$options"
        ls "$point/merged"
        echo new >"$point/merged/three"
        "$qtctl" umount "$point/merged"
    """).check()
    assert outcome.stdout.split() == ["one", "two"]
    assert (both.share / "upper/three").read_text() == "new\n"


def test_an_image_file(both: Machines) -> None:
    image = both.share / "image"
    made = subprocess.run(["truncate", "-s", "8M", image], check=False).returncode
    made = made or subprocess.run(["mkfs.ext4", "-q", image], capture_output=True, check=False).returncode
    if made or not Path("/dev/loop-control").exists():
        pytest.skip("no loop devices, or no mkfs.ext4")
    (both.share / "d").mkdir()
    both.on_client("""
        mount -t qtfs.ext4 "$point/image" "$point/d"
        echo content >"$point/d/file"
        sync -f "$point/d"
    """).check()
    ((*row,),) = both.mounted_on_server("d")
    device = row[-2]
    assert row[-3] == "ext4" and device.startswith("/dev/loop")
    both.on_client('"$qtctl" umount "$point/d"').check()
    wait_until(lambda: str(image) not in subprocess.check_output(["losetup", "-a"], text=True), "the loop device to go")


@pytest.mark.skipif(shutil.which("ip") is None, reason="iproute2 is not installed")
def test_over_a_network(tmp_path: Path) -> None:
    both = Machines(tmp_path, everything_below(tmp_path / "share") | {Type.KILL: ["sleep"]}, network=True)
    with both.running():
        for name in ("d", "to"):
            (both.share / name).mkdir()
        outcome = both.on_client(f"""
            mount -t qtfs.tmpfs none "$point/d"
            echo content >"$point/d/file"
            mount -t qtfs.bind "$point/d" "$point/to"
            cat "$point/to/file"
            "$qtctl" mount
            "$qtctl" umount "$point/to"
            "$qtctl" umount "$point/d"
            "$qtctl" --server "{both.engine.address}" --root "$share" --key-file "{both.key}" ps
            ! "$qtctl" --server "{both.engine.address}" --root "$share" ps
        """).check()
        assert outcome.stdout.startswith("content\nnone on d type tmpfs (rw,nodev,relatime)\nnone on to type tmpfs")
        assert "key_file" in outcome.stderr
        assert not both.mounted_on_server()


# ---- umount


def test_what_a_client_looked_at_is_not_busy(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client("""
        mount -t qtfs.tmpfs none "$point/d"
        for i in $(seq 200); do mkdir -p "$point/d/$i/x"; echo $i >"$point/d/$i/x/file"; done
        find "$point/d" -type f -exec cat {} + >/dev/null
        "$qtctl" umount "$point/d"
        ! test -e "$point/d/1"
    """).check()
    assert not both.mounted_on_server("d")


def test_what_a_client_has_open_is_busy(both: Machines) -> None:
    (both.share / "d").mkdir()
    outcome = both.on_client("""
        mount -t qtfs.tmpfs none "$point/d"
        exec 3>"$point/d/file"
        ! "$qtctl" umount "$point/d"
        echo kept >&3
        exec 3>&-
        test "$(cat "$point/d/file")" = kept
        "$qtctl" umount "$point/d"
    """).check()
    assert "busy" in outcome.stderr
    assert not both.mounted_on_server("d")


def test_a_lazy_unmount_of_what_is_open(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client("""
        mount -t qtfs.tmpfs none "$point/d"
        exec 3<>"$point/d/file"
        echo kept >&3
        "$qtctl" umount --lazy "$point/d"
        ! test -e "$point/d/file"
        echo more >&3
        exec 3>&-
    """).check()
    assert not both.mounted_on_server("d")


# ---- refusals


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ('"$qtctl" mount -t tmpfs none "$scratch"', "not on a qtfs mount"),
        ('"$qtctl" mount -t proc proc "$point/d"', "not permitted"),
        ('"$qtctl" mount -t nosuchfs none "$point/d"', "No such device"),
        ('"$qtctl" mount --bind /etc "$point/d"', "not permitted"),
        ('"$qtctl" mount --bind "$point/missing" "$point/d"', "No such file"),
        ('"$qtctl" mount -t overlay none "$point/d" -o "lowerdir=/etc:/usr"', "not permitted"),
        ('"$qtctl" mount -t tmpfs none "$point"', "busy"),
        ('"$qtctl" mount -t tmpfs none "$point/d" -o nosuch=1', "Invalid argument"),
        ('"$qtctl" umount "$point/d"', "Invalid argument"),
        ('mount -t qtfs.proc proc "$point/d"', "not permitted"),
        ('mount -t qtfs.tmpfs none "$scratch"', "not on a qtfs mount"),
        ('"$qtctl" kill 1', "not permitted"),
        ('"$qtctl" kill 4194304', "No such process"),
        ('"$qtctl" kill -s NOSUCH 1', "no signal"),
        ('"$qtctl" taskset 1', "not permitted"),
    ],
)
def test_refusals(both: Machines, command: str, message: str) -> None:
    (both.share / "d").mkdir()
    outcome = both.on_client(command)
    assert outcome.status != 0 and message in outcome.stderr and "Traceback" not in outcome.stderr, outcome
    assert len(outcome.stderr.splitlines()) == 1
    assert not both.mounted_on_server()


@pytest.mark.parametrize(
    "words",
    [
        *(("kill", "--", pid) for pid in ("0", "-1", "2147483648", "4294967296", "\u00b2", "1_0")),
        *(("kill", "-s", number, "1") for number in ("65", "99999999999", "\u00b2", "9" * 5000)),
        *((command, f"--start={start}", "1") for command in ("kill", "taskset") for start in ("-1", str(1 << 64))),
        ("taskset", "4294967296"),
        *(("taskset", "-c", cpus, "1") for cpus in ("\u00b2", "0-\u00b2", "8192", "1-", "9" * 5000)),
        ("--server", "foo", "ps"),
        ("--config", "/nonexistent", "ps"),
    ],
    ids=lambda words: " ".join(words)[:40],
)
def test_command_lines_that_make_no_sense(tmp_path: Path, words: tuple[str, ...]) -> None:
    """Found out before anybody is asked: there is no server here."""
    outcome = run(QTCTL, "--run-dir", tmp_path, *words)
    assert outcome.status == 2 and "Traceback" not in outcome.stderr, outcome
    assert outcome.stderr.splitlines()[-1].startswith("qtctl") and "no server" not in outcome.stderr, outcome


def test_other_users_cannot_ask_the_daemon(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client('chmod 755 "$run"').check()
    outcome = both.on_client("""
        socket=$(ls "$run"/mount-*.sock)
        stat -c %a "$socket"
        ! setpriv --reuid=65534 --regid=65534 --clear-groups sh -c 'test -w "$1"' - "$socket"
    """).check()
    assert outcome.stdout == "600\n"


# ---- the end of a session


def test_mounts_go_with_an_engine_that_is_stopped(tmp_path: Path) -> None:
    both = Machines(tmp_path)
    with both.running():
        for name in ("stays", "goes"):
            (both.share / name).mkdir()
        both.on_client("""
            "$qtctl" mount -t tmpfs none "$point/stays"
            "$qtctl" mount -t tmpfs none "$point/goes" -o lazy_cleanup
        """).check()
        both.engine.stop()
        assert [row[4] for row in both.mounted_on_server()] == [str(both.share / "stays")]
        both.engine.start()


def test_through_llfuse(tmp_path: Path) -> None:
    pytest.importorskip("llfuse")
    both = Machines(tmp_path, options="driver=llfuse,cache=none")
    with both.running():
        (both.share / "d").mkdir()
        both.on_client("""
            mount -t qtfs.tmpfs none "$point/d"
            mkdir "$point/d/inner"
            "$qtctl" --mount "$point" mount
            "$qtctl" umount "$point/d"
        """).check()
        assert not both.mounted_on_server() and not (both.share / "d/inner").exists()


@pytest.mark.parametrize("lazy_cleanup", [False, True])
def test_what_becomes_of_mounts_when_the_session_ends(tmp_path: Path, lazy_cleanup: bool) -> None:
    both = Machines(tmp_path, options="lazy_cleanup" if lazy_cleanup else "nolazy_cleanup")
    with both.running():
        (both.share / "d").mkdir()
        both.on_client("""
            mount -t qtfs.tmpfs none "$point/d"
            mkdir "$point/d/e"
            mount -t qtfs.tmpfs none "$point/d/e"
        """).check()
        (session,) = both.engine.figures()["sessions"]
        assert len(session["mounts"]) == 2
        both.unmount()
        if lazy_cleanup:
            wait_until(lambda: not both.mounted_on_server(), "the mounts to go with the session")
        assert len(both.mounted_on_server()) == (0 if lazy_cleanup else 2)
        both.mount().check()


@pytest.mark.parametrize("forgotten", [False, True], ids=["that goes on", "that is gone"])
def test_what_becomes_of_mounts_when_the_engine_dies(tmp_path: Path, forgotten: bool) -> None:
    """They belong to the session all the same."""
    both = Machines(tmp_path)
    with both.running():
        for name in ("stays", "goes", "undone"):
            (both.share / name).mkdir()
        both.on_client("""
            "$qtctl" mount -t tmpfs none "$point/stays"
            "$qtctl" mount -t tmpfs none "$point/goes" -o lazy_cleanup
            "$qtctl" mount -t tmpfs none "$point/undone" -o lazy_cleanup
            "$qtctl" umount "$point/undone"
        """).check()
        (before,) = both.engine.figures()["sessions"]
        both.engine.kill()
        if forgotten:
            both.engine.forget_sessions()
        both.engine.start()
        if not forgotten:
            (after,) = both.engine.figures()["sessions"]
            assert len(after["mounts"]) == 2 and after["mounts"] == before["mounts"]
            both.unmount()
        wait_until(lambda: not both.mounted_on_server("goes"), "the mount to go with the session")
        assert [row[4] for row in both.mounted_on_server()] == [str(both.share / "stays")]
        records = both.engine.run_dir / "mounts"
        wait_until(lambda: not list(records.iterdir()), "the records to go")
        if not forgotten:
            both.mount().check()


# ---- what blocks


def test_a_mount_that_never_ends_holds_nothing(tmp_path: Path) -> None:
    """A source below a FUSE mount of the server whose daemon does not answer: two workers serve on."""
    both = Machines(tmp_path)
    both.engine.workers = 2
    with both.running():
        for name in ("hung", "d"):
            (both.share / name).mkdir()
        silent = tmp_path / "silent.py"
        silent.write_text(_SILENT)
        server = both.server.enter()
        with subprocess.Popen(
            [*server, "/usr/bin/env", "python3", silent, str(both.share / "hung")],
            stdout=subprocess.PIPE, env=environment(),
        ) as mounted:
            try:
                assert mounted.stdout is not None and mounted.stdout.readline() == b"mounted\n"
                both.on_client("""
                    for i in 1 2 3; do
                        while "$qtctl" mount --bind "$share/hung/x" "$point/d" 2>&1 | grep -q unavailable; do
                            :
                        done >/dev/null 2>&1 &
                    done
                    mkdir "$point/goes-on"
                    until "$qtctl" mount -t tmpfs none "$point/goes-on" 2>&1 | grep -q unavailable; do
                        "$qtctl" umount "$point/goes-on" || break # the last of them was only just on its way
                    done
                    "$qtctl" ps >/dev/null
                    echo content >"$point/goes-on/file"
                """).check()
            finally:
                mounted.kill()


#: A FUSE file system that answers INIT and nothing else.
_SILENT = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = os.open("/dev/fuse", os.O_RDWR)
options = f"fd={fd},rootmode=40000,user_id=0,group_id=0".encode()
if libc.mount(b"silent", os.fsencode(sys.argv[1]), b"fuse", 0, options) != 0:
    sys.exit(os.strerror(ctypes.get_errno()))
length, opcode, unique = struct.unpack_from("<IIQ", os.read(fd, 65536))
body = struct.pack("<IIIIHHIIHHI7I", 7, 31, 65536, 0, 0, 0, 4096, 0, 1, 0, 0, *[0] * 7)
os.write(fd, struct.pack("<IiQ", 16 + len(body), 0, unique) + body)
print("mounted", flush=True)
while True:
    os.read(fd, 65536)
"""


# ---- processes


def test_processes(both: Machines) -> None:
    with subprocess.Popen(["sleep", "1000"], env=environment()) as victim:
        try:
            listed = both.on_client('"$qtctl" ps').check().stdout.splitlines()
            (row,) = [line.split() for line in listed[1:] if line.split()[0] == str(victim.pid)]
            assert row[-1] == "sleep"
            start = row[-2]
            outcome = both.on_client(f"""
                "$qtctl" kill -s 0 {victim.pid}
                "$qtctl" taskset -c 0 {victim.pid}
                "$qtctl" taskset {victim.pid}
                ! "$qtctl" kill --start {int(start) + 1} {victim.pid}
                "$qtctl" kill --start {start} -s USR1 {victim.pid}
            """).check()
            assert outcome.stdout == "0\n" and "No such process" in outcome.stderr
            assert victim.wait(10) == -10
        finally:
            victim.kill()


def test_without_a_mount(both: Machines) -> None:
    (both.share / "d").mkdir()
    outcome = both.on_client(f"""
        "$qtctl" --server "{both.engine.address}" mount -t tmpfs none "$share/d"
        "$qtctl" --server "{both.engine.address}" --root "$share" mount
        "$qtctl" --server "{both.engine.address}" umount "$share/d"
    """).check()
    assert outcome.stdout.startswith("none on d type tmpfs (rw")
    assert not both.mounted_on_server("d")


def test_a_restarted_engine_is_found_again(both: Machines) -> None:
    (both.share / "d").mkdir()
    both.on_client('"$qtctl" mount -t tmpfs none "$point/d"').check()
    both.engine.stop()
    both.engine.start()
    both.on_client('ls "$point"; "$qtctl" umount "$point/d"').check()
    assert not both.mounted_on_server("d")
