"""stress-ng's file stressors, each verifying what it does, some of them at once as programs are."""

from __future__ import annotations

import os

import pytest
from programs import Shared, over, program

GROUPS = {
    "names": "dentry dir dirdeep dirmany filename getdent link rename symlink touch chdir",
    "data": "aiol copy-file fallocate fpunch fsize hdd iomix mmap msync readahead revio seek sendfile",
    "attributes": "access chmod chown file-ioctl fstat inode-flags mknod utime xattr",
    "locks": "dnotify dup fcntl flock handle inotify lease locka lockf lockofd open",
}
SECONDS = 2
# Asked to end between setting "immutable" and clearing it, chattr cannot remove its file: not on ext4 either (2 of 120
# runs of a second). So it is given rounds, not a time; the time is for a machine on which it does not end.
CHATTR = ("--chattr", "1", "--chattr-ops", "20", "--timeout", "60s")


@pytest.mark.slow
@pytest.mark.parametrize("group", GROUPS)
@over("unix-auto", "unix-none")
def test_stressors(shared: Shared, group: str) -> None:
    words = [word for name in GROUPS[group].split() for word in (f"--{name}", "1")]
    program(
        "stress-ng", *words, "--temp-path", shared.here, "--verify", "--timeout", f"{SECONDS}s", "--mmap-file",
        "--mmap-bytes", "4m", "--msync-bytes", "4m", "--readahead-bytes", "2m", cwd=shared.here,
    )  # fmt: skip
    assert os.listdir(shared.there) == []


@over("unix-auto", "unix-none")
def test_flags_of_files(shared: Shared) -> None:
    try:
        program("stress-ng", *CHATTR, "--temp-path", shared.here, "--verify", cwd=shared.here, timeout_s=90)
        assert os.listdir(shared.there) == []
    finally:
        program("chattr", "-R", "-f", "-ai", shared.there)
