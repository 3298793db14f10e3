"""Waiting for conditions with deadlines, never for a time to pass."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T | None], what: str, timeout_s: float = 10.0, period_s: float = 0.005) -> T:
    """The first true value of `condition`; AssertionError naming `what` once the time is over."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = condition()
        if value:
            return value
        assert time.monotonic() < deadline, f"not within {timeout_s:g} s: {what}"
        time.sleep(period_s)


def wait_for_text(read: Callable[[], str], text: str, timeout_s: float = 10.0) -> None:
    """Until `read()` contains `text`; the failure shows what was there instead."""
    deadline = time.monotonic() + timeout_s
    while text not in read():
        assert time.monotonic() < deadline, f"{text!r} did not come within {timeout_s:g} s; there is:\n{read()}"
        time.sleep(0.005)
