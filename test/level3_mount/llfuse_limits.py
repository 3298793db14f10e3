"""What the llfuse driver cannot express, and what comes instead: doc/architecture.md names the same limits."""

from __future__ import annotations

import fcntl
import mmap
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kit import fallocate, in_child, outcome, renameat2
from places import Place
from scenarios_files import content, fill, try_open
from scenarios_names import touch
from scenarios_owners import ACCESS, ALICE, BOB, DEFAULT, GROUP, OTHER_GROUP, acl, appends_take_suid_away, opened
from scenarios_owners import touch as owned


def _there(place: Place, function: Callable[[], Any]) -> Any:
    return in_child(function, str(place.there))


def _rename_knows_no_flags(place: Place) -> None:
    def run() -> Any:
        touch("a", "a")
        touch("b", "b")
        return [outcome(renameat2, "a", new, flags) for new, flags in (("b", 1), ("c", 1), ("b", 2), ("c", 4))]

    # That a name exists the kernel sees by itself.
    assert _there(place, run) == ["EEXIST", "EINVAL", "EINVAL", "EINVAL"]
    assert sorted(os.listdir(place.here)) == ["a", "b"]


def _no_file_without_a_name(place: Place) -> None:
    assert _there(place, lambda: try_open(".", os.O_TMPFILE | os.O_RDWR)) == "ENOTSUP"
    assert os.listdir(place.here) == []


def _files_seem_to_have_no_holes(place: Place) -> None:
    def run() -> Any:
        fd = fill("f", b"x")
        os.ftruncate(fd, 1 << 20)
        return [outcome(os.lseek, fd, at, how) for at in (0, 5000, 1 << 20) for how in (os.SEEK_DATA, os.SEEK_HOLE)]

    assert _there(place, run) == [0, 1 << 20, 5000, 1 << 20, "ENXIO", "ENXIO"]


def _append_files_cannot_be_mapped(place: Place) -> None:
    def run() -> Any:
        os.close(fill("f", b"." * 4096))
        return outcome(lambda: mmap.mmap(os.open("f", os.O_RDWR | os.O_APPEND), 4096).close())

    assert _there(place, run) == "ENODEV"


def _nothing_is_allocated(place: Place) -> None:
    def run() -> Any:
        fd = fill("f")
        found = [outcome(fallocate, fd, mode, 0, 100) for mode in (0, 1, 3, 16)]
        # glibc writes to each block instead.
        return [*found, outcome(os.posix_fallocate, fd, 0, 10000), content("f")[:12], os.fstat(fd).st_size]

    assert _there(place, run) == ["ENOTSUP"] * 4 + [None, b"0123456789\0\0", 10000]


def _there_are_no_ioctls(place: Place) -> None:
    commands = (0x80086601, 0x40086602, 0x5401)
    assert _there(place, lambda: [outcome(fcntl.ioctl, fill("f"), c, bytes(64)) for c in commands]) == ["ENOTTY"] * 3


def _root_loses_suid_by_appending_too(place: Place) -> None:
    """As users do; the kernel does not say there whose write it is."""
    found, expected = _there(place, appends_take_suid_away), in_child(appends_take_suid_away, str(place.local))
    for begin in range(0, len(expected), 6):
        assert found[begin : begin + 4] == expected[begin : begin + 4]
        assert found[begin + 5][0] == oct(int(expected[begin + 5][0], 8) & ~0o6000)


def _lists_do_not_grant_more_than_the_mode(place: Place) -> None:
    list_ = acl((1, 6, -1), (2, 4, BOB), (4, 0, -1), (16, 4, -1), (32, 0, -1))

    def run() -> Any:
        owned("f", 0o600, ALICE, GROUP)
        os.setxattr("f", ACCESS, list_)
        return os.getxattr("f", ACCESS)

    assert _there(place, run) == os.getxattr(place.here / "f", ACCESS) == list_
    refused = in_child(lambda: opened("f", os.O_RDONLY), str(place.there), BOB, OTHER_GROUP)
    assert (refused, stat.S_IMODE((place.here / "f").stat().st_mode)) == ("EACCES", 0o640)


def _a_default_list_does_not_lift_the_umask(place: Place) -> None:
    list_ = acl((1, 7, -1), (4, 7, -1), (16, 7, -1), (32, 7, -1))

    def run() -> None:
        os.setxattr(".", DEFAULT, list_)
        for umask in (0, 0o027):
            os.umask(umask)
            os.mkdir(f"{umask:o}", 0o777)

    def modes(directory: Path) -> list[int]:
        return [stat.S_IMODE((directory / name).stat().st_mode) for name in ("0", "27")]

    _there(place, run)
    in_child(run, str(place.local))
    assert modes(place.local) == [0o777, 0o777]
    assert modes(place.here) == [0o777, 0o750]


def _fifos_are_not_opened(place: Place) -> None:
    def run() -> Any:
        os.mkfifo("f", 0o640)
        kind = stat.S_ISFIFO(os.stat("f").st_mode)
        return [kind, *(try_open("f", flags) for flags in (os.O_RDONLY | os.O_NONBLOCK, os.O_WRONLY, os.O_PATH))]

    assert _there(place, run) == [True, "ENOTSUP", "ENOTSUP", "ENOTSUP"]
    assert stat.S_ISFIFO((place.here / "f").stat().st_mode)


#: Scenario: what holds with llfuse in its place.
INSTEAD: dict[str, Callable[[Place], None]] = {
    "fifos_keep_their_type": _fifos_are_not_opened,
    "rename_flags": _rename_knows_no_flags,
    "temporary_files_without_a_name": _no_file_without_a_name,
    "appending_does_not_concern_mappings": _append_files_cannot_be_mapped,
    "holes": _files_seem_to_have_no_holes,
    "allocation_in_all_modes": _nothing_is_allocated,
    "inode_flags": _there_are_no_ioctls,
    "appends_take_suid_away": _root_loses_suid_by_appending_too,
    "access_lists": _lists_do_not_grant_more_than_the_mode,
    "default_access_lists": _a_default_list_does_not_lift_the_umask,
}
