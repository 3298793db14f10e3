"""stress-ng's file stressors, each verifying what it does, some of them at once as programs are."""

from __future__ import annotations

import os

import pytest
from programs import Shared, over, program

GROUPS = {
    "names": "dentry dir dirdeep dirmany filename getdent link rename symlink touch chdir",
    "data": "aiol copy-file fallocate fpunch fsize hdd iomix mmap msync readahead revio seek sendfile",
    "attributes": "access chattr chmod chown file-ioctl fstat inode-flags mknod utime xattr",
    "locks": "dnotify dup fcntl flock handle inotify lease locka lockf lockofd open",
}
SECONDS = 2


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
