"""Scenarios about owners, permissions, extended attributes and ACLs. Each runs in an empty directory, as root."""

from __future__ import annotations

import os
import struct
from typing import Any

from kit import as_user, brief, outcome

ALICE, BOB = 1001, 1002
GROUP, OTHER_GROUP, EXTRA = 2001, 2002, 3003
ACCESS, DEFAULT = "system.posix_acl_access", "system.posix_acl_default"


def touch(name: str, mode: int = 0o644, uid: int = 0, gid: int = 0, text: str = "text") -> None:
    with open(name, "w") as file:
        file.write(text)
    os.chown(name, uid, gid)
    os.chmod(name, mode)


def opened(name: str, flags: int) -> Any:
    def run() -> str:
        os.close(os.open(name, flags, 0o666))
        return "opened"

    return outcome(run)


def acl(*entries: tuple[int, int, int]) -> bytes:
    """A POSIX ACL in the kernel's form, <linux/posix_acl_xattr.h>."""
    return struct.pack("<I", 2) + b"".join(
        struct.pack("<HHI", tag, perm, id_ & 0xFFFFFFFF) for tag, perm, id_ in entries
    )


# ---- owners


def new_files_belong_to_the_caller() -> Any:
    os.chmod(".", 0o777)

    def make() -> None:
        os.mkdir("d")
        os.close(os.open("f", os.O_CREAT | os.O_RDWR, 0o666))
        os.symlink("x", "l")
        os.mkfifo("p")

    as_user(make, ALICE, GROUP, (EXTRA,))
    return {name: brief(name) for name in sorted(os.listdir())}


def setgid_directories_give_their_group() -> Any:
    os.chown(".", 0, EXTRA)
    os.chmod(".", 0o2777)

    def make() -> None:
        os.mkdir("d")
        os.close(os.open("f", os.O_CREAT | os.O_RDWR, 0o2777))
        os.symlink("x", "l")

    as_user(make, ALICE, GROUP)
    os.mkdir("by-root")
    return {name: brief(name) for name in sorted(os.listdir())}


def changing_owners() -> Any:
    found: list[Any] = []
    for name, mode in (("plain", 0o644), ("suid", 0o6755), ("sgid-no-exec", 0o2644)):
        touch(name, mode, ALICE, GROUP)
        found += [outcome(os.chown, name, -1, -1), brief(name), outcome(os.chown, name, -1, EXTRA), brief(name)]
        os.chmod(name, mode)
        found += [outcome(os.chown, name, BOB, -1), brief(name)]
    os.symlink("plain", "link")
    os.lchown("link", 5, 6)
    os.mkdir("d", 0o755)
    os.chmod("d", 0o6755)
    os.chown("d", ALICE, GROUP)
    return [*found, brief("link"), brief("plain"), brief("d"), outcome(os.chown, "missing", 1, 1)]


def changing_owners_as_a_user() -> Any:
    touch("own", 0o6755, ALICE, GROUP)
    touch("others", 0o644, BOB, OTHER_GROUP)

    def run() -> Any:
        return [
            outcome(os.chown, "own", ALICE, -1),
            brief("own"),
            outcome(os.chown, "own", BOB, -1),
            outcome(os.chown, "own", -1, EXTRA),
            brief("own"),
            outcome(os.chown, "own", -1, OTHER_GROUP),
            outcome(os.chown, "others", -1, GROUP),
        ]

    return as_user(run, ALICE, GROUP, (EXTRA,))


def changing_modes() -> Any:
    touch("f", 0o644, ALICE, GROUP)
    os.mkdir("d")
    os.symlink("f", "l")
    found: list[Any] = []
    for mode in (0, 0o777, 0o1777, 0o2777, 0o4777, 0o7777, 0o644):
        for name in ("f", "d"):
            os.chmod(name, mode)
            found.append(brief(name))
    found += [outcome(os.chmod, "l", 0o600), brief("f"), outcome(os.chmod, "missing", 0)]

    def run() -> Any:
        return [
            outcome(os.chmod, "f", 0o2755),
            brief("f"),
            outcome(os.chmod, "f", 0o6711),
            brief("f"),
            outcome(os.chmod, "d", 0o700),
        ]

    found.append(as_user(run, ALICE, GROUP))
    os.chown("f", ALICE, OTHER_GROUP)
    return [*found, as_user(run, ALICE, GROUP)]


# ---- permissions


