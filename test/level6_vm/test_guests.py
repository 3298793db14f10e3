"""In a virtual machine: a mount of a directory of this machine through a PCI BAR (ivshmem), whose engine runs here; and
engine and client over AF_VSOCK, which hosts and containers that run tests seldom have.

All in one file, so that no two guests are emulated at a time: each has its processor then.
"""

from __future__ import annotations

import hashlib
import mmap
import os
import pickle
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from harness.engine_process import EngineProcess, everything_below, whitelist_text
from harness.guest import (
    USER_NETWORK,
    Boot,
    Guest,
    GuestUnavailable,
    find_kernel,
    ivshmem,
    plug_in_again,
    run_in_guest,
)
from harness.mounts import MountProcess
from harness.waiting import wait_until

from qtfs_common.addresses import ShmAddress, TcpAddress

HERE = Path(__file__).resolve().parent
LEVEL3 = HERE.parent / "level3_mount"
#: Far beyond the minute that they take: emulation was seen to take ten times as long on some machines.
TIMEOUT_S = 900.0
BAR_BYTES = 64 << 20
GRACE_S = 5
LARGE_BYTES = 4 << 20
#: Of it, four times: with 32 KiB in each.
MOST_READS = 512

CONFORMANCE = """
mkdir -p /tmp/local
.venv/bin/python -I test/level6_vm/conformance.py --expected /run/guest/expected --trees /run/guest/trees \\
    /tmp/local /mnt/none
say "conformance"
"""

RESTART = """
for cache in auto none; do
    for flag in fullblock direct; do
        dd if=/mnt/$cache/large of=/tmp/large bs=1M iflag=$flag || die "large, $cache, $flag"
        [ "$(sha256sum </tmp/large)" = "$digest  -" ] || die "other content: $cache, $flag"
    done
done
exec 3</mnt/auto/file
read -r line <&3
[ "$line" = first ] || die "$line"
say "in use"
await restarted
[ "$(cat /mnt/auto/file)" = second ] || die "no content after the restart"
[ "$(cat /mnt/none/file)" = second ] || die "no content after the restart, uncached"
cat <&3 >/dev/null || die "the file that was open did not outlive its engine"
exec 3<&-
echo written >/mnt/none/from-guest
say "works again"
exec 3>>/mnt/auto/file
say "to be cut off"
await never
"""

AFTER_REBOOT = """
echo rebooted >/mnt/auto/from-guest
[ "$(cat /mnt/none/file)" = second ] || die "no content after the reboot"
umount /mnt/auto /mnt/none
say "done"
"""


REMOVAL = """
device=/sys/bus/pci/devices/$(find_ivshmem)
mkdir /mnt/brief
mount -t qtfs "$share" /mnt/brief -o "server=pcie://$(find_ivshmem)/resource2,timeout=1"
daemons=$(pgrep -f qtfs_client.cli | sort)
[ -n "$daemons" ] || die "no daemons"
exec 3</mnt/auto/file
say "in use"
until [ ! -e "$device" ]; do sleep 0.05; done
if cat /mnt/brief/file 2>/tmp/error; then die "a file without a device"; fi
grep -q "Input/output error" /tmp/error || die "$(cat /tmp/error)"
echo written >/mnt/none/from-guest &
writer=$!
cat /mnt/auto/other >/tmp/other &
reader=$!
say "away"
wait "$writer" || die "not written"
wait "$reader" || die "not read"
[ "$(cat /tmp/other)" = other ] || die "$(cat /tmp/other)"
read -r line <&3
[ "$line" = file ] || die "$line"
exec 3<&-
until cat /mnt/brief/file >/dev/null 2>&1; do sleep 0.05; done
[ "$(pgrep -f qtfs_client.cli | sort)" = "$daemons" ] || die "not the daemons that there were"
umount /mnt/auto /mnt/none /mnt/brief
say "done"
"""

