"""Whatever a program does on a mount has the outcome, and leaves the tree, that it has on the file system behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import llfuse_limits
import pytest
from kit import in_child, tree
from places import Place
from scenarios import ALL, what_fuse_has_no_request_for


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
def test_what_fuse_has_no_request_for(place: Place) -> None:
    assert in_child(what_fuse_has_no_request_for, str(place.there)) == ["ENOTSUP"] * 3
