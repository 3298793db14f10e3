"""What the control sockets of both ends tell agrees: lookups, handles, locks (doc/control.md, section 3)."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from harness.ends import Ends
from harness.engine_process import ALL_TRANSPORTS, CHECKOUT, EngineProcess
from harness.mounts import MountProcess
from harness.waiting import wait_until

from qtfs_client.remote_host import mount_figures


@pytest.fixture
def mounted(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Ends]:
    transport = getattr(request, "param", "unix")
    with EngineProcess(tmp_path / "engine", transport).running() as engine:
        options = f"driver=fuse3,run_dir={tmp_path / 'run'}"
        with MountProcess(engine, engine.share, tmp_path / "mnt", options).running() as mount:
            yield Ends(mount, tmp_path / "run")
        wait_until(engine.is_idle, f"the engine to let everything go; it has {engine.figures()}")


def drop_caches() -> None:
    """Make the kernel forget what nobody uses: FORGET of every name."""
    os.sync()
    Path("/proc/sys/vm/drop_caches").write_text("2")


@pytest.mark.parametrize("mounted", ALL_TRANSPORTS, indirect=True)
def test_lookups_handles_and_locks_agree_and_go(mounted: Ends) -> None:
    share = mounted.mount.engine.share
    for number in range(300):
        (share / str(number)).write_text("x")
    for entry in os.scandir(mounted.mount.point):
        entry.stat()
    assert mounted.client["lookups"] >= 300
    with (mounted.mount.point / "7").open("r+b") as file:
        fcntl.lockf(file, fcntl.LOCK_EX, 4)
        wait_until(mounted.agree, "both ends to agree on the lookups")
        # The directory that was read ends some time later: its RELEASE is sent when there is nothing better to do.
        wait_until(lambda: mounted.session["handles"] == 1, "the directory to be closed")
        assert (mounted.session["locks"], mounted.session["lock_owners"]) == (1, 1)
    wait_until(lambda: mounted.session["handles"] == 0 and mounted.session["locks"] == 0, "the file to be closed")
    drop_caches()
    wait_until(lambda: mounted.client["forgotten"] >= 300, "the kernel to forget the names")
    wait_until(mounted.agree, "both ends to agree on what was forgotten")
    assert mounted.session["nodes"] < 10


def test_reconnects_and_sessions_begun_anew_are_counted(mounted: Ends) -> None:
    engine = mounted.mount.engine
    wait_until(lambda: mounted.session["connections"] >= 2, "a worker's channel and the event channel")
    before = mounted.client
    assert (before["driver"], before["reconnects"], before["begun_anew"]) == ("fuse3", 0, 0)
    engine.kill()
    engine.start()
    assert os.listdir(mounted.mount.point) == []
    wait_until(lambda: mounted.client["reconnects"] >= 2, "the channels to be replaced")
    assert mounted.client["begun_anew"] <= 1 and mounted.client["interruptions"] >= 1


def test_invalidations_are_counted(mounted: Ends) -> None:
    """A file that has changed on the server when it is opened again: the kernel is told to ask for its attributes."""
    there, here = mounted.mount.engine.share / "f", mounted.mount.point / "f"
    there.write_text("one")
    assert here.read_text() == "one"
    before = mounted.client["invalidations"]
    there.write_text("other")
    assert here.read_text() == "other"
    assert mounted.client["invalidations"] > before


@pytest.mark.parametrize("driver", ["fuse3", "llfuse"])
def test_every_key_is_documented_and_there(tmp_path: Path, driver: str) -> None:
    text = (CHECKOUT / "doc/control.md").read_text().split("\n## ")[2]
    with EngineProcess(tmp_path / "engine").running() as engine:
        options = f"driver={driver},run_dir={tmp_path / 'run'}"
        with MountProcess(engine, engine.share, tmp_path / "mnt", options).running() as mount:
            found = mount_figures(str(mount.point), str(tmp_path / "run"))
    assert found["driver"] == driver
    for key in found:
        assert f"`{key}`" in text, key
    if driver == "fuse3":
        words = [row.split("|")[1] for row in text.splitlines() if row.startswith("| `")]
        assert {word for cell in words for word in cell.replace("`", "").replace(",", " ").split()} == set(found)
