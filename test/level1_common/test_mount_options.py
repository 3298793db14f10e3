"""mount.qtfs' command line: what mount(8), fstab and systemd pass, precedence, and messages for mistakes."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qtfs_client.options import MountExit, MountOptions, OptionError, parse_command_line, split_options
from qtfs_common.addresses import TcpAddress, UnixAddress, VsockAddress
from qtfs_common.errors import AddressError, ConfigError, QtfsError
from qtfs_common.special import Action, Rule, process_rules

ROOT_FLAGS = ("suid", "nodev")


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """client.toml; it does not exist until a test writes it."""
    return tmp_path / "client.toml"


@pytest.fixture
def parse(tmp_path: Path, config: Path) -> Any:
    """mount.qtfs /src DIR ARGUMENTS..."""
    (tmp_path / "mnt").mkdir()

    def run(*arguments: str, source: str = "/src", privileged: bool = True) -> MountOptions:
        command = [source, str(tmp_path / "mnt"), *arguments]
        return parse_command_line(command, default_config=str(config), privileged=privileged)

    return run


def test_mounts_exit_codes() -> None:
    assert [MountExit.USAGE, MountExit.SYSTEM, MountExit.FAILURE, MountExit.SOME_SUCCEEDED] == [1, 2, 32, 64]


def test_defaults(parse: Any, tmp_path: Path) -> None:
    assert parse("-o", "server=2") == MountOptions(
        source="/src",
        mountpoint=str((tmp_path / "mnt").resolve()),
        server=VsockAddress(2, 12345),
        kernel_flags=ROOT_FLAGS,
        allow_other=True,
    )


def test_our_options(parse: Any) -> None:
    text = "server=tcp://h:9,driver=llfuse,cache=always,timeout=2.5,max_read=65536,threads=3,key_file=/k,run_dir=/r"
    found = parse("-o", text, "-o", "log_level=debug,foreground,ro")
    assert (found.server, found.driver, found.cache, found.timeout_s) == (TcpAddress("h", 9), "llfuse", "always", 2.5)
    assert (found.max_read, found.channels, found.key_file, found.run_dir) == (65536, 3, "/k", "/r")
    assert (found.log_level, found.foreground, found.read_only) == ("DEBUG", True, True)


def test_special_rules_come_behind_those_of_proc(parse: Any, tmp_path: Path) -> None:
    (tmp_path / "rules").write_text('[[rule]]\npath = "/proc/self"\naction = "hide"\n')
    found = parse("-o", f"server=2,proc,local_proc=/p/,special_rules={tmp_path}/rules").rules
    assert found == (*process_rules("/p"), Rule((b"proc", b"self"), Action.HIDE))
    assert parse("-o", "server=2,proc").rules == process_rules("/local_proc")
    assert parse("-o", "server=2,local_proc=/p").rules == ()
    with pytest.raises(ConfigError, match="/nowhere: cannot read the rules: No such file"):
        parse("-o", "server=2,special_rules=/nowhere")


def test_propagation_is_for_root(parse: Any) -> None:
    assert parse("-o", "server=2,propagate").propagate
    assert not parse("-o", "server=2,propagate,nopropagate").propagate
    with pytest.raises(OptionError, match="only root"):
        parse("-o", "server=2,propagate", privileged=False)


def test_poll_is_for_those_who_want_it(parse: Any) -> None:
    assert parse("-o", "server=2").poll and not parse("-o", "server=2,nopoll").poll
    assert parse("-o", "server=2,nopoll,poll").poll


def test_flags_of_mount8(parse: Any) -> None:
    found = parse("-sfnvr", "-N", "/proc/1/ns/mnt", "-t", "qtfs", "-o", "server=2")
    assert (found.fake, found.verbose, found.read_only, found.namespace) == (True, True, True, "/proc/1/ns/mnt")
    assert parse("-w", "-o", "server=2").read_only is False


def test_options_may_stand_anywhere(tmp_path: Path) -> None:
    directory = str(tmp_path)
    for command in (
        ["-o", "server=2", "/src", directory],
        ["/src", "-o", "server=2", directory],
        ["/src", directory, "-o", "server=2"],
        ["-v", "/src", "-o", "ro", directory, "-o", "server=2"],
    ):
        found = parse_command_line(command, default_config=f"{directory}/no")
        assert (found.source, found.mountpoint) == ("/src", str(tmp_path.resolve()))


@pytest.mark.parametrize("type_", ["qtfs", "fuse.qtfs", "qtfs.sub"])
def test_our_types_are_taken(parse: Any, type_: str) -> None:
    assert parse("-t", type_, "-o", "server=2").source == "/src"


@pytest.mark.parametrize(
    ("arguments", "read_only"),
    [
        (["-r", "-o", "rw"], False),
        (["-o", "rw", "-r"], True),
        (["-o", "ro,rw"], False),
        (["-o", "rw,ro"], True),
        (["-r", "-w"], False),
        (["-w", "-o", "defaults,ro"], True),
    ],
)
def test_the_last_of_ro_and_rw_wins(parse: Any, arguments: list[str], read_only: bool) -> None:
    assert parse("-o", "server=2", *arguments).read_only is read_only


# ---------------------------------------------------------------------------------------------------- generic options

IGNORED = [
    "defaults",
    "_netdev",
    "nofail",
    "noauto",
    "auto",
    "nouser",
    "x-systemd.automount",
    "x-systemd.device-timeout=5s",
    "x-gvfs-show",
    "X-mount.mkdir=0755",
    "comment=a=b",
    "relatime",
    "norelatime",
    "lazytime",
    "nolazytime",
    "mand",
    "nomand",
    "silent",
    "loud",
    "nostrictatime",
]


@pytest.mark.parametrize("option", IGNORED)
def test_options_for_others_change_nothing(parse: Any, option: str) -> None:
    assert parse("-o", f"server=2,{option}") == parse("-o", "server=2")


@pytest.mark.parametrize(
    ("options", "flags"),
    [
        ("nosuid", ("nosuid", "nodev")),
        ("dev", ("suid", "dev")),
        ("dev,nodev", ("suid", "nodev")),
        ("noexec", ("suid", "nodev", "noexec")),
        ("nosuid,suid,noexec,exec", ROOT_FLAGS),
        ("noatime,nodiratime,sync,dirsync", ("suid", "nodev", "noatime", "nodiratime", "sync", "dirsync")),
        ("noatime,atime,nodiratime,diratime,sync,async", ROOT_FLAGS),
        ("noatime,strictatime", ROOT_FLAGS),
        ("user", ("nosuid", "nodev", "noexec")),
        ("users", ("nosuid", "nodev", "noexec")),
        ("user=joe", ("nosuid", "nodev", "noexec")),
        ("user,exec,dev", ("nosuid", "dev")),
        ("exec,user", ("nosuid", "nodev", "noexec")),
        ("owner", ("nosuid", "nodev")),
        ("group,suid", ("suid", "nodev")),
        ("user,defaults", ("nosuid", "nodev", "noexec")),
        ('context="u:r:t:s0:c1,c2",nosuid', ("nosuid", "nodev", 'context="u:r:t:s0:c1,c2"')),
        ("rootcontext=u:r:t:s0", ("suid", "nodev", "rootcontext=u:r:t:s0")),
    ],
)
def test_kernel_flags(parse: Any, options: str, flags: tuple[str, ...]) -> None:
    assert parse("-o", f"server=2,{options}").kernel_flags == flags


def test_users_never_ask_for_what_fusermount_refuses(parse: Any) -> None:
    found = parse("-o", "server=2,suid,dev,exec", privileged=False)
    assert found.kernel_flags == ("nosuid", "nodev")
    assert (found.allow_other, found.allow_root) == (False, False)


@pytest.mark.parametrize(
    ("options", "other", "root"),
    [
        ("allow_other", True, False),
        ("allow_root", False, True),
        ("noallow_other", False, False),
        ("allow_root,allow_other", True, False),
        ("allow_other,allow_root", False, True),
    ],
)
def test_who_may_look(parse: Any, options: str, other: bool, root: bool) -> None:
    for privileged in (True, False):
        found = parse("-o", f"server=2,{options}", privileged=privileged)
        assert (found.allow_other, found.allow_root) == (other, root)


# ------------------------------------------------------------------------------------------------- server, precedence


@pytest.mark.parametrize(
    ("file", "options", "server"),
    [
        ("", "server=unix:///s", UnixAddress("/s")),
        ("", "server=2,port=7", VsockAddress(2, 7)),
        ("", "server=2:9,port=7", VsockAddress(2, 9)),
        ("", "qtfs_server_ip=192.0.2.1", TcpAddress("192.0.2.1", 12345)),
        ("", "qtfs_server_ip=192.0.2.1,qtfs_server_port=5,port=6", TcpAddress("192.0.2.1", 5)),
        ("", "qtfs_server_vsock_cid=3,qtfs_server_vsock_port=100000", VsockAddress(3, 100000)),
        ("", "qtfs_server_vsock_cid=3,port=6", VsockAddress(3, 6)),
        ("", "qtfs_server_vsock_cid=3,qtfs_server_ip=::1", TcpAddress("::1", 12345)),
        ("", "qtfs_server_vsock_cid=3,qtfs_server_ip=::1,server=unix:///s", UnixAddress("/s")),
        ("server = '5'", "", VsockAddress(5, 12345)),
        ("server = '5'\nport = 8", "", VsockAddress(5, 8)),
        ("server = '5'\nport = 8", "port=9", VsockAddress(5, 9)),
        ("port = 8", "server=5", VsockAddress(5, 8)),
        ("server = 'unix:///file'", "server=unix:///line", UnixAddress("/line")),
        ("server = 'unix:///file'", "qtfs_server_vsock_cid=2", VsockAddress(2, 12345)),
        ("qtfs_server_vsock_cid = 4\nqtfs_server_vsock_port = 9", "", VsockAddress(4, 9)),
        ("", "server=1,server=2", VsockAddress(2, 12345)),
    ],
)
def test_the_server(parse: Any, config: Path, file: str, options: str, server: object) -> None:
    config.write_text(file)
    assert parse("-o", options or "rw").server == server


def test_the_command_line_wins_over_the_file_and_that_over_defaults(parse: Any, config: Path) -> None:
    config.write_text("server = '2'\ncache = 'none'\ntimeout = 5\nqtfs_conn_max_conn = 9\nlog_level = 'INFO'\n")
    found = parse("-o", "cache=always,qtfs_log_level=error,threads=3")
    assert (found.cache, found.timeout_s, found.channels, found.log_level) == ("always", 5.0, 3, "ERROR")
    assert parse().channels == 9
    assert parse().driver == "auto"


def test_our_names_precede_the_originals(parse: Any) -> None:
    found = parse("-o", "server=2,threads=3,qtfs_conn_max_conn=4,qtfs_log_level=none,log_level=info")
    assert (found.channels, found.log_level) == (3, "INFO")


def test_another_configuration_file(parse: Any, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config.write_text("server = '2'")
    (tmp_path / "other.toml").write_text("server = '3'")
    assert parse("-o", f"config={tmp_path}/other.toml").server == VsockAddress(3, 12345)
    monkeypatch.chdir(tmp_path)
    assert parse("-o", "config=other.toml").server == VsockAddress(3, 12345)
    with pytest.raises(ConfigError, match=re.escape(f"{tmp_path}/no.toml: ")):
        parse("-o", f"config={tmp_path}/no.toml,server=2")


def test_a_broken_configuration_is_reported_even_if_not_needed(parse: Any, config: Path) -> None:
    config.write_text("\nserve = '2'")
    with pytest.raises(ConfigError, match=re.escape(f"{config}:2: unknown key 'serve'")):
        parse("-o", "server=2")


# ----------------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("", "no server given"),
        ("port=5", "no server given"),
        ("serve=2", "unknown option 'serve=2'"),
        ("server=2,procs", "unknown option 'procs'"),
        ("server=2,proc=1", "option 'proc' takes no value"),
        ("server=2,local_proc=x", "option 'local_proc': 'x' is not an absolute path"),
        ("server=2,special=x", "option 'special': 'x' is not one of remote, local"),
        ("server=2,proc_self", "unknown option 'proc_self'"),
        ("server=2,nosymfollow", "unknown option 'nosymfollow'"),
        ("server=2,remount,ro", "option 'remount'"),
        ("server=2,ro=1", "option 'ro' takes no value, but got '1'"),
        ("server=2,foreground=", "option 'foreground' takes no value"),
        ("server", "option 'server' needs a value"),
        ("server=", "option 'server' needs a value"),
        ("server=2,config", "option 'config' needs a value"),
        ("server=2,context=", "unknown option 'context='"),
        ("server=host", "option 'server': address 'host'"),
        ("server=2,port=0", "option 'port': 0 is not between 1 and 65535"),
        ("server=2,port=x", "option 'port': 'x' is not an integer"),
        ("server=2,timeout=-1", "option 'timeout': '-1' is not a number"),
        ("server=2,driver=x", "option 'driver': 'x' is not one of"),
        ("server=2,cache=x", "option 'cache': 'x' is not one of"),
        ("server=2,max_read=2097152", "option 'max_read': 2097152"),
        ("server=2,threads=0", "option 'threads': 0"),
        ("server=2,qtfs_conn_max_conn=65", "option 'qtfs_conn_max_conn': 65"),
        ("server=2,key_file=k", "option 'key_file': 'k' is not an absolute path"),
        ("server=2,qtfs_server_ip=h", "option 'qtfs_server_ip': 'h' is not an IP address"),
        ("server=2,log_level=x", "option 'log_level': 'X' is not one of"),
        ('server=2,context="a', "a double quote is never closed"),
    ],
)
def test_mistakes_in_options_are_named(parse: Any, options: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse("-o", options)
    assert reason in str(caught.value)
    assert caught.value.exit_code == MountExit.USAGE


def test_sloppy_ignores_unknown_options_but_no_wrong_values(parse: Any) -> None:
    found = parse("-s", "-o", "server=2,procs,serve=2,ro")
    assert (found.ignored, found.read_only) == (("procs", "serve=2"), True)
    with pytest.raises(OptionError, match="option 'port'"):
        parse("-s", "-o", "server=2,port=x")


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("home", "'home' is not an absolute path on the server"),
        ("host:/home", "'host:/home' is not an absolute path on the server (name the server itself by -o server=)"),
        ("", "'' is not an absolute path"),
        ("/a/../b", "'/a/../b' contains '..'"),
        ("/..", "contains '..'"),
    ],
)
def test_mistakes_in_the_source_are_named(parse: Any, source: str, reason: str) -> None:
    with pytest.raises(OptionError) as caught:
        parse("-o", "server=2", source=source)
    assert reason in str(caught.value)


@pytest.mark.parametrize(
    ("source", "meant"), [("/", "/"), ("//", "/"), ("//a//b/", "/a/b"), ("/./a/.", "/a"), ("/a b,c", "/a b,c")]
)
def test_the_source_is_normalised(parse: Any, source: str, meant: str) -> None:
    assert parse("-o", "server=2", source=source).source == meant


def test_the_mount_point_is_resolved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    monkeypatch.chdir(tmp_path)
    found = parse_command_line(["/src", "link/.", "-o", "server=2"], default_config="/nonexistent")
    assert found.mountpoint == str((tmp_path / "real").resolve())


@pytest.mark.parametrize("name", ["no", "file/below"])
def test_a_missing_mount_point_is_a_failed_mount(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OptionError, match=re.escape(f"mount point {tmp_path / name}: ")) as caught:
        parse_command_line(["/src", str(tmp_path / name), "-o", "server=2"], default_config="/nonexistent")
    assert caught.value.exit_code == MountExit.FAILURE


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "SOURCE"),
        (["/src"], "DIR"),
        (["/src", "/", "/third"], "/third"),
        (["/src", "/", "-q"], "-q"),
        (["/src", "/", "-o"], "-o"),
        (["/src", "/", "-t", "ext4"], "'ext4' is not qtfs"),
    ],
)
def test_mistakes_in_the_command_are_named(arguments: list[str], reason: str) -> None:
    with pytest.raises(OptionError, match=re.escape(reason)) as caught:
        parse_command_line(arguments, default_config="/nonexistent")
    assert caught.value.exit_code == MountExit.USAGE


def test_errors_keep_to_the_exit_codes_of_mount8(parse: Any, config: Path) -> None:
    config.write_text("port = 'x'")
    for arguments in (["-o", "server=x"], []):
        with pytest.raises(QtfsError) as caught:
            parse(*arguments)
        assert caught.value.exit_code == 1
    assert AddressError.exit_code == 1


def test_help_and_version_are_no_errors(capsys: pytest.CaptureFixture[str]) -> None:
    for option, shown in (("--help", "mount -t qtfs /home"), ("--version", "mount.qtfs 0.")):
        with pytest.raises(SystemExit) as caught:
            parse_command_line([option])
        assert caught.value.code == 0
        assert shown in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- splitting of -o


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", []),
        (",,a,,b=c,", ["a", "b=c"]),
        (r"key_file=/a\,b,ro", ["key_file=/a,b", "ro"]),
        (r"key_file=/a\\,ro", ["key_file=/a\\", "ro"]),
        (r"key_file=/a\b\"c", ['key_file=/a\\b"c']),
        ("a\\", ["a\\"]),
        ('context="a,b",ro', ['context="a,b"', "ro"]),
        (r'context="a\,b",ro', [r'context="a\,b"', "ro"]),
    ],
)
def test_options_are_split_at_bare_commas(text: str, options: list[str]) -> None:
    assert split_options(text) == options


@given(st.lists(st.text(min_size=1)))
def test_escaped_options_survive(options: list[str]) -> None:
    text = ",".join(re.sub(r'([,\\"])', r"\\\1", option) for option in options)
    assert split_options(text) == options
