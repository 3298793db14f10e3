"""A QEMU guest for tests: a stock kernel, this machine's files, one script.

    result = run_in_guest("uname -r; exit 3", scratch=tmp_path, timeout_s=60)
    result.status == 3, result.output == "6.1.0-...\\n"

    guest = Guest(tmp_path, devices=ivshmem(tmp_path / "bar", 64 << 20))
    with guest.booted(". /run/guest/functions; echo ready at $(find_ivshmem); await go; echo gone") as boot:
        boot.wait_for_text("ready", timeout_s=60)
        boot.tell("go")
        boot.result(timeout_s=60).check()

The guest is emulated (no KVM), so it starts anywhere in some 5 s and runs several times slower than this machine. Its
root is this machine's ``/``, read-only over 9p, under an overlay in the guest's memory: it sees this checkout and the
tools at their usual places and can change nothing. ``/tmp`` in it is an ext4 of its own, and the script's directory
``/run/guest`` is shared both ways, so that output survives a crash of the guest.

Flow: QEMU loads kernel and initrd; the initrd's ``/init`` loads modules, mounts, and switches to ``/run/guest/stage2``;
that runs ``/run/guest/script``, writes its exit status and powers off. A panic ends QEMU (``panic=-1 -no-reboot``), a
hang runs into the timeout; both raise GuestError with the tail of console and output. A Guest can be booted again, also
after its QEMU was killed: its disk and the shared directory stay.
"""

from __future__ import annotations

import contextlib
import json
import lzma
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

CHECKOUT = Path(__file__).resolve().parents[2]
#: What the initrd needs to reach the root; everything else is loaded by modprobe inside.
BOOT_MODULES = ("virtio_pci", "9pnet_virtio", "9p", "overlay")
#: Where the script's directory is in the guest.
INSIDE = "/run/guest"
_TAIL_LINES = 40
#: QEMU's arguments for a network card from which the guest reaches this machine's loopback addresses as 10.0.2.2.
USER_NETWORK = ("-netdev", "user,id=network", "-device", "virtio-net-pci,netdev=network,romfile=")
_IVSHMEM_SLOT = "0x10"  # the same when it comes again
_MONITOR = ("-chardev", "stdio,id=monitor", "-mon", "monitor,mode=control")
_KILL_TIMEOUT_S = 20.0
_ANSWER_TIMEOUT_S = 60.0
# lsm: Linux 6.1 with an empty bpf module lets users without capabilities write security.* attributes.
_KERNEL_ARGUMENTS = "console=ttyS0 panic=-1 oops=panic loglevel=5 random.trust_cpu=on mitigations=off lsm=capability"

_INIT = """#!/bin/busybox sh
set -e
/bin/busybox --install -s /bin
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules.order); do insmod "$module"; done
nine=trans=virtio,version=9p2000.L,msize=512000
mount -t 9p -o ro,cache=loose,$nine host /lower
mount -t tmpfs -o size=50% tmpfs /above
mkdir /above/upper /above/work
mount -t overlay -o lowerdir=/lower,upperdir=/above/upper,workdir=/above/work root /new
mount -t tmpfs -o mode=755 tmpfs /new/run
mkdir /new/run/guest
mount -t 9p -o cache=none,$nine job /new/run/guest
exec switch_root /new /bin/sh /run/guest/stage2
"""

_STAGE2 = """
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8
set -e
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs tmpfs /dev/shm
mount -t devpts devpts /dev/pts
# The guest's own /run and /tmp may hide a checkout that is in there.
show_checkout() {
    [ ! -d "@CHECKOUT@" ] || return 0
    mkdir -p "@CHECKOUT@"
    mount -t 9p -o ro,cache=loose,trans=virtio,version=9p2000.L,msize=512000 checkout "@CHECKOUT@"
}
show_checkout
mkdir -p /lib/modules/@RELEASE@
mount --bind "@MODULES@" /lib/modules/@RELEASE@
modprobe -a virtio_blk ext4 fuse
chmod 666 /dev/fuse
mount -t ext4 -o user_xattr,acl /dev/vda /tmp
chmod 1777 /tmp
show_checkout
ip link set lo up
hostname guest
set +e
cd "@CHECKOUT@"
/bin/sh @INSIDE@/script >@INSIDE@/output 2>&1 </dev/null
echo $? >@INSIDE@/status.new
mv @INSIDE@/status.new @INSIDE@/status
sync
busybox poweroff -f
"""

