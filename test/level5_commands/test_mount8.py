"""mount(8), fstab(5) and ordinary users: through /sbin/mount.qtfs, as distributions call it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from commandline import daemons, run
from harness.engine_process import EngineProcess, everything_below
from harness.waiting import wait_until
from namespaces import Namespace

NOBODY = 65534
AS_NOBODY = f"setpriv --reuid={NOBODY} --regid={NOBODY} --clear-groups"


@pytest.fixture(scope="module")
def tcp(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineProcess]:
    """An engine that other users may connect to; the socket file of a Unix address is for root only."""
    area = tmp_path_factory.mktemp("tcp")
    share = area / "share"
    share.mkdir(mode=0o755)
    (share / "file").write_text("content")
    with EngineProcess(area, "tcp", rules=everything_below(share)).running() as engine:
        yield engine


@pytest.fixture
def namespace(tmp_path: Path, point: Path, tcp: EngineProcess) -> Namespace:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    variables = {"source": str(tcp.share), "point": str(point), "server": f"server={tcp.address}"}
    return Namespace(scratch, variables=variables)


# ------------------------------------------------------------------------------------------------------------ mount(8)


def test_mount_t_qtfs(namespace: Namespace) -> None:
    outcome = namespace.run("""
        mount -t qtfs "$source" "$point" -o "$server"
        cat "$point/file"; echo
        findmnt -no FSTYPE,SOURCE "$point"
        umount "$point"
        ! findmnt "$point"
    """).check()
    assert outcome.stdout.split() == ["content", "fuse.qtfs", namespace.variables["source"]]
    assert outcome.stderr == ""


def test_options_reach_the_helper(namespace: Namespace) -> None:
    outcome = namespace.run("""
        options=nosuid,noexec,_netdev,nofail,x-systemd.idle-timeout=1,user
        mount -v -n -r -t qtfs "$source" "$point" -o "$server,$options"
        findmnt -no OPTIONS "$point"
    """).check()
    assert "mounted on" in outcome.stdout
    assert {"ro", "nosuid", "nodev", "noexec"} <= set(outcome.stdout.splitlines()[-1].split(","))


@pytest.mark.parametrize(
    ("source", "options", "status", "message"),
    [
        ("/etc", "", 32, "whitelist"),
        ("/srv", "server=tcp://127.0.0.1:1", 32, "refused"),
        ("/srv", "speed=9", 1, "unknown option 'speed=9'"),
    ],
)
def test_failures_come_through(namespace: Namespace, source: str, options: str, status: int, message: str) -> None:
    outcome = namespace.run(f'mount -t qtfs {source} "$point" -o "$server,{options}"')
    assert outcome.status == status and message in outcome.stderr and not outcome.stdout


def test_a_remount_is_refused(namespace: Namespace) -> None:
    outcome = namespace.run("""
        mount -t qtfs "$source" "$point" -o "$server"
        mount -t qtfs -o remount,ro "$source" "$point"
    """)
    assert outcome.status == 1 and "'remount'" in outcome.stderr


def test_into_another_namespace(namespace: Namespace, point: Path) -> None:
    """mount -N: the helper finds itself in the namespace that was asked for, or is told which."""
    outcome = namespace.run("""
        unshare -m sleep 60 & other=$!
        while [ "$(readlink /proc/$other/ns/mnt)" = "$(readlink /proc/self/ns/mnt)" ]; do sleep 0.05; done
        "$helper" "$source" "$point" -N $other -o "$server"
        ! findmnt "$point"
        cat "/proc/$other/root$point/file"
        nsenter -t $other -m umount "$point"
        kill $other
    """).check()
    assert outcome.stdout == "content"


def test_a_namespace_of_which_nothing_is_executed(namespace: Namespace) -> None:
    """mount.qtfs -N: the mount point is one of that namespace, and its programs may be anybody's."""
    outcome = namespace.run("""
        export point
        unshare -m sh -ec 'mount -t tmpfs none "$point"; mkdir "$point/inner"
                           printf "#!/bin/sh\n: >%s/trapped\n" "$point" >"$point/trap"; chmod 755 "$point/trap"
                           for program in sync umount fusermount3 mount; do
                               mount --bind "$point/trap" "$(command -v $program)"
                           done
                           : >"$point/ready"; exec sleep 25' & other=$!
        root=/proc/$other/root$point
        while [ ! -e "$root/ready" ]; do sleep 0.05; done
        "$helper" "$source" "$point/inner" -N $other -o "$server,foreground" & daemon=$!
        while [ ! -e "$root/inner/file" ]; do sleep 0.05; done
        cat "$root/inner/file"
        kill $daemon
        wait $daemon
        ls "$root" "$root/inner"
        kill $other
    """).check()
    assert outcome.stdout.split("\n", 1)[0].startswith("content")
    assert "trapped" not in outcome.stdout


# --------------------------------------------------------------------------------------------------------------- fstab


def _line(namespace: Namespace, options: str, point: Path | None = None) -> str:
    values = namespace.variables
    return f"{values['source']} {point or values['point']} qtfs {values['server']},{options} 0 0"


def test_fstab(namespace: Namespace) -> None:
    namespace.fstab = [_line(namespace, "defaults,_netdev,nofail,x-systemd.mount-timeout=10")]
    outcome = namespace.run("""
        mount "$point"; cat "$point/file"; umount "$point"
        mount "$source"; cat "$point/file"; umount "$point"
        ! findmnt "$point"
    """).check()
    assert outcome.stdout == "content" * 2


