"""The conformance set: what is run on a mount and on the file system behind it, with the same outcome.

Needs nothing but Python's own library, as it runs in guests too (test/level6_vm/conformance.py).
"""

from __future__ import annotations

from typing import Any

import scenarios_files
import scenarios_names
import scenarios_owners
from kit import fallocate, outcome

ALL = [*scenarios_names.SCENARIOS, *scenarios_files.SCENARIOS, *scenarios_owners.SCENARIOS]


def what_fuse_has_no_request_for() -> Any:
    """The kernel's FUSE passes no other modes of fallocate(2) on: collapse, insert, unshare. All are ENOTSUP."""
    return [outcome(fallocate, scenarios_files.fill("f"), mode, 0, 4096) for mode in (8, 32, 64)]