#: The other way round: the BAR is the server's. Its files are on a disk of its own.
ENGINE = """
set -eu
. /run/guest/functions
mkdir -p /tmp/share /etc/qtfs
printf '%s' "$whitelist" >/etc/qtfs/whitelist
serve() {
    qtfs_server/engine --listen "pcie://$(find_ivshmem)/resource2" >"$1" 2>&1 &
    engine=$!
    until [ -e "$1" ] && grep -q 'listening on' "$1"; do
        kill -0 $engine || { cat "$1"; exit 1; }
        sleep 0.1
    done
}
serve /tmp/log
echo "== serving"
await kill
kill -9 $engine
serve /tmp/another
echo "== again"
await end
kill $engine
wait $engine
sha256sum </tmp/share/copy
"""


@pytest.fixture
def bar(tmp_path: Path) -> Path:
    """The file behind the BAR."""
    path = tmp_path / "bar"
    with path.open("wb") as file:
        file.truncate(BAR_BYTES)
    return path


@pytest.fixture
def guest(tmp_path: Path, bar: Path) -> Guest:
    scratch = tmp_path / "guest"
    scratch.mkdir()
    try:
        return Guest(scratch, devices=[*ivshmem(bar, BAR_BYTES), *USER_NETWORK])
    except GuestUnavailable as reason:
        pytest.skip(str(reason))


@pytest.fixture
def server(tmp_path: Path, bar: Path) -> Iterator[EngineProcess]:
    engine = EngineProcess(tmp_path / "engine", arguments=["--grace", str(GRACE_S)], workers=8)
    engine.listen = f"shm://{bar}?bell=tcp://127.0.0.1:0"
    with engine.running():
        yield engine


