"""fio writes at random and verifies what it wrote: on the mount, and again on the server."""

from __future__ import annotations

from pathlib import Path

import pytest
from programs import Shared, over, program

JOB = (
    "fio", "--name=job", "--rw=randwrite", "--bsrange=512-128k", "--bs_unaligned=0", "--blockalign=512", "--size=8m",
    "--verify=crc32c", "--verify_fatal=1", "--randseed=4711", "--group_reporting", "--minimal",
)  # fmt: skip
ENGINES = {
    "psync": ("--ioengine=psync",),
    "psync-direct": ("--ioengine=psync", "--direct=1", "--bsrange=4k-128k", "--blockalign=4k"),
    "psync-sync": ("--ioengine=psync", "--sync=1", "--size=2m"),
    "mmap": ("--ioengine=mmap", "--bsrange=4k-64k", "--blockalign=4k"),
    "libaio-direct": ("--ioengine=libaio", "--direct=1", "--iodepth=8", "--bsrange=4k-64k", "--blockalign=4k"),
    "falloc": ("--ioengine=psync", "--fallocate=posix", "--fdatasync=8"),
}


@pytest.mark.parametrize("engine_options", ENGINES.values(), ids=ENGINES.keys())
@over("unix-auto", "unix-none", "tcp-auto")
def test_random_writes_are_verified(shared: Shared, area: Path, engine_options: tuple[str, ...]) -> None:
    words = (*JOB, *engine_options)
    program(*words, f"--filename={shared.here}/data", cwd=area)
    program(*words, f"--filename={shared.there}/data", "--verify_only", cwd=area)