#: Beside the script, for scripts.
_FUNCTIONS = """
await() { # WORD: until Boot.tell says it
    until [ -e "@INSIDE@/told.$1" ]; do sleep 0.05; done
}
find_ivshmem() { # prints the bus, device and function of the PCI device
    for device in /sys/bus/pci/devices/*; do
        [ "$(cat "$device/vendor" "$device/device" | tr -d '\\n')" = 0x1af40x1110 ] || continue
        echo "${device##*/}"
        return
    done
    return 1
}
"""


class GuestError(Exception):
    """The guest gave no exit status; says how it ended and shows the tail of what it wrote."""


class GuestUnavailable(Exception):
    """This machine cannot boot a guest; says what is missing."""


@dataclass(frozen=True)
class GuestResult:
    """What the script did: exit status, output and errors together, the kernel's messages, seconds it all took."""

    status: int
    output: str
    console: str
    seconds: float

    def check(self) -> GuestResult:
        """Itself if the script succeeded; raises GuestError if not."""
        if self.status != 0:
            raise GuestError(f"the script in the guest ended with {self.status}\n{self.output}\n{_tail(self.console)}")
        return self


@dataclass(frozen=True)
class _Files:
    """Where things of a guest are."""

    scratch: Path

    @property
    def job(self) -> Path:
        return self.scratch / "job"

    @property
    def output(self) -> Path:
        return self.job / "output"

    @property
    def status(self) -> Path:
        return self.job / "status"

    @property
    def console(self) -> Path:
        return self.scratch / "console"

    @property
    def log(self) -> Path:
        """QEMU's own."""
        return self.scratch / "qemu"


@dataclass(frozen=True)
class Kernel:
    """A kernel image and the directory of its modules."""

    image: Path
    modules: Path

    @property
    def release(self) -> str:
        return self.modules.name


