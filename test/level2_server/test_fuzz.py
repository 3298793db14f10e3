"""The share of `make fuzz` that every test run does: the same few thousand mutations of real messages each time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from harness.engine_process import CHECKOUT
from harness.leaks import environment

FUZZER = CHECKOUT / "test/fuzz/one_target.py"
LARGEST_GROWTH_BYTES = 48 << 20


@pytest.mark.root
@pytest.mark.parametrize(
    ("target", "mutations"), [("engine-unix", 2000), ("engine-shm", 2000), ("client", 2500), ("handshake", 1000)]
)
def test_mutated_messages_neither_crash_nor_hang_nor_leak(tmp_path: Path, target: str, mutations: int) -> None:
    """In a process of its own, as it may die; with its own mounts, as it fills a file system of its own."""
    command = [sys.executable, str(FUZZER), target, "--mutations", str(mutations), "--seed", "1"]
    done = subprocess.run(
        ["unshare", "-m", *command],
        env=environment(PYTHONPATH=str(CHECKOUT), TMPDIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}{done.stderr}"
    found = json.loads(done.stdout.splitlines()[-1])
    print(found)
    assert found["runs"] >= mutations
    assert found.get("grown_descriptors", 0) <= 4
    assert found.get("grown_bytes", 0) < LARGEST_GROWTH_BYTES
    if target.startswith("engine"):
        assert found["malformed"] > mutations // 5, "the rubbish was too good"
    if target == "client":
        assert found["breaks"] > mutations // 20, "the driver never had to give a channel up"
