"""make install, the wheel and the sdist: the tree they make, and that what they install works without the checkout."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
from commandline import CHECKOUT, Outcome, run

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

# What is compiled here is only to run for a moment.
QUICK = {"CFLAGS": "-O0 -g0 -w"}
CONFIG = ("client.toml", "special.toml", "whitelist")
PROGRAM_FILES = ("usr/local/bin/qtfs-engine", "usr/local/bin/qtctl", "sbin/mount.qtfs", "sbin/mount.fuse.qtfs")

CLEANED = """
engine=
umount -a -l -t fuse.qtfs # copies of others' mounts
trap 'umount -a -l -t fuse.qtfs; [ -z "$engine" ] || kill $engine' EXIT
"""

# The tree over this machine's own, in a mount namespace; the checkout is away.
OVERLAY = CLEANED + """
for directory in /usr/local /usr/sbin /etc; do
    lower=$tree$directory
    [ -d "$lower" ] || lower=$tree/${directory##*/}
    mount -t overlay overlay -o "lowerdir=$lower:$directory" "$directory"
done
mount -t tmpfs none "$checkout"
"""

READY = """
until grep -q listening "$scratch/log"; do
    kill -0 $engine || { cat "$scratch/log" >&2; exit 1; }
    sleep 0.1
done
"""

WORK = """
mkdir "$scratch/share" "$scratch/client"
echo content >"$scratch/share/file"
printf '[Mount]\\nPath=%s\\n[Open]\\nPath=/\\n[Read]\\nPath=/\\n[Readdir]\\nPath=/\\n' "$scratch" >"$scratch/whitelist"
"$engine_command" --listen "unix://$scratch/sock" --run-dir "$scratch/run" --whitelist "$scratch/whitelist" \
    >"$scratch/log" 2>&1 &
engine=$!
""" + READY + """
$mount_command "$scratch/share" "$scratch/client" -o "server=unix://$scratch/sock"
cat "$scratch/client/file"
umount "$scratch/client"
while pgrep -f "$scratch/share $scratch/client" >/dev/null; do sleep 0.1; done
"""


def shell(script: str, **variables: object) -> Outcome:
    words = [f"{name}={value}" for name, value in variables.items()]
    namespace = ("unshare", "-m", "--propagation", "private")
    return run("env", "-C", "/", *words, *namespace, "sh", "-euc", script, timeout_s=60)


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Variables for builds, which do not compile what another one here has compiled."""
    words = (sys.executable, "-I", CHECKOUT / "test/harness/caching_cc.py", tmp_path_factory.mktemp("objects"), "cc")
    return {**QUICK, "CC": " ".join(map(str, words))}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, quick: dict[str, str]) -> Path:
    """What `make install` makes."""
    path = tmp_path_factory.mktemp("installed") / "root"
    run("make", "-C", CHECKOUT, "install", f"DESTDIR={path}", timeout_s=500, **quick).check()
    return path