def test_another_fstab(namespace: Namespace) -> None:
    outcome = namespace.run(f"""
        echo '{_line(namespace, "ro")}' >"$scratch/other"
        mount -T "$scratch/other" "$point"
        cat "$point/file"
        ! touch "$point/file"
    """)
    assert outcome.check().stdout == "content" and "Read-only" in outcome.stderr


def test_mount_all_twice(namespace: Namespace) -> None:
    """What is mounted already is not mounted again; noauto is left alone."""
    namespace.fstab = [_line(namespace, "nofail"), _line(namespace, "noauto", Path("/mnt"))]
    outcome = namespace.run("""
        mount -a -t qtfs
        mount -a -t qtfs
        findmnt -nl -t fuse.qtfs -o TARGET
        umount -a -t fuse.qtfs
        ! findmnt "$point"
    """).check()
    assert outcome.stdout == f"{namespace.variables['point']}\n"


def test_an_automatic_mount_point(namespace: Namespace) -> None:
    namespace.fstab = [_line(namespace, "X-mount.mkdir", Path(namespace.variables["point"]) / "made")]
    assert namespace.run('mount "$point/made"; cat "$point/made/file"').check().stdout == "content"


# ------------------------------------------------------------------------------------------------------- ordinary users


@pytest.fixture
def own(namespace: Namespace, point: Path) -> Iterator[Path]:
    """A mount point that belongs to nobody and can be reached by everybody."""
    reason = namespace.why_not_for_others()
    if reason:
        pytest.skip(f"no command for other users: {reason}")
    path = Path(f"/tmp/qtfs-own-{os.urandom(4).hex()}")
    path.mkdir()
    os.chown(path, NOBODY, NOBODY)
    namespace.variables |= {"own": str(path), "nobody": f"{AS_NOBODY} env QTFS_RUN_DIR={path}.run"}
    try:
        yield path
        run("umount", "-l", path)
        wait_until(lambda: not daemons(path), "the daemon to end")
    finally:
        shutil.rmtree(f"{path}.run", ignore_errors=True)
        path.rmdir()


def test_a_user_s_own_mount(namespace: Namespace, own: Path, tcp: EngineProcess) -> None:
    """Through fusermount3: for that user alone, without suid and devices, taken away by the user too."""
    outcome = namespace.run("""
        $nobody "$helper" "$source" "$own" -o "$server"
        findmnt -no FSTYPE,OPTIONS "$own"
        $nobody cat "$own/file"
        ! cat "$own/file"
        $nobody fusermount3 -u "$own"
        ! findmnt "$own"
    """).check()
    kind, options = outcome.stdout.splitlines()[0].split()
    assert kind == "fuse.qtfs" and outcome.stdout.endswith("\ncontent")
    assert {"nosuid", "nodev", f"user_id={NOBODY}"} <= set(options.split(",")) and "allow_other" not in options
    assert "Permission denied" in outcome.stderr


def test_a_user_may_do_what_the_server_lets_them(namespace: Namespace, own: Path, tcp: EngineProcess) -> None:
    open_directory = tcp.share / "open"
    open_directory.mkdir(exist_ok=True)
    open_directory.chmod(0o777)
    outcome = namespace.run("""
        $nobody "$helper" "$source" "$own" -o "$server"
        $nobody sh -c 'echo mine >"$0/open/new"' "$own"
        ! $nobody sh -c 'echo not mine >"$0/file"' "$own"
        $nobody umount "$own"
    """).check()
    new = tcp.share / "open/new"
    assert (new.read_text(), new.stat().st_uid, new.stat().st_gid) == ("mine\n", NOBODY, NOBODY)
    assert "Permission denied" in outcome.stderr
    assert (tcp.share / "file").read_text() == "content"


def test_a_user_may_not_mount_everywhere(namespace: Namespace, own: Path) -> None:
    outcome = namespace.run('chmod 755 "$own"; chown 0:0 "$own"; $nobody "$helper" "$source" "$own" -o "$server"')
    assert outcome.status == 32 and "Traceback" not in outcome.stderr
    assert str(own) in outcome.stderr


def test_the_user_option_in_fstab(namespace: Namespace, own: Path) -> None:
    """mount(8) drops its privileges before it runs the helper: it is the user's own mount again."""
    if not os.stat(shutil.which("mount") or "/bin/mount").st_mode & 0o4000:
        pytest.skip("mount(8) is not setuid here")
    namespace.fstab = [_line(namespace, "user,noauto", own)]
    outcome = namespace.run("""
        $nobody mount "$own"
        findmnt -no OPTIONS "$own"
        $nobody cat "$own/file"
        $nobody umount "$own"
        ! findmnt "$own"
    """).check()
    assert {"nosuid", "nodev", "noexec", f"user_id={NOBODY}"} <= set(outcome.stdout.splitlines()[0].split(","))


def test_root_takes_a_user_s_mount_away(namespace: Namespace, own: Path) -> None:
    namespace.run('$nobody "$helper" "$source" "$own" -o "$server"; umount "$own"; ! findmnt "$own"').check()


def test_the_user_s_dead_mount(namespace: Namespace, own: Path) -> None:
    """Mounting over it works for the user as it does for root."""
    outcome = namespace.run("""
        $nobody "$helper" "$source" "$own" -o "$server"
        kill -9 $(pgrep -f "qtfs_client.cli $source $own")
        while stat "$own" 2>/dev/null; do sleep 0.05; done
        sleep 0.2
        $nobody "$helper" "$source" "$own" -o "$server"
        $nobody cat "$own/file"
        umount "$own"
    """).check()
    assert outcome.stdout.endswith("content")
