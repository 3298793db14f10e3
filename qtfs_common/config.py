"""Configuration in TOML: ``/etc/qtfs/client.toml`` and the engine's ``--config`` file.

Both are flat tables. A schema maps each key to the types TOML may give and a check that returns the value to use, or
raises ValueError with the reason. The same checks serve the options of mount.qtfs, through :func:`value_from_text`.
"""

from __future__ import annotations

import ipaddress
import os
import re
import stat
import tomllib
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from qtfs_common.addresses import VSOCK_ANY, parse_address
from qtfs_common.errors import AddressError, ConfigError
from qtfs_common.files import open_input
from qtfs_common.rings.geometry import parse_layout

DEFAULT_CLIENT_CONFIG = "/etc/qtfs/client.toml"
LOG_LEVELS = ("NONE", "ERROR", "WARN", "INFO", "DEBUG")
DRIVERS = ("fuse3", "llfuse", "auto")
CACHES = ("none", "auto", "always")
SPECIALS = ("remote", "local")
MAX_CONNECTIONS = 64
MAX_WORKERS = 512
MAX_ADDRESSES = 64
#: Bytes; the kernel reads at least a page, and a message carries at most 1 MiB.
MAX_READ_RANGE = (4096, 1 << 20)
#: What the reply to MOUNT can tell of the grace time.
MAX_SECONDS = (1 << 32) - 1

Check: TypeAlias = Callable[[Any], Any]
Schema: TypeAlias = Mapping[str, tuple[tuple[type, ...], Check]]

_TYPE_NAMES = {int: "an integer", float: "a number", str: "a string", list: "a list", bool: "true or false"}
_TOML_PLACE = re.compile(r" \(at line (\d+), column \d+\)$")
_TOML_END = re.compile(r" \(at end of document\)$")


# ----------------------------------------------------------------------------------------------------------- checks


def _between(least: int, most: int) -> Check:
    def check(value: int) -> int:
        if not least <= value <= most:
            raise ValueError(f"{value} is not between {least} and {most}")
        return value

    return check


def _one_of(*choices: str) -> Check:
    def check(value: str) -> str:
        if value not in choices:
            raise ValueError(f"'{value}' is not one of {', '.join(choices)}")
        return value

    return check


def _seconds(value: float) -> float:
    if not 0 <= value <= MAX_SECONDS:  # nor is NaN
        raise ValueError(f"{value} is not a number of seconds (0 to {MAX_SECONDS})")
    return float(value)


def _log_level(value: str) -> str:
    return str(_one_of(*LOG_LEVELS)(value.upper()))


def _path(value: str) -> str:
    # Daemons leave the directory they were started in.
    if not value.startswith("/"):
        raise ValueError(f"'{value}' is not an absolute path")
    if "\0" in value:
        raise ValueError("the path contains a NUL byte")
    return value


def _address(value: str) -> str:
    """Stays text: the port it may lack is known only when all sources of options are read."""
    parse_address(value)
    return value


def _addresses(value: list[Any]) -> tuple[str, ...]:
    for entry in value:
        if not isinstance(entry, str):
            raise ValueError(f"{entry!r} is not a string")
        parse_address(entry)
    if not value:
        raise ValueError("the list is empty")
    if len(value) > MAX_ADDRESSES:
        raise ValueError(f"{len(value)} addresses, at most {MAX_ADDRESSES} are possible")
    return tuple(value)


def _bar_layout(value: str) -> str:
    parse_layout(value)
    return value


def _ip(value: str) -> str:
    try:
        return str(ipaddress.ip_address(value))
    except ValueError:
        raise ValueError(f"'{value}' is not an IP address") from None


_PORT = ((int,), _between(1, 65535))
_PATH = ((str,), _path)
_SECONDS = ((int, float), _seconds)
_LEVEL = ((str,), _log_level)
_CONNECTIONS = ((int,), _between(1, MAX_CONNECTIONS))

#: Keys of the engine's ``--config`` file. ``grace`` is in seconds.
ENGINE_SCHEMA: Schema = {
    "workers": ((int,), _between(1, MAX_WORKERS)),
    "listen": ((list,), _addresses),
    "whitelist": _PATH,
    "special": _PATH,
    "log_level": _LEVEL,
    "pid_file": _PATH,
    "run_dir": _PATH,
    "key_file": _PATH,
    "grace": _SECONDS,
    "max_nodes": ((int,), _between(1024, 1 << 24)),
    "max_handles": ((int,), _between(16, 1 << 20)),
    "bar_layout": ((str,), _bar_layout),
    # 0: any free port; the ready line tells which.
    "port": ((int,), _between(0, 65535)),
}

