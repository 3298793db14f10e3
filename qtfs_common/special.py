"""Special rules, ``/etc/qtfs/special.toml``: paths of the server that clients see differently.

A file is a list of rules::

    [[rule]]
    path = "/proc/[pid]/environ"
    action = "hide"

``path`` is absolute, on the server; a component may be ``*`` (any one) or ``[pid]`` (a decimal number). What the
actions do, and which further keys they take, is in qtfs.special.toml(5). Of rules for one path the last one wins; a
rule with ``commands`` leaves processes it does not name to the rule before. A mistake anywhere spoils the whole file.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from qtfs_common.config import parse_toml, read_text
from qtfs_common.errors import ConfigError
from qtfs_common.pathtree import ANY, NUMBER, components, is_number

DEFAULT_RULES = "/etc/qtfs/special.toml"
DEFAULT_LOCAL_PROC = "/local_proc"
#: Of one file; a node id of the client has room for the number.
MAX_RULES = 4096
#: Commands whose processes ``-o proc`` takes from the client: the original's list.
LOCAL_COMMANDS = (
    *("bash", "isula", "isulad", "isulad-real", "kubelet", "kubelet-real", "dockerd", "dockerd-real"),
    *("containerd", "containerd-real", "libvirtd", "virsh", "rpc-worker", "rexec"),
)
_PATH_MAX = 4095  # linux/limits.h, less the NUL
_COMM_MAX = 15  # TASK_COMM_LEN of linux/sched.h, less the NUL
_PLACEHOLDER = re.compile(r"\{[^{}]*\}")
_LONG_STRING = re.compile(r'"""(?:\\.|[^\\])*?"""|' + r"'''.*?'''", re.DOTALL)
_HEADER = re.compile(r"^[ \t]*\[\[[ \t]*[\"']?rule[\"']?[ \t]*\]\]", re.MULTILINE)


class Action(Enum):
    """What a rule makes of its path."""

    REMOTE = "remote"
    LOCAL = "local"
    HIDE = "hide"
    READONLY = "readonly"
    REPLACE = "replace"


@dataclass(frozen=True, slots=True)
class Rule:
    """One rule. ``target`` is for LOCAL, and ``file`` or ``command`` for REPLACE; all may have placeholders."""

    pattern: tuple[bytes, ...]
    action: Action
    target: str = ""
    commands: tuple[bytes, ...] = ()
    file: str = ""
    command: tuple[str, ...] = ()

    @property
    def texts(self) -> tuple[str, ...]:
        """What may have placeholders."""
        return tuple(filter(None, (self.target, self.file, *self.command)))

    @property
    def is_conditional(self) -> bool:
        """Whether the rule before it may decide."""
        return bool(self.commands)

    def below(self, source: bytes) -> tuple[bytes, ...] | None:
        """The pattern as seen from a mount of ``source``: empty if that lies within it, None if elsewhere."""
        top = components(source)
        if not all(_matches(pattern, name) for pattern, name in zip(self.pattern, top, strict=False)):
            return None
        return self.pattern[len(top) :]


def _matches(pattern: bytes, name: bytes) -> bool:
    return pattern in (ANY, name) or (pattern == NUMBER and is_number(name))


def concerned(rules: Sequence[Rule], source: str) -> list[Rule]:
    """Those of the rules that make something of what a mount of `source` shows."""
    top = os.fsencode(source)
    return [rule for rule in rules if rule.action is not Action.REMOTE and rule.below(top) is not None]


def fill_in(text: str, *, pid: int, tid: int, name: str) -> str:
    """A rule's text with the placeholders' values."""
    values = {"{pid}": str(pid), "{tid}": str(tid), "{name}": name}
    return _PLACEHOLDER.sub(lambda found: values[found.group()], text)


def process_rules(local_proc: str = DEFAULT_LOCAL_PROC) -> tuple[Rule, ...]:
    """The rules of ``-o proc``. ``local_proc`` is where the client's own procfs is mounted.

    ``/proc/mounts`` needs none: the engine answers that it is a link to ``1/mounts``.
    """
    return (
        Rule((b"proc", b"self"), Action.LOCAL, target=f"{local_proc}/{{pid}}"),
        Rule((b"proc", b"thread-self"), Action.LOCAL, target=f"{local_proc}/{{pid}}/task/{{tid}}"),
        Rule(
            (b"proc", NUMBER),
            Action.LOCAL,
            target=f"{local_proc}/{{name}}",
            commands=tuple(name.encode() for name in LOCAL_COMMANDS),
        ),
    )


# ---------------------------------------------------------------------------------------------------------- parsing


def load_special(path: str | os.PathLike[str] = DEFAULT_RULES, required: bool = True) -> tuple[Rule, ...]:
    """The rules in a file; none if it does not exist and is not required. Raises ConfigError naming file and line."""
    name = os.fspath(path)
    try:
        text = read_text(name)
    except FileNotFoundError as error:
        if not required:
            return ()
        raise ConfigError(name, f"cannot read the rules: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(name, f"cannot read the rules: {error.strerror}") from error
    return parse_special(text, name)


def parse_special(text: str, source: str) -> tuple[Rule, ...]:
    """The rules in ``text``, read from ``source``; raises ConfigError naming source, line and rule."""
    document = parse_toml(source, text)
    unknown = next((key for key in document if key != "rule"), None)
    if unknown is not None:
        line = next((n for n, each in enumerate(text.splitlines(), 1) if unknown in each), None)
        raise ConfigError(source, f"unknown key '{unknown}'; a file is a list of [[rule]]", line)
    tables = document.get("rule", [])
    lines = _header_lines(text)
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise ConfigError(source, "rules stand as [[rule]], each with its keys below it")
    if len(tables) > MAX_RULES:
        raise ConfigError(source, f"{len(tables)} rules, at most {MAX_RULES} are possible")
    rules = []
    for number, table in enumerate(tables, start=1):
        try:
            rules.append(_rule(table))
        except ValueError as error:
            # Written as an inline array they have no headers.
            line = lines[number - 1] if len(lines) == len(tables) else None
            raise ConfigError(source, f"rule {number}: {error}", line) from error
    return tuple(rules)


def _header_lines(text: str) -> list[int]:
    """The lines of [[rule]], which tomllib forgets. Within strings of many lines they mean nothing."""
    plain = _LONG_STRING.sub(lambda found: "\n" * found.group().count("\n"), text)
    return [plain.count("\n", 0, found.start()) + 1 for found in _HEADER.finditer(plain)]


_KEYS: Mapping[Action, tuple[str, ...]] = {
    Action.REMOTE: (),
    Action.LOCAL: ("target", "commands"),
    Action.HIDE: (),
    Action.READONLY: (),
    Action.REPLACE: ("file", "command"),
}


def _rule(table: Mapping[str, Any]) -> Rule:
    pattern = _pattern(_text(table, "path"))
    action = _action(_text(table, "action"))
    known = ("path", "action", *_KEYS[action])
    for key in table:
        if key not in known:
            raise ValueError(f"key '{key}' means nothing to action '{action.value}'; it takes {', '.join(known)}")
    rule = Rule(
        pattern,
        action,
        target=_target(table) if action is Action.LOCAL else "",
        commands=_commands(table, pattern) if "commands" in table else (),
        file=_file(table) if "file" in table else "",
        command=_command(table) if "command" in table else (),
    )
    if action is Action.REPLACE and bool(rule.file) == bool(rule.command):
        raise ValueError("action 'replace' needs either file or command")
    _check_placeholders(rule)
    return rule


def _text(table: Mapping[str, Any], key: str) -> str:
    value = table.get(key)
    if value is None:
        raise ValueError(f"{key} is missing")
    if not isinstance(value, str) or not value:
        raise ValueError(f"{key} must be a string that is not empty, not {value!r}")
    if "\0" in value:
        raise ValueError(f"{key} contains a NUL byte")
    return value


def _texts(table: Mapping[str, Any], key: str) -> Sequence[str]:
    values = table[key]
    if not isinstance(values, list) or not values:
        raise ValueError(f"{key} must be a list of strings that is not empty, not {values!r}")
    return [_text({key: value}, key) for value in values]


def _action(text: str) -> Action:
    try:
        return Action(text)
    except ValueError:
        known = ", ".join(action.value for action in Action)
        raise ValueError(f"unknown action '{text}'; known are {known}") from None


def _pattern(text: str) -> tuple[bytes, ...]:
    if not text.startswith("/"):
        raise ValueError(f"path '{text}' is not absolute")
    pattern = tuple(name for name in components(os.fsencode(text)) if name != b".")
    if not pattern:
        raise ValueError("path '/' is everything: rules are for what lies below it")
    if b".." in pattern:
        raise ValueError(f"path '{text}' contains '..'")
    if any(b"*" in name and name != ANY for name in pattern):
        raise ValueError(f"path '{text}': '*' stands for a whole component")
    if len(text) > _PATH_MAX or any(len(name) > 255 for name in pattern):
        raise ValueError("path is longer than a path can be")
    return pattern


def _target(table: Mapping[str, Any]) -> str:
    target = _text(table, "target")
    if len(os.fsencode(target)) > _PATH_MAX // 2:  # placeholders grow
        raise ValueError(f"target is longer than {_PATH_MAX // 2} bytes")
    return target


def _commands(table: Mapping[str, Any], pattern: tuple[bytes, ...]) -> tuple[bytes, ...]:
    if pattern[-1] != NUMBER:
        raise ValueError("commands are for paths that end in [pid]")
    names = tuple(os.fsencode(name) for name in _texts(table, "commands"))
    for name in names:
        if len(name) > _COMM_MAX or b"/" in name:
            shown = f"'{os.fsdecode(name)}' is not as /proc/PID/comm shows it: {_COMM_MAX} bytes, no /"
            raise ValueError(f"commands: {shown}")
    return names


def _file(table: Mapping[str, Any]) -> str:
    file = _text(table, "file")
    if not file.startswith("/"):
        raise ValueError(f"file '{file}' is not an absolute path")
    return file


def _command(table: Mapping[str, Any]) -> tuple[str, ...]:
    command = tuple(_texts(table, "command"))
    if not command[0].startswith("/") or _PLACEHOLDER.search(command[0]):
        raise ValueError(f"command: '{command[0]}' is not the absolute path of a program")
    return command


def _check_placeholders(rule: Rule) -> None:
    found = {each for text in rule.texts for each in _PLACEHOLDER.findall(text)}
    unknown = sorted(found - {"{pid}", "{tid}", "{name}"})
    if unknown:
        raise ValueError(f"unknown placeholder {unknown[0]}; known are {{pid}}, {{tid}} and {{name}}")
    if "{name}" in found and rule.pattern[-1] not in (ANY, NUMBER):
        raise ValueError("{name} is what the path's last component matches, which has to be * or [pid]")