def permissions_of_every_mode() -> Any:
    """Owner, group and others, each with every mode, by every way to use a file."""
    files = [f"f{mode:03o}" for mode in range(0, 0o1000, 0o11)]
    for name in files:
        touch(name, int(name[1:], 8), ALICE, GROUP)

    def use(name: str) -> Any:
        access = [os.access(name, bits) for bits in (os.R_OK, os.W_OK, os.X_OK)]
        return access, opened(name, os.O_RDONLY), opened(name, os.O_WRONLY), outcome(os.truncate, name, 1)

    return [
        as_user(lambda: [use(name) for name in files], uid, gid, groups)
        for uid, gid, groups in (
            (ALICE, OTHER_GROUP, ()),
            (BOB, OTHER_GROUP, (GROUP,)),
            (BOB, OTHER_GROUP, (EXTRA,)),
        )
    ]


def permissions_of_directories() -> Any:
    found = {}
    for mode in (0o777, 0o770, 0o755, 0o711, 0o744, 0o733, 0o722, 0o700):
        os.mkdir("d")
        touch("d/f", 0o666)
        os.mkdir("d/sub")
        os.chmod("d", mode)

        def run() -> Any:
            return [
                outcome(lambda: sorted(os.listdir("d"))),
                outcome(os.stat, "d/f") if isinstance(outcome(os.stat, "d/f"), str) else "found",
                opened("d/f", os.O_RDWR),
                opened("d/new", os.O_RDWR | os.O_CREAT),
                outcome(os.mkdir, "d/newdir"),
                outcome(os.rename, "d/f", "d/g"),
                outcome(os.unlink, "d/g"),
                outcome(os.rmdir, "d/sub"),
                outcome(os.symlink, "x", "d/link"),
                outcome(os.link, "d/new", "d/hard"),
            ]

        found[mode] = as_user(run)
        os.rename("d", f"{mode:o}")
    return found


def sticky_directories() -> Any:
    os.mkdir("t")
    os.chmod("t", 0o1777)
    for name in ("a", "b", "c"):
        touch(f"t/{name}", 0o666, ALICE, GROUP)

    def other() -> Any:
        return [
            outcome(os.unlink, "t/a"),
            outcome(os.rename, "t/a", "t/z"),
            opened("t/mine", os.O_RDWR | os.O_CREAT),
            outcome(os.rename, "t/mine", "t/a"),
            outcome(os.unlink, "t/mine"),
        ]

    found = as_user(other, BOB, OTHER_GROUP)
    return found, as_user(lambda: [outcome(os.unlink, "t/a"), outcome(os.rename, "t/b", "t/c")], ALICE, GROUP)


def truncation_needs_permission_and_an_open_file_does_not() -> Any:
    touch("f", 0o644, ALICE, GROUP, "0123456789")

    def run() -> Any:
        fd = os.open("f", os.O_RDWR)
        os.chmod("f", 0o444)
        return [
            outcome(os.truncate, "f", 5),
            outcome(os.ftruncate, fd, 7),
            outcome(os.write, fd, b"ab"),
            os.fstat(fd).st_size,
            opened("f", os.O_WRONLY),
            outcome(os.utime, "f"),
            outcome(os.utime, "f", (1, 1)),
        ]

    return as_user(run, ALICE, GROUP), brief("f")


def times_of_others() -> Any:
    touch("writable", 0o666, ALICE, GROUP)
    touch("readable", 0o644, ALICE, GROUP)

    def run() -> Any:
        return [outcome(os.utime, name, times) for name in ("writable", "readable") for times in (None, (1, 1))]

    return as_user(run, BOB, OTHER_GROUP)


# ---- suid, sgid, capabilities


def _suid_after(ways: dict[str, Any]) -> Any:
    """What is left of every combination of suid and sgid after each way to write, by somebody and by root."""
    found: list[Any] = []
    for name, way in ways.items():
        for mode in (0o4777, 0o2777, 0o6777, 0o2766):
            touch("f", mode, ALICE, GROUP)

            def run(way: Any = way) -> Any:
                return outcome(lambda: bool(way() or True))

            found += [name, oct(mode), as_user(run, BOB, OTHER_GROUP), brief("f")]
            os.chmod("f", mode)
            found += [run(), brief("f")]
    return found


def writes_take_suid_away() -> Any:
    return _suid_after(
        {
            "write": lambda: os.pwrite(os.open("f", os.O_WRONLY), b"x", 0),
            "truncate": lambda: os.truncate("f", 1),
            "open": lambda: os.close(os.open("f", os.O_WRONLY | os.O_TRUNC)),
            "grow": lambda: os.truncate("f", 10000),
            "read": lambda: os.pread(os.open("f", os.O_RDONLY), 1, 0),
        }
    )


def appends_take_suid_away() -> Any:
    return _suid_after({"append": lambda: os.write(os.open("f", os.O_WRONLY | os.O_APPEND), b"x")})


def writes_take_capabilities_away() -> Any:
    capability = struct.pack("<IIIII", 0x02000001, 1 << 10, 0, 0, 0)
    touch("f", 0o777)
    found: list[Any] = []
    for way in (
        lambda: os.pwrite(os.open("f", os.O_WRONLY), b"x", 0),
        lambda: os.truncate("f", 0),
        lambda: os.chown("f", 1, 1),
    ):
        os.setxattr("f", "security.capability", capability)
        found += [os.listxattr("f"), outcome(way) == "E2BIG", os.listxattr("f")]
    return found