#: Keys of client.toml, and options of mount.qtfs. ``timeout`` is in seconds, ``max_read`` in bytes.
CLIENT_SCHEMA: Schema = {
    "server": ((str,), _address),
    "port": _PORT,
    "driver": ((str,), _one_of(*DRIVERS)),
    "cache": ((str,), _one_of(*CACHES)),
    "special": ((str,), _one_of(*SPECIALS)),
    "timeout": _SECONDS,
    "max_read": ((int,), _between(*MAX_READ_RANGE)),
    "log_level": _LEVEL,
    "key_file": _PATH,
    "run_dir": _PATH,
    "threads": _CONNECTIONS,
    "special_rules": _PATH,
    "local_proc": _PATH,
    "qtfs_server_vsock_cid": ((int,), _between(0, VSOCK_ANY - 1)),
    "qtfs_server_vsock_port": ((int,), _between(1, VSOCK_ANY - 1)),
    "qtfs_server_ip": ((str,), _ip),
    "qtfs_server_port": _PORT,
    "qtfs_conn_max_conn": _CONNECTIONS,
    "qtfs_log_level": _LEVEL,
}


# ---------------------------------------------------------------------------------------------------------- loading


def load_config(path: str | os.PathLike[str], schema: Schema, required: bool = True) -> dict[str, Any]:
    """The checked values in the file ``path``; empty if it does not exist and is not required.

    Raises ConfigError naming file, line and key.
    """
    name = os.fspath(path)
    try:
        text = read_text(name)
    except FileNotFoundError as error:
        if not required:
            return {}
        raise ConfigError(name, f"cannot read the configuration: {error.strerror}") from error
    except OSError as error:
        raise ConfigError(name, f"cannot read the configuration: {error.strerror}") from error
    return {key: _check(name, text, schema, key, value) for key, value in parse_toml(name, text).items()}


def value_from_text(key: str, text: str, schema: Schema) -> Any:
    """The checked value of ``key`` from an option's text; raises ValueError with the reason."""
    types, check = schema[key]
    if str in types:
        return _run_check(check, text)
    if not re.fullmatch(r"[0-9]{1,10}(\.[0-9]{1,9})?" if float in types else r"[0-9]{1,10}", text):
        raise ValueError(f"'{text}' is not {_TYPE_NAMES[types[-1]]}")
    return _run_check(check, types[-1](text))


def read_text(name: str) -> str:
    """A text file that a user named; raises OSError, or ConfigError if it is no text."""
    with open_input(name) as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigError(name, "the configuration is not a regular file")
        data = file.read()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(name, "not valid UTF-8", data.count(b"\n", 0, error.start) + 1) from error


def parse_toml(name: str, text: str) -> dict[str, Any]:
    """A TOML document, read from `name`; raises ConfigError naming that and the line."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message = str(error)
        place = _TOML_PLACE.search(message)
        line = int(place.group(1)) if place else text.count("\n") + (not text.endswith("\n"))
        reason = _TOML_END.sub("", _TOML_PLACE.sub("", message))
        raise ConfigError(name, reason[:1].lower() + reason[1:], line) from error


def _check(name: str, text: str, schema: Schema, key: str, value: Any) -> Any:
    line = _line_of(key, text)
    if key not in schema:
        raise ConfigError(name, f"unknown key '{key}'; known are {', '.join(schema)}", line)
    types, check = schema[key]
    # bool is an int to isinstance, and 'port = true' a mistake to everyone else.
    if type(value) not in types:
        raise ConfigError(name, f"{key} must be {_TYPE_NAMES[types[-1]]}, not {value!r}", line)
    try:
        return _run_check(check, value)
    except ValueError as error:
        raise ConfigError(name, f"{key}: {error}", line) from error


def _run_check(check: Check, value: Any) -> Any:
    try:
        return check(value)
    except AddressError as error:  # the same text under the exception type that checks promise
        raise ValueError(str(error)) from error


def _line_of(key: str, text: str) -> int | None:
    """tomllib forgets lines once a document is well formed; the schema is flat, so looking for the key will do."""
    name = re.escape(key)
    found = re.search(rf"""^[ \t]*\[*[ \t]*["']?{name}["']?[ \t]*[.=\]]""", text, re.MULTILINE)
    return text.count("\n", 0, found.start()) + 1 if found else None
