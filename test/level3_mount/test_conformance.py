"""Whatever a program does on a mount has the outcome, and leaves the tree, that it has on the file system behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llfuse_limits
import pytest
import scenarios_files
import scenarios_names
import scenarios_owners
from kit import fallocate, in_child, outcome, tree
from places import Place

ALL = [*scenarios_names.SCENARIOS, *scenarios_files.SCENARIOS, *scenarios_owners.SCENARIOS]


def test_limits_are_of_scenarios_that_exist() -> None:
    assert set(llfuse_limits.INSTEAD) <= {scenario.__name__ for scenario in ALL}
    assert len(ALL) > 60


@pytest.mark.root
@pytest.mark.parametrize("scenario", ALL, ids=lambda scenario: scenario.__name__)
def test_as_on_the_backing_file_system(place: Place, scenario: Callable[[], Any]) -> None:
    if place.kind.driver == "llfuse" and scenario.__name__ in llfuse_limits.INSTEAD:
        llfuse_limits.INSTEAD[scenario.__name__](place)
        return
    expected = in_child(scenario, str(place.local))
    found = in_child(scenario, str(place.there))
    assert found == expected
    assert tree(place.here) == tree(place.local)
    assert tree(place.there) == tree(place.local)


@pytest.mark.root
@pytest.mark.parametrize("mode", [8, 32, 64], ids=["collapse", "insert", "unshare"])
def test_what_fuse_has_no_request_for(place: Place, mode: int) -> None:
    """The kernel's FUSE passes no other modes of fallocate(2) on, whatever the backing file system knows."""
    assert in_child(lambda: outcome(fallocate, scenarios_files.fill("f"), mode, 0, 4096), str(place.there)) == "ENOTSUP"
