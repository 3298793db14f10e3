"""Whether the kernel had reason to keep what it has cached."""

from __future__ import annotations

import re
from pathlib import Path


def drops() -> int:
    """How often anybody on this machine had it drop caches: drop_caches, proc_sys_vm(5)."""
    found = re.findall(r"^drop_(?:pagecache|slab) (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
    return sum(map(int, found))