def execution_by_mode() -> Any:
    found = {}
    with open("/bin/true", "rb") as program:
        data = program.read()
    for mode in (0o755, 0o711, 0o644, 0o744, 0o700):
        with open("p", "wb") as file:
            file.write(data)
        os.chmod("p", mode)

        def run() -> Any:
            child = os.fork()
            if child == 0:
                try:
                    os.execv("./p", ["p"])
                except OSError as error:
                    os._exit(100 + (error.errno or 0))
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

        found[mode] = (run(), as_user(run))
        os.unlink("p")
    return found


# ---- extended attributes


def extended_attributes() -> Any:
    touch("f")
    os.mkdir("d")
    os.symlink("f", "l")
    os.mkfifo("p")
    found: list[Any] = []
    for path in ("f", "d", "l", "p"):
        for name in ("user.a", "trusted.a", "security.a", "system.a", "other.a", "a", "user.", "user." + "n" * 250):
            found.append((path, name[:20], outcome(os.setxattr, path, name, b"value", follow_symlinks=False)))
            found.append(outcome(os.getxattr, path, name, follow_symlinks=False))
        found.append(sorted(os.listxattr(path, follow_symlinks=False)))
    for size in (0, 1, 255, 1024, 3000, 65536, 65537):
        found.append(
            (size, outcome(os.setxattr, "f", "user.size", b"x" * size), len(outcome(os.getxattr, "f", "user.size")))
        )
    flags = (os.XATTR_CREATE, os.XATTR_REPLACE)
    found += [
        outcome(os.setxattr, "f", name, b"1", flag) for name in ("user.a", "user.new", "user.none") for flag in flags
    ]
    found += [outcome(os.removexattr, "f", name) for name in ("user.a", "user.a", "trusted.a", "other.a")]
    return [*found, sorted(os.listxattr("f"))]


def extended_attributes_as_a_user() -> Any:
    touch("own", 0o644, ALICE, GROUP)
    touch("readable", 0o644)
    touch("closed", 0o600)
    for name in ("own", "readable", "closed"):
        for attribute in ("user.a", "trusted.a", "security.a"):
            os.setxattr(name, attribute, b"1")

    def run() -> Any:
        found: list[Any] = []
        for name in ("own", "readable", "closed"):
            found.append(outcome(os.listxattr, name))
            for attribute in ("user.a", "trusted.a", "security.a"):
                found += [outcome(os.getxattr, name, attribute), outcome(os.setxattr, name, attribute, b"2")]
                found.append(outcome(os.removexattr, name, attribute))
        return found

    return as_user(run, ALICE, GROUP)


def access_lists() -> Any:
    touch("f", 0o640, ALICE, GROUP)
    list_ = acl((1, 6, -1), (2, 4, BOB), (4, 4, -1), (8, 6, EXTRA), (16, 6, -1), (32, 0, -1))
    found: list[Any] = [outcome(os.setxattr, "f", ACCESS, list_), os.getxattr("f", ACCESS), brief("f")]

    def run() -> Any:
        return opened("f", os.O_RDONLY), opened("f", os.O_WRONLY)

    people = ((ALICE, GROUP, ()), (BOB, OTHER_GROUP, ()), (1003, GROUP, ()), (1003, 1, (EXTRA,)), (1003, 1, ()))
    found += [as_user(run, *who) for who in people]
    os.chmod("f", 0o600)
    found += [os.getxattr("f", ACCESS), [as_user(run, *who) for who in people]]
    found += [outcome(os.setxattr, "f", ACCESS, b"rubbish"), outcome(os.setxattr, "f", DEFAULT, list_)]
    return [*found, outcome(os.removexattr, "f", ACCESS), brief("f"), os.listxattr("f")]


def default_access_lists() -> Any:
    os.mkdir("d")
    os.setxattr("d", DEFAULT, acl((1, 7, -1), (2, 6, BOB), (4, 5, -1), (16, 7, -1), (32, 0, -1)))
    os.umask(0o077)
    os.mkdir("d/sub", 0o777)
    os.close(os.open("d/f", os.O_CREAT | os.O_RDWR, 0o666))
    os.mknod("d/n", 0o100666)
    return [(brief(f"d/{name}"), sorted(os.listxattr(f"d/{name}"))) for name in ("sub", "f", "n")]


_HELPERS = (touch, opened, acl, _suid_after)
#: All of this module, in its order.
SCENARIOS = [x for x in list(globals().values()) if getattr(x, "__module__", "") == __name__ and x not in _HELPERS]