@pytest.fixture
def scenarios(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Modules of level 3."""
    monkeypatch.syspath_prepend(str(LEVEL3))
    import kit
    import scenarios_files

    return kit, scenarios_files


def _script(server: EngineProcess, *parts: str) -> str:
    assert isinstance(server.address, ShmAddress) and isinstance(server.address.bell, TcpAddress)
    return f"share={server.share}\nport={server.address.bell.port}\n" + (HERE / "pcie.sh").read_text() + "".join(parts)


def _restart_under_use(server: EngineProcess, boot: Boot) -> None:
    boot.wait_for_text("== in use", TIMEOUT_S)
    assert server.figures()["requests"]["READ"] < MOST_READS, "what is read fails, or is asked for page by page"
    server.kill()
    (server.share / "file").write_text("second\n")
    server.start()
    boot.tell("restarted")
    boot.wait_for_text("== to be cut off", TIMEOUT_S)
    assert (server.share / "from-guest").read_text() == "written\n"


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_conformance_over_a_bar(guest: Guest, server: EngineProcess, scenarios: Any) -> None:
    """As on a disk of the guest's own; and the trees that this machine then has are those of that disk.

    Uncached, so that each call goes over the BAR. Emulation takes two minutes for it; the default cache, with which the
    same set runs over shared memory on the host, is used in the guest by the tests below.
    """
    kit, files = scenarios
    # The size of a file system is the server's.
    (guest.job / "expected").write_bytes(pickle.dumps({"statfs": kit.in_child(files.statfs, str(server.share))}))
    with guest.booted(_script(server, CONFORMANCE, "umount /mnt/auto /mnt/none\n")) as boot:
        result = boot.result(TIMEOUT_S).check()
    wait_until(server.is_idle, "the engine to let everything go", GRACE_S + 10)
    trees = pickle.loads((guest.job / "trees").read_bytes())
    for name, tree in trees.items():
        assert kit.tree(server.share / "none" / name) == tree, name
    print(f"{result.seconds:.0f} s\n{result.output}")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_restart_of_the_engine_and_reboot_of_the_guest(guest: Guest, server: EngineProcess) -> None:
    """What was open goes on, and the mounts; after a power cut the same BAR serves the next boot."""
    large = os.urandom(LARGE_BYTES)
    (server.share / "large").write_bytes(large)
    (server.share / "file").write_text("first\n")
    digest = f"digest={hashlib.sha256(large).hexdigest()}\n"
    with guest.booted(digest + _script(server, RESTART)) as boot:
        _restart_under_use(server, boot)
        boot.kill()
    with guest.booted(_script(server, AFTER_REBOOT)) as boot:
        boot.result(TIMEOUT_S).check()
    assert (server.share / "from-guest").read_text() == "rebooted\n"
    wait_until(server.is_idle, "the engine to let everything go", GRACE_S + 10)


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_a_device_that_is_taken_away_and_comes_back(guest: Guest, server: EngineProcess, bar: Path) -> None:
    """While it is away calls wait, and get EIO after the timeout; then all goes on, and so do the daemons."""
    for name in ("file", "other"):
        (server.share / name).write_text(f"{name}\n")
    with guest.booted(_script(server, REMOVAL)) as boot:
        boot.wait_for_text("== in use", TIMEOUT_S)
        boot.monitor("device_del", id="ivshmem")
        boot.wait_for_text("== away", TIMEOUT_S)
        plug_in_again(boot, bar, BAR_BYTES)
        boot.result(TIMEOUT_S).check()
    assert (server.share / "from-guest").read_text() == "written\n"
    wait_until(server.is_idle, "the engine to let everything go", GRACE_S + 10)


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.root
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_an_engine_that_has_the_bar(guest: Guest, bar: Path, tmp_path: Path) -> None:
    """It serves this machine, to which the BAR is a file; it dies, and the next one goes on."""
    elsewhere = EngineProcess(tmp_path / "elsewhere")
    whitelist = f"whitelist='{whitelist_text(everything_below('/tmp/share'))}'\n"
    large = os.urandom(LARGE_BYTES)
    mount = MountProcess(elsewhere, Path("/tmp/share"), tmp_path / "mnt", through=ShmAddress(str(bar)))
    with guest.booted(whitelist + ENGINE) as boot:
        boot.wait_for_text("== serving", TIMEOUT_S)
        with mount.running():
            with (mount.point / "large").open("w+b", buffering=0) as file:
                assert file.write(large) == len(large)
                boot.tell("kill")
                boot.wait_for_text("== again", TIMEOUT_S)
                assert read_directly(mount.point / "large", len(large)) == large
                assert os.pread(file.fileno(), 5, LARGE_BYTES - 5) == large[-5:]
            shutil.copy(mount.point / "large", mount.point / "copy")
            assert sorted(os.listdir(mount.point)) == ["copy", "large"]
        boot.tell("end")
        result = boot.result(TIMEOUT_S).check()
    assert hashlib.sha256(large).hexdigest() in result.output


def read_directly(path: Path, size: int) -> bytes:
    """With O_DIRECT, for which a mapping has the alignment."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:
        with mmap.mmap(-1, size) as room:
            assert os.preadv(fd, [room], 0) == size
            return room[:]
    finally:
        os.close(fd)


# ---- vsock


@pytest.fixture
def kernel() -> None:
    try:
        find_kernel()
    except GuestUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_the_whole_job_over_vsock(kernel: None, tmp_path: Path) -> None:
    """Started word for word as the README says: mounts, checks, git, a killed engine, the end."""
    result = run_in_guest((HERE / "inside.sh").read_text(), tmp_path, TIMEOUT_S).check()
    assert "0 failed" in result.output and "== done" in result.output
    print(f"{result.seconds:.0f} s\n{result.output}")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(2 * TIMEOUT_S)
def test_conformance_over_vsock(kernel: None, tmp_path: Path) -> None:
    result = run_in_guest((HERE / "vsock.sh").read_text(), tmp_path, TIMEOUT_S).check()
    assert " on vsock: 0 differ" in result.output
    assert "== silent machines are told something" in result.output
    print(f"{result.seconds:.0f} s\n{result.output}")
