"""How shared memory is divided, and the text that says how."""

from __future__ import annotations

import itertools
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_common.rings.geometry import (
    DEFAULT_CHANNELS,
    MAX_AREA_BYTES,
    MAX_CHANNELS,
    MIN_AREA_BYTES,
    PAGE_BYTES,
    Geometry,
    Layout,
    LayoutError,
    parse_layout,
)

KIB, MIB = 1 << 10, 1 << 20
LEAST = 2 * PAGE_BYTES + 2 * MIN_AREA_BYTES  # control block, a page of lines, two areas

areas = st.one_of(
    st.just(0), st.integers(MIN_AREA_BYTES // PAGE_BYTES, MAX_AREA_BYTES // PAGE_BYTES).map(lambda n: n * PAGE_BYTES)
)
layouts = st.builds(Layout, st.integers(0, MAX_CHANNELS), areas, areas)


# ---- the text


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("channels=3", Layout(3)),
        ("request=144K", Layout(0, 147_456)),
        ("reply=1m,channels=1024", Layout(1024, 0, MIB)),
        ("channels=1,request=147456,reply=64M", Layout(1, 147_456, 64 * MIB)),
        ("reply=64M,request=256k", Layout(0, 256 * KIB, 64 * MIB)),
    ],
)
def test_texts(text: str, layout: Layout) -> None:
    assert parse_layout(text) == layout


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "'' is not channels=N"),
        ("channels", "'channels' is not channels=N"),
        ("rings=3", "'rings=3' is not channels=N"),
        ("channels=3,", "'' is not channels=N"),
        (" channels=3", "' channels=3' is not"),
        ("channels=3,channels=3", "channels is given twice"),
        ("channels=0", "channels=0: not a number from 1 to 4096"),
        ("channels=4097", "1 to 4096"),
        ("channels=-1", "1 to 4096"),
        ("channels=+1", "1 to 4096"),
        ("channels=", "1 to 4096"),
        ("channels=٣", "1 to 4096"),
        ("channels=9999999999999", "1 to 4096"),
        ("channels=1" + "0" * 5000, "1 to 4096"),
        ("channels=0000000014096", "1 to 4096"),
        ("request=143K", "'143K' is not a size from 144K to 64M"),
        ("request=65M", "144K to 64M"),
        ("request=200001", "whole pages"),
        ("reply=", "144K to 64M"),
        ("reply=1MB", "144K to 64M"),
        ("reply=1 M", "144K to 64M"),
        ("reply=٣M", "144K to 64M"),
        ("reply=-1M", "144K to 64M"),
        ("reply=1T", "144K to 64M"),
    ],
)
def test_texts_that_are_refused(text: str, reason: str) -> None:
    with pytest.raises(ValueError, match=re.escape(reason)):
        parse_layout(text)


@given(st.text(max_size=40))
def test_any_text_is_a_layout_or_refused(text: str) -> None:
    try:
        layout = parse_layout(text)
    except ValueError:
        return
    assert layout != Layout()


@given(layouts.filter(lambda layout: layout != Layout()))
def test_a_layout_is_what_its_text_says(layout: Layout) -> None:
    words = {"channels": layout.channels, "request": layout.request_bytes, "reply": layout.reply_bytes}
    assert parse_layout(",".join(f"{key}={value}" for key, value in words.items() if value)) == layout


# ---- what fits


def assert_sound(geometry: Geometry, size: int) -> None:
    """Nothing overlaps, nothing lies outside, a message of the largest payload fits twice."""
    lines_end = PAGE_BYTES + geometry.channels * 2 * 128
    assert lines_end <= geometry.areas_at < lines_end + PAGE_BYTES
    assert [n % PAGE_BYTES for n in (geometry.areas_at, geometry.request_bytes, geometry.reply_bytes)] == [0, 0, 0]
    each = geometry.request_bytes + geometry.reply_bytes
    assert geometry.areas_at + geometry.channels * each == geometry.total_bytes <= size
    assert geometry.max_payload % PAGE_BYTES == 0 and geometry.max_payload >= 65_536
    assert 2 * (geometry.max_payload + 8192) <= min(geometry.request_bytes, geometry.reply_bytes)


def test_a_new_file_takes_whole_transfers() -> None:
    geometry = Layout().fit(None)
    assert geometry.channels == DEFAULT_CHANNELS and geometry.max_payload == MIB
    assert_sound(geometry, geometry.total_bytes)


@pytest.mark.parametrize(
    ("size", "channels", "payload"),
    [
        (LEAST, 1, 65_536),
        (MIB, 3, 65_536),
        (16 * MIB, 31, 122_880),
        (128 * MIB, 31, MIB),
        (256 * MIB, 63, MIB),
        (1 << 30, 64, MIB),
    ],
)
def test_memory_of_a_given_size(size: int, channels: int, payload: int) -> None:
    geometry = Layout().fit(size)
    assert_sound(geometry, size)
    assert (geometry.channels, geometry.max_payload) == (channels, payload)


@given(layouts, st.one_of(st.none(), st.integers(0, 1 << 20), st.integers(0, 1 << 38)))
def test_whatever_fits_fits(layout: Layout, size: int | None) -> None:
    try:
        geometry = layout.fit(size)
    except LayoutError as error:
        assert size is not None, error
        wanted = Geometry(
            layout.channels or 1, layout.request_bytes or MIN_AREA_BYTES, layout.reply_bytes or MIN_AREA_BYTES
        )
        assert wanted.total_bytes > size, "it would have fitted"
        return
    assert_sound(geometry, geometry.total_bytes if size is None else size)
    assert layout.channels in (0, geometry.channels)
    assert layout.request_bytes in (0, geometry.request_bytes)
    assert layout.reply_bytes in (0, geometry.reply_bytes)


@given(st.integers(LEAST, 1 << 30))
def test_more_memory_is_never_less_use(size: int) -> None:
    smaller, larger = Layout().fit(size), Layout().fit(size + MIB)
    assert larger.max_payload >= smaller.max_payload
    assert larger.channels >= smaller.channels or larger.max_payload > smaller.max_payload


@pytest.mark.parametrize(
    ("layout", "size", "reason"),
    [
        (Layout(), 0, "the layout does not fit"),
        (Layout(), 100, "it is too small: 100 bytes, and one channel takes 303104 at least"),
        (Layout(), LEAST - 1, "it is too small"),
        (Layout(channels=100), MIB, "100 channels take 29523968 bytes, and there are 1048576"),
        (Layout(request_bytes=MIB), MIB, "1 channels take 1204224 bytes, and there are 1048576"),
    ],
)
def test_memory_that_is_too_small(layout: Layout, size: int, reason: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(reason)):
        layout.fit(size)


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry(0, MIB, MIB),
        Geometry(MAX_CHANNELS + 1, MIB, MIB),
        Geometry(1, MIB + 1, MIB),
        Geometry(1, MIN_AREA_BYTES - PAGE_BYTES, MIB),
        Geometry(1, MIB, MAX_AREA_BYTES + PAGE_BYTES),
        Geometry(1 << 31, 1 << 62, 1 << 62),
        Geometry(2, MIB, MIB),
    ],
)
def test_a_geometry_that_the_memory_does_not_have(geometry: Geometry) -> None:
    with pytest.raises(ValueError, match=r"channels|areas"):
        geometry.check(4 * MIB)


def test_the_least_memory_holds_a_channel() -> None:
    """Every page more is used or left, and never refused."""
    for pages in itertools.chain(range(80), range(250, 600, 7)):
        assert_sound(Layout().fit(LEAST + pages * PAGE_BYTES), LEAST + pages * PAGE_BYTES)
