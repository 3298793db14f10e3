"""The documents against the checkout: links, named files, options, and the two READMEs against each other."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

import pytest

from qtfs_client import options, qtctl
from qtfs_common.config import CLIENT_SCHEMA, ENGINE_SCHEMA
from qtfs_common.whitelist import Type
from qtfs_server import cli
from qtfs_server.protected import PROTECTED

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("README*.md"), *(ROOT / "doc").rglob("*.md")])
READMES = [ROOT / "README.md", ROOT / "README.zh.md"]
MANUAL = ROOT / "doc/man"
TOP_LEVEL = (
    *("qtfs_common", "qtfs_server", "qtfs_client", "ipc", "rexec", "qtinfo"),
    *("config", "demo", "doc", "scripts", "test"),
)

documents = pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))


def code_blocks(text: str) -> list[str]:
    return re.findall(r"^```.*?^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    """The text without its code blocks."""
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(text: str) -> list[str]:
    return re.findall(r"^#+ .*$", prose(text), re.MULTILINE)


def table_rows(text: str) -> list[int]:
    """How many lines each table has."""
    return [len(table.splitlines()) for table in re.findall(r"(?:^\|.*\n?)+", prose(text), re.MULTILINE)]


def links(text: str) -> list[str]:
    return [link for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)) if "://" not in link]


def anchor(heading: str) -> str:
    """The fragment by which a heading is linked to."""
    text = heading.lstrip("#").strip().lower()
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


# ---- the READMEs are one text in two languages


def test_readmes_have_the_same_shape() -> None:
    english, chinese = (path.read_text() for path in READMES)
    assert [h.split()[0] for h in headings(english)] == [h.split()[0] for h in headings(chinese)]
    assert code_blocks(english) == code_blocks(chinese)
    assert table_rows(english) == table_rows(chinese)
    targets = [[link for link in links(text) if not link.startswith("README")] for text in (english, chinese)]
    assert targets[0] == targets[1]


@pytest.mark.parametrize("path", READMES, ids=lambda path: path.name)
def test_readme_tells_a_newcomer_the_two_commands(path: Path) -> None:
    blocks = [block.split("\n")[1:-1] for block in code_blocks(path.read_text())]
    assert ["make demo"] in blocks and ["make test"] in blocks
    assert ["nohup ./engine 16 1 2 12121 10 12121 &"] in blocks
    assert any("mount -t qtfs /home /root/mnt" in block for block in blocks)


# ---- links and names


@documents
def test_relative_links_lead_somewhere(path: Path) -> None:
    for link in links(path.read_text()):
        target, _, fragment = link.partition("#")
        found = path.parent / target if target else path
        assert found.exists(), f"{link}: no such file"
        if fragment:
            assert fragment in map(anchor, headings(found.read_text())), f"{link}: no such heading"


def built_commands() -> set[str]:
    """Commands that only `make` writes: FILE:MODULE in the Makefile."""
    return set(re.findall(r"(\S+/\S+?):\w+\.\w+", (ROOT / "Makefile").read_text()))


def named_files(text: str) -> set[str]:
    """Whatever looks like a path of this checkout."""
    tops = "|".join(TOP_LEVEL)
    return {name.rstrip("./") for name in re.findall(rf"(?<![\w./-])(?:{tops})/[\w./-]*", text)}


@pytest.mark.parametrize("path", [*DOCUMENTS, *sorted(MANUAL.iterdir())], ids=lambda path: str(path.relative_to(ROOT)))
def test_named_files_exist(path: Path) -> None:
    text = path.read_text().replace("\\-", "-")
    missing = {name for name in named_files(text) - built_commands() if not (ROOT / name).exists()}
    assert not missing


def test_built_commands_are_recognised() -> None:
    assert {"qtfs_server/engine", "qtfs_client/mount.qtfs", "qtfs_client/qtctl"} <= built_commands()


# ---- options: the manual pages say what the programs take, all of it and nothing else


def section(page: str, *names: str) -> str:
    """Sections of a manual page, in roff."""
    parts = re.split(r'^\.SH "?([^"\n]*)"?\n', (MANUAL / page).read_text(), flags=re.MULTILINE)
    return "".join(body for name, body in zip(parts[1::2], parts[2::2], strict=True) if name in names)


def tags(roff: str) -> set[str]:
    """What the tags of a section's lists name: options without dashes' escapes, values and arguments."""
    lines = re.findall(r"^\.T[PQ]\n\.[A-Z]+ (.*)$", roff, re.MULTILINE)
    words = re.split(r"[ ,]+", " ".join(lines).replace('"', "").replace("\\-", "-").replace("\\fR", ""))
    return {word.partition("=")[0] for word in words if word}


def dashed(words: Iterable[str]) -> set[str]:
    return {word for word in words if word.startswith("-")}


def parser_options(parser: object) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}  # type: ignore[attr-defined]


def test_engine_options_are_in_the_manual() -> None:
    assert dashed(tags(section("qtfs-engine.8", "OPTIONS"))) == parser_options(cli._parser())


def test_engine_configuration_keys_are_in_the_manual() -> None:
    text = section("qtfs-engine.8", "CONFIGURATION FILE").partition(".P")[0]
    assert set(re.findall(r"^\.BR? (\w+)", text, re.MULTILINE)) == set(ENGINE_SCHEMA)


def test_command_line_of_mount_is_in_the_manual() -> None:
    assert dashed(tags(section("mount.qtfs.8", "OPTIONS"))) == parser_options(options._parser())


def subparsers(parser: object) -> list[object]:
    (action,) = [each for each in parser._actions if hasattr(each, "choices") and isinstance(each.choices, dict)]  # type: ignore[attr-defined]
    return list(action.choices.values())


def test_options_of_qtctl_are_in_the_manual() -> None:
    parser = qtctl._parser()
    assert dashed(tags(section("qtctl.8", "OPTIONS"))) == parser_options(parser)
    of_commands = set().union(*map(parser_options, subparsers(parser))) - {"-h", "--help"}
    assert dashed(tags(section("qtctl.8", "COMMANDS"))) == of_commands


def test_commands_of_qtctl_are_in_the_manual() -> None:
    (action,) = [each for each in qtctl._parser()._actions if each.dest == "command"]
    assert action.choices is not None
    documented = re.findall(r"^\.SS (\w+)$", section("qtctl.8", "COMMANDS"), re.MULTILINE)
    assert documented == list(action.choices)


def known_mount_options() -> set[str]:
    prefixes = {prefix + "*" if prefix.endswith("-") else prefix.rstrip("=") for prefix in options._IGNORED_PREFIXES}
    return {*CLIENT_SCHEMA, "config", *options._WORDS, *options._CONTEXTS, *options._IGNORED_WORDS, *prefixes}


def documented_mount_options() -> set[str]:
    # Alternatives of a value are words of a tag too: driver=fuse3 | llfuse | auto.
    roff = re.sub(r"^(\.BR \w+=\w+) \|.*$", r"\1", section("mount.qtfs.8", "MOUNT OPTIONS"), flags=re.MULTILINE)
    roff = re.sub(r"^(\.BI \w+=).*$", r"\1", roff, flags=re.MULTILINE)
    return tags(roff)


def test_mount_options_are_in_the_manual() -> None:
    assert documented_mount_options() == known_mount_options()


def test_client_configuration_keys_are_in_the_manual() -> None:
    assert tags(section("qtfs.client.toml.5", "DESCRIPTION")) == set(CLIENT_SCHEMA)


def test_whitelist_groups_are_in_the_manual() -> None:
    assert tags(section("qtfs.whitelist.5", "DESCRIPTION")) == {type_.group for type_ in Type}


def first_cells(path: Path, heading: str) -> str:
    """The first cells of the tables below a heading, up to the next heading."""
    text = path.read_text().partition(f"\n{heading}\n")[2]
    body = re.split(r"^#+ ", prose(text), flags=re.MULTILINE)[0]
    return "\n".join(re.findall(r"^\| ([^|]*) \|", body, re.MULTILINE))


def test_deployment_lists_all_options_of_the_engine() -> None:
    listed = set(re.findall(r"`(--[\w-]+)", first_cells(ROOT / "doc/deployment.md", "### 2.2 Engine")))
    assert listed == parser_options(cli._parser()) - {"-h", "--help", "--version"}


def test_deployment_lists_our_mount_options() -> None:
    listed = set(re.findall(r"`(\w+)=?", first_cells(ROOT / "doc/deployment.md", "## 3. The client")))
    words = {
        *("foreground", "proc", "propagate", "nopropagate", "ro", "rw", "allow_other", "noallow_other", "allow_root"),
        *("lazy_cleanup", "nolazy_cleanup", "poll", "nopoll"),
    }
    alternatives = {"llfuse", "auto", "always"}
    assert listed - alternatives == {*CLIENT_SCHEMA, "config", *words}


def test_protected_files_are_listed() -> None:
    text = section("qtfs.special.toml.5", "PROTECTED").replace("\\-", "-")
    table = first_cells(ROOT / "doc/security.md", "### 5.1 Protected files")
    body = (ROOT / "doc/security.md").read_text().partition("### 5.1")[2].partition("### 5.2")[0]
    assert {"proc", "sysfs", "cgroup v1"} <= set(table.splitlines())
    for levels in PROTECTED.values():
        for path in (path.decode() for paths in levels.values() for path in paths):
            name = re.sub(r"^protected_.*", "protected_*", path.rpartition("/")[2])
            assert name in body, f"doc/security.md does not list {path}"
            assert path.startswith("/sys/") or name in text, f"the manual does not list {path}"


def test_sample_configuration_names_only_known_keys() -> None:
    keys = re.findall(r"^#? ?(\w+) = ", (ROOT / "config/qtfs/client.toml").read_text(), re.MULTILINE)
    assert set(keys) <= set(CLIENT_SCHEMA)


@pytest.mark.parametrize("path", sorted(MANUAL.iterdir()), ids=lambda path: path.name)
def test_manual_pages_are_well_formed(path: Path) -> None:
    lines = path.read_text().splitlines()
    name = path.stem.replace("-", "\\-")
    assert lines[0].startswith(f".TH {name.upper()} {path.suffix[1:]} ")
    assert lines[1] == ".SH NAME"
    assert lines[2].startswith(f"{name} \\- ")
    assert not [line for line in lines if line != line.rstrip() or not line]


@pytest.mark.skipif(shutil.which("groff") is None, reason="groff is not installed")
@pytest.mark.parametrize("path", sorted(MANUAL.iterdir()), ids=lambda path: path.name)
def test_groff_has_nothing_to_say_about_manual_pages(path: Path) -> None:
    command = ["groff", "-man", "-Tutf8", "-ww", str(path)]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stderr == ""


@documents
def test_code_blocks_are_closed_and_tables_regular(path: Path) -> None:
    text = path.read_text()
    assert len(re.findall(r"^```", text, re.MULTILINE)) % 2 == 0
    for table in re.findall(r"(?:^\|.*\n?)+", prose(text), re.MULTILINE):
        assert len({row.replace("\\|", "").count("|") for row in table.splitlines()}) == 1, table