@pytest.fixture(scope="module")
def distributions(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The sdist and the wheel that make has made from it on the way; copies, as make would overwrite them."""
    path = tmp_path_factory.mktemp("dist")
    names = [name for kind in ("qtfs-*.tar.gz", "qtfs-*.whl") for name in (CHECKOUT / "dist").glob(kind)]
    sdist, wheel = (Path(shutil.copy(name, path)) for name in names)
    return sdist, wheel


def files_in(tree: Path) -> set[str]:
    return {str(path.relative_to(tree)) for path in tree.rglob("*") if not path.is_dir()}


def install(tree: Path, command: str, **variables: str) -> Outcome:
    """scripts/install.sh as make calls it, without building everything again."""
    usual = {"PREFIX": "/usr/local", "SYSCONFDIR": "/etc", "SBINDIR": "/sbin", "DESTDIR": str(tree)}
    return run(CHECKOUT / "scripts/install.sh", command, timeout_s=200, **{**usual, **variables}).check()


# -------------------------------------------------------------------------------------------------------- make install


def test_the_tree(tree: Path) -> None:
    files = files_in(tree)
    assert {*PROGRAM_FILES, *(f"etc/qtfs/{name}" for name in CONFIG)} <= files
    assert "usr/local/lib/systemd/system/qtfs-engine.service" in files
    assert any(name.startswith("usr/local/share/man/man8/mount.qtfs.8") for name in files)
    elsewhere = ("usr/local/lib/qtfs/", "usr/local/lib/systemd/", "usr/local/share/man/", "etc/qtfs/")
    assert {name for name in files if not name.startswith(elsewhere)} == set(PROGRAM_FILES)


def test_everybody_may_run_it_and_nobody_may_change_it(tree: Path) -> None:
    for path in tree.rglob("*"):
        mode = path.stat().st_mode
        assert not mode & 0o022 and mode & 0o444 == 0o444, f"{path}: {mode:o}"
    assert all((tree / name).stat().st_mode & 0o777 == 0o755 for name in PROGRAM_FILES)


def test_nothing_names_the_checkout_or_the_tree(tree: Path) -> None:
    for name in (*PROGRAM_FILES, "usr/local/lib/systemd/system/qtfs-engine.service"):
        text = (tree / name).read_text()
        assert str(CHECKOUT) not in text and str(tree) not in text, name


def test_installed_commands_work_without_the_checkout(tree: Path, tmp_path: Path) -> None:
    if Path(sys.executable).resolve().is_relative_to(CHECKOUT):
        pytest.skip("the only Python is the checkout's")
    commands = {"engine_command": "qtfs-engine", "mount_command": "mount -t qtfs"}
    outcome = shell(OVERLAY + WORK, tree=tree, scratch=tmp_path, checkout=CHECKOUT, **commands)
    assert outcome.check().stdout == "content\n"


def test_the_samples_are_a_start(tree: Path, tmp_path: Path) -> None:
    """The installed engine starts with the installed whitelist."""
    start = 'qtfs-engine --listen "unix://$scratch/sock" --run-dir "$scratch/run" >"$scratch/log" 2>&1 &\nengine=$!\n'
    end = "kill $engine\nwait $engine\nengine=\n"
    shell(OVERLAY + start + READY + end, tree=tree, checkout=CHECKOUT, scratch=tmp_path).check()
    assert (tmp_path / "log").read_text().startswith("qtfs engine: listening on ")


def test_the_unit_starts_what_is_installed(tree: Path) -> None:
    text = (tree / "usr/local/lib/systemd/system/qtfs-engine.service").read_text()
    (command,) = re.findall(r"^ExecStart=(\S+)", text, re.MULTILINE)
    assert (tree / command.lstrip("/")).exists()
    (whitelist,) = re.findall(r"^ExecStart=.*--whitelist (\S+)", text, re.MULTILINE)
    assert (tree / whitelist.lstrip("/")).exists()


def test_installing_again_keeps_what_the_user_wrote(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(tree, copy)
    (copy / "etc/qtfs/whitelist").write_text("[Mount]\nPath=/mine\n")
    (copy / "etc/qtfs/client.toml").unlink()
    (copy / "usr/local/lib/qtfs/left_over.py").touch()
    outcome = install(copy, "install")
    assert (copy / "etc/qtfs/whitelist").read_text() == "[Mount]\nPath=/mine\n"
    assert "kept" in outcome.stdout and "whitelist" in outcome.stdout
    assert (copy / "etc/qtfs/client.toml").exists()
    assert not (copy / "usr/local/lib/qtfs/left_over.py").exists()


def test_uninstall(tree: Path, tmp_path: Path) -> None:
    copy = tmp_path / "root"
    shutil.copytree(tree, copy)
    (copy / "sbin/mount.other").touch()
    install(copy, "uninstall")
    assert files_in(copy) == {"sbin/mount.other", *(f"etc/qtfs/{name}" for name in CONFIG)}


def test_another_prefix(tree: Path, tmp_path: Path) -> None:
    """As distributions would have it."""
    places = {"PREFIX": "/usr", "SYSCONFDIR": "/etc", "SBINDIR": "/usr/sbin"}
    install(tmp_path, "install", **places)
    assert {"usr/bin/qtfs-engine", "usr/sbin/mount.qtfs", "etc/qtfs/whitelist"} <= files_in(tmp_path)
    unit = (tmp_path / "usr/lib/systemd/system/qtfs-engine.service").read_text()
    assert "/usr/bin/qtfs-engine" in unit and "/usr/local" not in unit
    assert '"/usr/lib/qtfs"' in (tmp_path / "usr/bin/qtfs-engine").read_text()


# ------------------------------------------------------------------------------------------------------ sdist and wheel


def test_the_sdist_has_everything_that_a_build_needs(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    packages = [path.parent.name for path in CHECKOUT.glob("*/__init__.py") if path.parent.name != "test"]
    assert {"qtfs_common", "qtfs_server", "qtfs_client"} <= set(packages)
    kept = {"", ".py", ".pyx", ".pxd", ".h"}
    tracked = set(run("git", "-c", "safe.directory=*", "-C", CHECKOUT, "ls-files").stdout.split())
    wanted = {name for name in tracked if Path(name).parts[0] in packages and Path(name).suffix in kept}
    assert wanted and wanted <= names
    assert {"LICENSE", "README.md", "pyproject.toml", "setup.py", "Makefile", "config/qtfs/whitelist"} <= names
    assert not {name for name in names - tracked if name.endswith((".so", ".c", ".pyc"))}


def test_the_wheel(distributions: tuple[Path, Path]) -> None:
    with zipfile.ZipFile(distributions[1]) as archive:
        names = archive.namelist()
        (metadata,) = (archive.read(name).decode() for name in names if name.endswith(".dist-info/METADATA"))
    tops = {name.partition("/")[0] for name in names}
    assert {"qtfs_common", "qtfs_server", "qtfs_client"} <= tops
    assert not tops & {"test", "demo", "doc", "scripts", "build"}
    assert any(name.startswith("qtfs_common/protocol.") and name.endswith(".so") for name in names)
    assert "License-Expression: Apache-2.0" in metadata and "Requires-Python: >=3.11" in metadata


@pytest.mark.parametrize("kind", [0, 1], ids=["sdist", "wheel"])
def test_pip_in_a_clean_environment(
    distributions: tuple[Path, Path], quick: dict[str, str], tmp_path: Path, kind: int
) -> None:
    """pip install of either gives commands that work, whatever directory they are called from."""
    environment = tmp_path / "venv"
    subprocess.run([sys.executable, "-I", "-m", "venv", environment], check=True)
    pip = (environment / "bin/python", "-I", "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(*pip, distributions[kind], timeout_s=500, cwd=tmp_path, **quick).check()
    place = run(environment / "bin/python", "-I", "-c", "import qtfs_common; print(qtfs_common.__file__)", cwd=tmp_path)
    assert place.check().stdout.startswith(str(environment))
    (tmp_path / "work").mkdir()
    commands = {"engine_command": environment / "bin/qtfs-engine", "mount_command": environment / "bin/mount.qtfs"}
    assert shell(CLEANED + WORK, scratch=tmp_path / "work", **commands).check().stdout == "content\n"


# ------------------------------------------------------------------------------------------------------------ building


@pytest.mark.parametrize("package", ["qtfs_server", "qtfs_client"])
def test_make_in_a_package_with_the_original_s_arguments(package: str) -> None:
    words = ("role=server", "QTFS_TEST_MODE=1", "UDS_TEST_MODE=1", "-j")
    run("make", "-C", CHECKOUT / package, *words, timeout_s=300).check()
    command = {"qtfs_server": "engine", "qtfs_client": "mount.qtfs"}[package]
    assert os.access(CHECKOUT / package / command, os.X_OK)


def test_launchers_work_through_links_and_from_anywhere(tmp_path: Path) -> None:
    (tmp_path / "with space").mkdir()
    link = tmp_path / "with space/mount.qtfs"
    link.symlink_to(CHECKOUT / "qtfs_client/mount.qtfs")
    assert run(link, "--version", cwd=tmp_path).check().stdout.startswith("mount.qtfs ")
    assert run("./mount.qtfs", "--version", cwd=CHECKOUT / "qtfs_client").check().stdout.startswith("mount.qtfs ")
    assert run("env", "-i", link, "--version").check().stdout.startswith("mount.qtfs ")
