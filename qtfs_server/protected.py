"""Files of pseudo file systems that clients may not see or change, whatever the whitelist permits above them.

They are named within their file system, so that it does not matter where that is mounted: a container's own /proc below
an exported directory is no way round. A line of the whitelist that names such a path or one below it opens it again for
its type, as does a rule `remote` of special.toml. The model is what runc and Docker mask or make read-only in
containers; what a management plane writes every day (the rest of /proc/sys, cgroups, drivers' bind and new_id) stays.
"""

from __future__ import annotations

import os
import re
from typing import NamedTuple

HIDDEN = "hidden"
READ_ONLY = "read-only"

#: Paths on file systems of other kinds; these are where the kernel's devices are by convention.
DEVICES = (b"/dev/mem", b"/dev/kmem", b"/dev/port", b"/dev/kmsg")

PROC = 0x9FA0
#: f_type of <linux/magic.h>: level: paths within the file system.
PROTECTED: dict[int, dict[str, tuple[bytes, ...]]] = {
    PROC: {
        HIDDEN: (
            b"/kcore",  # the kernel's memory
            b"/vmcore",  # the memory of the kernel that crashed
            b"/kmsg",  # who reads it takes messages from the server's own log, and waits for more
            b"/[pid]/mem",  # any process's memory: keys, and by writing, its code
            b"/[pid]/task/[pid]/mem",
        ),
        READ_ONLY: (
            b"/sysrq-trigger",  # reboots, kills, crashes
            b"/acpi",  # power
            b"/bus",  # configuration space of devices
            b"/irq",  # takes interrupts from devices
            b"/mtrr",
            b"/scsi",  # takes disks away
            b"/fs/nfsd",
            # Programs that the kernel runs as root, and what it trusts:
            b"/sys/kernel/core_pattern",
            b"/sys/kernel/core_pipe_limit",
            b"/sys/kernel/modprobe",
            b"/sys/kernel/hotplug",
            b"/sys/kernel/poweroff_cmd",
            b"/sys/kernel/usermodehelper",
            b"/sys/kernel/firmware_config",
            b"/sys/kernel/acct",
            b"/sys/kernel/modules_disabled",
            b"/sys/kernel/kexec_load_disabled",
            b"/sys/kernel/sysrq",
            b"/sys/kernel/cad_pid",
            # Defences of the server:
            b"/sys/kernel/randomize_va_space",
            b"/sys/kernel/kptr_restrict",
            b"/sys/kernel/dmesg_restrict",
            b"/sys/kernel/perf_event_paranoid",
            b"/sys/kernel/unprivileged_bpf_disabled",
            b"/sys/kernel/yama",
            b"/sys/fs/suid_dumpable",
            b"/sys/fs/protected_hardlinks",
            b"/sys/fs/protected_symlinks",
            b"/sys/fs/protected_fifos",
            b"/sys/fs/protected_regular",
            b"/sys/fs/binfmt_misc",
            b"/sys/vm/mmap_min_addr",
        ),
    },
    0x62656572: {  # SYSFS_MAGIC
        READ_ONLY: (
            b"/kernel/uevent_helper",  # a program that the kernel runs as root
            b"/kernel/kexec_crash_size",
            b"/kernel/reboot",
            b"/kernel/livepatch",
            b"/firmware",  # EFI variables and tables: a wrong one bricks the machine
            b"/module/firmware_class",  # where firmware is loaded from
            b"/power",  # suspends the machine
        )
    },
    0x27E0EB: {READ_ONLY: (b"/release_agent",)},  # CGROUP_SUPER_MAGIC: a program that the kernel runs as root
    0xDE5E81E4: {READ_ONLY: (b"/",)},  # EFIVARFS_MAGIC
    0x42494E4D: {READ_ONLY: (b"/",)},  # BINFMTFS_MAGIC: interpreters, also for programs with suid
    0x64626720: {READ_ONLY: (b"/",)},  # DEBUGFS_MAGIC: "no rules", says its documentation
    0x74726163: {READ_ONLY: (b"/",)},  # TRACEFS_MAGIC: probes anywhere in the kernel
    0x73636673: {READ_ONLY: (b"/",)},  # SECURITYFS_MAGIC: policies
    0xF97CFF8C: {READ_ONLY: (b"/",)},  # SELINUX_MAGIC
    0x43415D53: {READ_ONLY: (b"/",)},  # SMACK_MAGIC
}

_OCTAL = re.compile(rb"\\([0-7]{3})")


class _Mounted(NamedTuple):
    """What of a file system is mounted, and where."""

    root: bytes
    point: bytes


def _mounted(mount_id: int) -> _Mounted | None:
    """A mount by its number in /proc/self/mountinfo, proc_pid_mountinfo(5)."""
    with open("/proc/self/mountinfo", "rb") as file:
        for line in file:
            fields = line.split()
            if int(fields[0]) == mount_id:
                root, point = (_OCTAL.sub(lambda m: bytes([int(m[1], 8)]), field) for field in fields[3:5])
                return _Mounted(root, point)
    return None


def _mount_number(fd: int) -> int:
    """The number of the mount that an open file lies on, as mountinfo has it: proc_pid_fdinfo(5)."""
    with open(f"/proc/self/fdinfo/{fd}", "rb") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(b"mnt_id:"))


def path_inside(fd: int) -> bytes:
    """The path of an open file within its file system. Raises OSError."""
    mounted = _mounted(_mount_number(fd))
    if mounted is None:
        return b"/"
    below = os.path.relpath(os.readlink(os.fsencode(f"/proc/self/fd/{fd}")), mounted.point)
    return os.path.normpath(os.path.join(mounted.root, b"" if below.startswith(b"..") else below))
