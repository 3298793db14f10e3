"""TOML configuration: the schema, its errors, and the samples that are installed."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from qtfs_common.config import CLIENT_SCHEMA, ENGINE_SCHEMA, Schema, load_config, value_from_text
from qtfs_common.errors import ConfigError
from qtfs_common.whitelist import load_whitelist

SAMPLES = Path(__file__).parents[2] / "config" / "qtfs"

ENGINE = """
workers = 16
listen = ["vsock://any", "unix:///run/qtfs/engine.sock"]
whitelist = "/etc/qtfs/whitelist"
special = "/etc/qtfs/special.toml"
log_level = "debug"
pid_file = "/run/e.pid"
run_dir = "/run/qtfs"
key_file = "/etc/qtfs/key"
grace = 2.5
max_nodes = 4096
max_handles = 256
bar_layout = "channels=4,request=1M"
port = 12345
"""

CLIENT = """
server = "tcp://127.0.0.1"
port = 1
driver = "llfuse"
cache = "none"
special = "local"
timeout = 30
max_read = 131072
log_level = "INFO"
key_file = "/k"
run_dir = "/r"
threads = 4
special_rules = "/etc/qtfs/special.toml"
local_proc = "/local_proc"
qtfs_server_vsock_cid = 2
qtfs_server_vsock_port = 12345
qtfs_server_ip = "192.0.2.1"
qtfs_server_port = 12345
qtfs_conn_max_conn = 64
qtfs_log_level = "none"
"""


def write(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_every_engine_key_is_taken(tmp_path: Path) -> None:
    values = load_config(write(tmp_path, ENGINE), ENGINE_SCHEMA)
    assert values.keys() == ENGINE_SCHEMA.keys()
    assert values["listen"] == ("vsock://any", "unix:///run/qtfs/engine.sock")
    assert values["log_level"] == "DEBUG"
    assert values["grace"] == 2.5


def test_every_client_key_is_taken(tmp_path: Path) -> None:
    values = load_config(write(tmp_path, CLIENT), CLIENT_SCHEMA)
    assert values.keys() == CLIENT_SCHEMA.keys()
    assert type(values["timeout"]) is float and values["timeout"] == 30.0
    assert values["qtfs_log_level"] == "NONE"


MISTAKES = [
    (ENGINE_SCHEMA, 'worker = "x"', 1, "unknown key 'worker'"),
    (ENGINE_SCHEMA, "port = 1\n[worker]\nx = 1", 2, "unknown key 'worker'"),
    (ENGINE_SCHEMA, "port = 1\n\n  server = 2", 3, "unknown key 'server'"),
    (ENGINE_SCHEMA, 'workers = "16"', 1, "workers must be an integer, not '16'"),
    (ENGINE_SCHEMA, "workers = 16.0", 1, "workers must be an integer, not 16.0"),
    (ENGINE_SCHEMA, "workers = true", 1, "workers must be an integer, not True"),
    (ENGINE_SCHEMA, "[workers]\nx = 1", 1, "workers must be an integer"),
    (ENGINE_SCHEMA, "workers = 0", 1, "workers: 0 is not between 1 and 512"),
    (ENGINE_SCHEMA, "workers = 1025", 1, "workers: 1025"),
    (ENGINE_SCHEMA, "listen = []", 1, "listen: the list is empty"),
    (ENGINE_SCHEMA, "listen = [1]", 1, "listen: 1 is not a string"),
    (ENGINE_SCHEMA, 'listen = ["2", "x://y"]', 1, "unknown transport 'x'"),
    (ENGINE_SCHEMA, 'listen = "2"', 1, "listen must be a list"),
    (ENGINE_SCHEMA, 'whitelist = "wl"', 1, "whitelist: 'wl' is not an absolute path"),
    (ENGINE_SCHEMA, 'pid_file = "/a\\u0000"', 1, "pid_file: the path contains a NUL byte"),
    (ENGINE_SCHEMA, 'log_level = "loud"', 1, "log_level: 'LOUD' is not one of NONE, ERROR, WARN, INFO, DEBUG"),
    (ENGINE_SCHEMA, "grace = -1", 1, "grace: -1 is not a number of seconds"),
    (ENGINE_SCHEMA, "grace = nan", 1, "grace: nan is not a number of seconds"),
    (ENGINE_SCHEMA, "grace = inf", 1, "grace: inf"),
    (ENGINE_SCHEMA, "grace = 4294967296", 1, "grace: 4294967296 is not a number of seconds"),
    (CLIENT_SCHEMA, "timeout = 1e300", 1, "timeout: 1e+300 is not a number of seconds"),
    (ENGINE_SCHEMA, 'bar_layout = "channels=0"', 1, "channels=0: not a number from 1 to 4096"),
    (ENGINE_SCHEMA, "port = 65536", 1, "port: 65536 is not between 0 and 65535"),
    (ENGINE_SCHEMA, "port = 65536", 1, "port: 65536"),
    (CLIENT_SCHEMA, 'server = "nowhere"', 1, "'nowhere'"),
    (CLIENT_SCHEMA, 'driver = "fuse2"', 1, "driver: 'fuse2' is not one of fuse3, llfuse, auto"),
    (CLIENT_SCHEMA, 'cache = "yes"', 1, "cache: 'yes' is not one of none, auto, always"),
    (CLIENT_SCHEMA, "max_read = 4095", 1, "max_read: 4095"),
    (CLIENT_SCHEMA, "qtfs_conn_max_conn = 65", 1, "qtfs_conn_max_conn: 65 is not between 1 and 64"),
    (CLIENT_SCHEMA, 'qtfs_server_ip = "host"', 1, "qtfs_server_ip: 'host' is not an IP address"),
    (CLIENT_SCHEMA, "port = 1\nport = 2", 2, "cannot overwrite a value"),
    (CLIENT_SCHEMA, "port = 1\ncache = none", 2, "invalid value"),
    (CLIENT_SCHEMA, "port = 1\ncache =", 2, "invalid value"),
    (CLIENT_SCHEMA, b'port = 1\n\ncache = "\xff"', 3, "not valid UTF-8"),
]


@pytest.mark.parametrize(("schema", "text", "line", "reason"), MISTAKES)
def test_mistakes_are_named_with_file_and_line(
    tmp_path: Path, schema: Schema, text: str | bytes, line: int, reason: str
) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, schema)
    assert str(caught.value).startswith(f"{path}:{line}: ")
    assert reason in str(caught.value)


def test_a_missing_file_is_an_error_only_if_required(tmp_path: Path) -> None:
    assert load_config(tmp_path / "no", CLIENT_SCHEMA, required=False) == {}
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/no: cannot read the configuration: No such file")):
        load_config(tmp_path / "no", CLIENT_SCHEMA)


def test_what_cannot_be_read_is_an_error_even_if_not_required(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for path in (tmp_path / "fifo", tmp_path):
        with pytest.raises(ConfigError, match=re.escape(f"{path}: ")):
            load_config(path, CLIENT_SCHEMA, required=False)


@pytest.mark.parametrize(
    ("key", "text", "value"),
    [
        ("port", "12", 12),
        ("timeout", "3", 3.0),
        ("timeout", "0.25", 0.25),
        ("log_level", "warn", "WARN"),
        ("server", "2", "2"),
    ],
)
def test_options_text_becomes_the_same_values(key: str, text: str, value: Any) -> None:
    found = value_from_text(key, text, CLIENT_SCHEMA)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("key", "text"),
    [("port", "x"), ("port", "1.0"), ("port", "-1"), ("port", "\u0663"), ("port", " 1"), ("port", "9" * 5000)]
    + [("timeout", text) for text in ("nan", "inf", "-1", "1e3", "5s", "", ".")],
)
def test_options_text_that_is_no_number_is_refused(key: str, text: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f"'{text}' is not a")):
        value_from_text(key, text, CLIENT_SCHEMA)


def test_the_longest_times(tmp_path: Path) -> None:
    for key, schema in (("grace", ENGINE_SCHEMA), ("timeout", CLIENT_SCHEMA)):
        assert load_config(write(tmp_path, f"{key} = 4294967295"), schema) == {key: 4294967295.0}
        with pytest.raises(ValueError, match=r"9999999999\.0 is not a number of seconds"):
            value_from_text(key, "9999999999", schema)


def test_the_installed_samples_load() -> None:
    load_config(SAMPLES / "client.toml", CLIENT_SCHEMA)
    load_whitelist(SAMPLES / "whitelist").require_mount()


def test_every_key_shown_in_the_sample_exists() -> None:
    shown = re.findall(r"^#? ?([a-z_]+) = ", (SAMPLES / "client.toml").read_text(), re.MULTILINE)
    assert shown and set(shown) <= CLIENT_SCHEMA.keys()
