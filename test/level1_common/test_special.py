"""special.toml: what is understood, what is refused and where, and how rules relate to what is mounted."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from qtfs_common.errors import ConfigError
from qtfs_common.pathtree import ANY, NUMBER
from qtfs_common.special import Action, Rule, fill_in, load_special, parse_special, process_rules

ROOT = Path(__file__).resolve().parents[2]


def parse(text: str) -> tuple[Rule, ...]:
    return parse_special(text, "special.toml")


def one(text: str) -> Rule:
    (rule,) = parse(f"[[rule]]\n{text}\n")
    return rule


def mistake(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse(text)
    return str(caught.value)


def test_all_actions() -> None:
    assert one('path = "/a/*/b"\naction = "hide"') == Rule((b"a", ANY, b"b"), Action.HIDE)
    assert one('path = "//a/./b/"\naction = "readonly"') == Rule((b"a", b"b"), Action.READONLY)
    assert one('path = "/a"\naction = "remote"') == Rule((b"a",), Action.REMOTE)
    assert one('path = "/a"\naction = "local"\ntarget = "/b/{pid}"') == Rule((b"a",), Action.LOCAL, target="/b/{pid}")
    assert one('path = "/proc/[pid]"\naction = "local"\ntarget = "/l/{name}"\ncommands = ["bash"]') == Rule(
        (b"proc", NUMBER), Action.LOCAL, target="/l/{name}", commands=(b"bash",)
    )
    assert one('path = "/a"\naction = "replace"\nfile = "/b"') == Rule((b"a",), Action.REPLACE, file="/b")
    assert one('path = "/a"\naction = "replace"\ncommand = ["/bin/x", "{tid}"]').command == ("/bin/x", "{tid}")


def test_no_rules() -> None:
    assert parse("") == parse("# nothing\n") == parse("rule = []\n") == ()


def test_a_missing_file_is_no_rules_unless_it_was_asked_for(tmp_path: Path) -> None:
    assert load_special(tmp_path / "none", required=False) == ()
    with pytest.raises(ConfigError, match=r"none: cannot read the rules: No such file"):
        load_special(tmp_path / "none")


def test_bytes_that_are_no_text_have_their_line(tmp_path: Path) -> None:
    (tmp_path / "bad").write_bytes(b"# one\n\xff\n")
    with pytest.raises(ConfigError, match=r"bad:2: not valid UTF-8"):
        load_special(tmp_path / "bad")


MISTAKES = {
    'action = "hide"': "path is missing",
    'path = "/a"': "action is missing",
    'path = ""\naction = "hide"': "path must be a string that is not empty",
    'path = 7\naction = "hide"': "path must be a string that is not empty, not 7",
    'path = "a"\naction = "hide"': "path 'a' is not absolute",
    'path = "/"\naction = "hide"': "path '/' is everything",
    'path = "/a/../b"\naction = "hide"': "path '/a/../b' contains '..'",
    'path = "/a*"\naction = "hide"': "'*' stands for a whole component",
    'path = "/a\\u0000"\naction = "hide"': "path contains a NUL byte",
    f'path = "/{"x" * 256}"\naction = "hide"': "path is longer than a path can be",
    'path = "/a"\naction = "remove"': "unknown action 'remove'; known are remote, local, hide, readonly, replace",
    'path = "/a"\naction = "hide"\ntarget = "/b"': "key 'target' means nothing to action 'hide'; it takes path, action",
    'path = "/a"\naction = "local"': "target is missing",
    'path = "/a"\naction = "local"\ntarget = "/b/{uid}"': "unknown placeholder {uid}",
    'path = "/a"\naction = "local"\ntarget = "/b/{name}"': "{name} is what the path's last component matches",
    f'path = "/a"\naction = "local"\ntarget = "/{"x" * 2050}"': "target is longer than",
    'path = "/a"\naction = "local"\ntarget = "/b"\ncommands = ["x"]': "commands are for paths that end in [pid]",
    'path = "/[pid]"\naction = "local"\ntarget = "/b"\ncommands = "x"': "commands must be a list of strings",
    'path = "/[pid]"\naction = "local"\ntarget = "/b"\ncommands = ["sixteen-letters-"]': "15 bytes",
    'path = "/a"\naction = "replace"': "action 'replace' needs either file or command",
    'path = "/a"\naction = "replace"\nfile = "/b"\ncommand = ["/c"]': "action 'replace' needs either file or command",
    'path = "/a"\naction = "replace"\nfile = "b"': "file 'b' is not an absolute path",
    'path = "/a"\naction = "replace"\ncommand = ["date"]': "'date' is not the absolute path of a program",
    'path = "/a"\naction = "replace"\ncommand = "/bin/date"': "command must be a list of strings",
    'path = "/*"\naction = "replace"\ncommand = ["/{name}"]': "is not the absolute path of a program",
}


@pytest.mark.parametrize("text", MISTAKES, ids=MISTAKES.values())
def test_a_bad_rule_is_named_with_file_and_line(text: str) -> None:
    good = '[[rule]]\npath = "/good"\naction = "hide"\n'
    found = mistake(f"# rules\n{good}\n[[rule]]\n{text}\n{good}")
    assert found.startswith("special.toml:6: rule 2: ")
    assert MISTAKES[text] in found


def test_lines_are_those_of_headers_not_of_text_that_looks_like_one() -> None:
    first = '[[rule]]\npath = "/a"\naction = "local"\ntarget = """\n[[rule]]\n"""\n'
    assert mistake(f'{first}  [[ rule ]]\npath = "b"\n').startswith("special.toml:7: rule 2: path 'b'")


def test_other_mistakes_of_a_file() -> None:
    assert mistake("[[rule]]\npath = \n").startswith("special.toml:2: ")
    assert mistake("\n[[rules]]\n") == "special.toml:2: unknown key 'rules'; a file is a list of [[rule]]"
    assert mistake("rule = 7\n").startswith("special.toml: rules stand as [[rule]]")
    assert mistake('rule = [{path = "a"}]\n') == "special.toml: rule 1: path 'a' is not absolute"


def test_what_a_mount_sees_of_a_rule() -> None:
    rule = one('path = "/proc/[pid]/mem"\naction = "hide"')
    assert rule.below(b"/") == (b"proc", NUMBER, b"mem")
    assert rule.below(b"/proc") == (NUMBER, b"mem")
    assert rule.below(b"/proc/17") == (b"mem",)
    assert rule.below(b"/proc/17/mem") == rule.below(b"/proc/17/mem/below") == ()
    assert rule.below(b"/proc/self") is rule.below(b"/sys") is None


def test_placeholders() -> None:
    assert fill_in("/x/{pid}/{tid}/{name}{pid}", pid=1, tid=2, name="n{tid}") == "/x/1/2/n{tid}1"


def test_the_originals_rules() -> None:
    found = {b"/".join(rule.pattern): rule for rule in process_rules("/elsewhere")}
    assert found[b"proc/self"].target == "/elsewhere/{pid}"
    assert found[b"proc/thread-self"].target == "/elsewhere/{pid}/task/{tid}"
    named = found[b"proc/[pid]"]
    assert named.target == "/elsewhere/{name}" and {b"bash", b"dockerd-real", b"rexec"} < set(named.commands)


def test_the_sample_has_no_rules_and_all_its_examples_are_good() -> None:
    text = (ROOT / "config/qtfs/special.toml").read_text()
    assert parse(text) == ()
    keys = ("# [[", "# path", "# action", "# target", "# commands", "# command =", "# file")
    examples = "".join(f"{line.removeprefix('# ')}\n" for line in text.splitlines() if line.startswith(keys))
    assert {rule.action for rule in parse(examples)} == set(Action)
    assert os.fsencode(examples).isascii()