def find_kernel() -> Kernel:
    """The kernel that scripts/guest-kernel.sh knows of, without fetching one. Raises GuestUnavailable."""
    for tool in ("qemu-system-x86_64", "busybox", "cpio", "mke2fs", "setpriv"):
        if shutil.which(tool, path=_path()) is None:
            raise GuestUnavailable(f"no {tool} here (run: make deps)")
    command = [str(CHECKOUT / "scripts/guest-kernel.sh"), "--offline"]
    found = subprocess.run(command, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise GuestUnavailable("no kernel for a guest here (run: make deps)")
    image, modules = map(Path, found.stdout.splitlines())
    return Kernel(image, modules)


def ivshmem(path: Path, size_bytes: int) -> list[str]:
    """QEMU's arguments for a PCI device whose BAR 2 is a file of this machine, made if need be, of 2^n bytes."""
    backend = f"memory-backend-file,id=bar,share=on,mem-path={str(path).replace(',', ',,')},size={size_bytes}"
    return ["-object", backend, "-device", f"ivshmem-plain,memdev=bar,id=ivshmem,addr={_IVSHMEM_SLOT}"]


def plug_in_again(boot: Boot, path: Path, size_bytes: int) -> None:
    """The device of `ivshmem`, after device_del. QEMU 7.2 does not survive the same backend twice."""
    backend = {"share": True, "mem_path": str(path), "size": size_bytes}
    boot.monitor("object-add", qom_type="memory-backend-file", id="again", **backend)
    boot.monitor("device_add", driver="ivshmem-plain", memdev="again", id="ivshmem", addr=_IVSHMEM_SLOT)


class Boot:
    """A guest that runs a script."""

    def __init__(self, process: subprocess.Popen[bytes], files: _Files) -> None:
        self._process = process
        self._files = files
        self._begun = time.monotonic()

    def wait_for_text(self, text: str, timeout_s: float) -> None:
        """Until the script has printed this. Raises GuestError if the guest ends before, or time is over."""
        deadline = time.monotonic() + timeout_s
        while text not in _read(self._files.output):
            ended = self._process.poll() is not None
            if (ended and text not in _read(self._files.output)) or time.monotonic() > deadline:
                raise self._failure(f"did not say {text!r}: it {'ended' if ended else 'still runs'}")
            time.sleep(0.05)

    def tell(self, word: str) -> None:
        """Let `await WORD` of the script return."""
        (self._files.job / f"told.{word}").touch()

    def monitor(self, command: str, **arguments: object) -> None:
        """Have QEMU carry out a command of its machine protocol, arguments with `_` for `-`. Raises GuestError."""
        assert self._process.stdin is not None
        names = {name.replace("_", "-"): value for name, value in arguments.items()}
        before = len(self._answers())
        self._process.stdin.write(json.dumps({"execute": command, "arguments": names}).encode())
        self._process.stdin.flush()
        deadline = time.monotonic() + _ANSWER_TIMEOUT_S
        while len(self._answers()) == before:
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise self._failure(f"did not answer {command}")
            time.sleep(0.01)
        if (answer := self._answers()[before]).startswith('{"error"'):
            raise self._failure(f"cannot {command}: {answer}")

    def _answers(self) -> list[str]:
        """QEMU's to its commands, one a line in its log."""
        lines = _read(self._files.log).split("\n")[:-1]
        return [line for line in lines if line.startswith(('{"return"', '{"error"'))]

    def kill(self) -> None:
        """The power goes off: nothing is written, nobody is told."""
        self._process.kill()
        self._process.wait(_KILL_TIMEOUT_S)

    def result(self, timeout_s: float) -> GuestResult:
        """What came of the script, once the guest has powered off."""
        try:
            status = self._process.wait(timeout_s)
            ended = f"stopped (QEMU's status {status}: {_read(self._files.log).strip() or 'no message'})"
        except subprocess.TimeoutExpired:
            self.kill()
            ended = f"was not done after {timeout_s:.0f} s"
        if not (said := _read(self._files.status).strip()):
            raise self._failure(ended)
        output, console = _read(self._files.output), _read(self._files.console)
        return GuestResult(int(said), output, console, time.monotonic() - self._begun)

    def _failure(self, ended: str) -> GuestError:
        output, console = _tail(_read(self._files.output)), _tail(_read(self._files.console))
        return GuestError("\n".join((f"the guest {ended}", "--- output", output, "--- console", console)))


class Guest:
    """What can be booted, and again: initrd, disk, and the directory `job` that both machines see."""

    def __init__(
        self, scratch: Path, *, cores: int = 1, memory_mib: int = 2048, devices: Sequence[str] = ()
    ) -> None:
        """``scratch`` is an empty directory; ``devices`` are further arguments of QEMU.

        One processor is emulated unless ``cores`` says otherwise: several wait for each other wherever this machine is
        busy, and then take seven times as long.

        Raises GuestUnavailable if there is nothing to boot.
        """
        self._kernel = find_kernel()
        self._files = _Files(scratch)
        self.job = self._files.job
        self.job.mkdir()
        (self.job / "stage2").write_text(_filled(_STAGE2, self._kernel))
        (self.job / "functions").write_text(_filled(_FUNCTIONS, self._kernel))
        self._initrd, self._disk = _initrd(self._kernel, scratch), _disk(scratch)
        self._options = ["-smp", str(cores), "-m", f"{memory_mib}M", *devices]

    @contextlib.contextmanager
    def booted(self, script: str) -> Iterator[Boot]:
        """Boot, and run the shell script as root with this checkout as its directory. At the end QEMU is killed."""
        for old in (self._files.status, self._files.output, *self.job.glob("told.*")):
            old.unlink(missing_ok=True)
        (self.job / "script").write_text(script)
        with _started(self._command(), self._files.log) as process:
            boot = Boot(process, self._files)
            boot.monitor("qmp_capabilities")
            yield boot

    def _command(self) -> list[str]:
        return [
            *("setpriv", "--pdeathsig", "KILL", "qemu-system-x86_64", "-nodefaults", "-no-user-config"),
            # An old processor: emulated programs lose a seventh to what newer ones check at each entry to the kernel.
            *("-display", "none", "-accel", "tcg,thread=multi", "-cpu", "Nehalem", "-no-reboot", *self._options),
            *("-kernel", str(self._kernel.image), "-initrd", str(self._initrd)),
            *("-serial", f"file:{self._files.console}", *_MONITOR),
            *("-append", _KERNEL_ARGUMENTS),
            *("-virtfs", _shared(Path("/"), "host") + ",readonly=on"),
            *("-virtfs", _shared(CHECKOUT, "checkout") + ",readonly=on"),
            *("-virtfs", _shared(self.job, "job")),
            *("-drive", f"file={self._disk},if=virtio,format=raw,cache=unsafe"),
        ]


def run_in_guest(script: str, scratch: Path, timeout_s: float) -> GuestResult:
    """Boot a guest, run the shell script in it, and power it off: see Guest.

    Raises GuestError if the guest crashes or is not done in time, GuestUnavailable if there is nothing to boot.
    """
    with Guest(scratch).booted(script) as boot:
        return boot.result(timeout_s)


# ---------------------------------------------------------------------------------------------------- what it boots


def _path() -> str:
    return os.environ.get("PATH", os.defpath) + ":/usr/sbin:/sbin"


def _shared(path: Path, tag: str) -> str:
    """-virtfs: a directory of this machine, under a name for the guest's mount."""
    text = str(path).replace(",", ",,")
    return f"local,path={text},mount_tag={tag},security_model=none,multidevs=remap"


def _filled(text: str, kernel: Kernel) -> str:
    values = {"RELEASE": kernel.release, "MODULES": kernel.modules, "CHECKOUT": CHECKOUT, "INSIDE": INSIDE}
    for name, value in values.items():
        text = text.replace(f"@{name}@", str(value))
    return text


def _load_order(kernel: Kernel, wanted: Sequence[str]) -> list[Path]:
    """Files of the modules and of what they need, each after its own needs; built-in ones are left out."""
    needs: dict[str, list[str]] = {}
    for line in (kernel.modules / "modules.dep").read_text().splitlines():
        path, _, others = line.partition(":")
        needs[path] = others.split()
    by_name = {Path(path).name.partition(".ko")[0].replace("-", "_"): path for path in needs}
    order: list[str] = []

    def add(path: str) -> None:
        for other in needs[path]:
            add(other)
        if path not in order:
            order.append(path)

    for name in wanted:
        if name in by_name:
            add(by_name[name])
    return [kernel.modules / path for path in order]


def _module_bytes(path: Path) -> bytes:
    if path.suffix == ".xz":
        return lzma.decompress(path.read_bytes())
    if path.suffix == ".zst":
        return subprocess.run(["zstd", "-dcq", path], check=True, capture_output=True).stdout
    return path.read_bytes()


def _initrd(kernel: Kernel, scratch: Path) -> Path:
    root = scratch / "initrd.d"
    for name in ("bin", "proc", "sys", "dev", "lower", "above", "new", "modules"):
        (root / name).mkdir(parents=True)
    busybox = shutil.which("busybox", path=_path())
    assert busybox is not None
    shutil.copy(busybox, root / "bin/busybox")
    names = []
    for module in _load_order(kernel, BOOT_MODULES):
        names.append(f"/modules/{module.name.partition('.ko')[0]}.ko")
        (root / names[-1].lstrip("/")).write_bytes(_module_bytes(module))
    (root / "modules.order").write_text("\n".join(names))
    (root / "init").write_text(_INIT)
    (root / "init").chmod(0o755)
    initrd = scratch / "initrd"
    files = "\n".join(str(p.relative_to(root)) for p in sorted(root.rglob("*")))
    with initrd.open("wb") as out:
        subprocess.run(["cpio", "-o", "-H", "newc", "--quiet"], cwd=root, input=files.encode(), stdout=out, check=True)
    return initrd


def _disk(scratch: Path) -> Path:
    disk = scratch / "disk"
    with disk.open("wb") as file:
        file.truncate(4 << 30)
    command = ["mke2fs", "-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1", str(disk)]
    subprocess.run(command, check=True, env={**os.environ, "PATH": _path()})
    return disk


# ---------------------------------------------------------------------------------------------------------- running


@contextlib.contextmanager
def _started(command: Sequence[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=out, stderr=out, start_new_session=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _read(path: Path) -> str:
    return path.read_text(errors="replace") if path.exists() else ""


def _tail(text: str) -> str:
    return "\n".join(text.splitlines()[-_TAIL_LINES:])
