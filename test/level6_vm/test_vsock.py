"""Engine and client over AF_VSOCK, in a virtual machine: hosts and containers that run tests seldom have vsock."""

from __future__ import annotations

from pathlib import Path

import pytest
from harness.guest import GuestUnavailable, find_kernel, run_in_guest

HERE = Path(__file__).resolve().parent
TIMEOUT_S = 170.0


@pytest.fixture
def kernel() -> None:
    try:
        find_kernel()
    except GuestUnavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_the_whole_job_over_vsock(kernel: None, tmp_path: Path) -> None:
    """Started word for word as the README says: mounts, checks, git, a killed engine, the end."""
    result = run_in_guest((HERE / "inside.sh").read_text(), tmp_path, TIMEOUT_S).check()
    assert "0 failed" in result.output and "== done" in result.output
    print(f"{result.seconds:.0f} s\n{result.output}")


@pytest.mark.vm
@pytest.mark.slow
@pytest.mark.timeout(TIMEOUT_S + 30)
def test_conformance_over_vsock(kernel: None, tmp_path: Path) -> None:
    result = run_in_guest((HERE / "vsock.sh").read_text(), tmp_path, TIMEOUT_S).check()
    assert " on auto: 0 differ" in result.output
    print(f"{result.seconds:.0f} s\n{result.output}")
