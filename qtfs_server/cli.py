"""`engine`: the command line of the server."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from qtfs_common import __version__, logs
from qtfs_common.addresses import DEFAULT_PORT, Address, parse_address
from qtfs_common.config import ENGINE_SCHEMA, MAX_WORKERS, load_config, value_from_text
from qtfs_common.errors import QtfsError
from qtfs_common.rings.geometry import Layout, parse_layout
from qtfs_common.special import DEFAULT_RULES
from qtfs_common.whitelist import DEFAULT_PATH
from qtfs_server.engine import EngineOptions, run

_USAGE = """%(prog)s [OPTIONS] WORKERS PROXY_THREADS MY_ADDR MY_PROXY_PORT PEER_ADDR PEER_PROXY_PORT
       %(prog)s [OPTIONS] --listen ADDRESS [--listen ADDRESS ...]"""

_EPILOG = """addresses:
  vsock://CID:PORT   tcp://HOST:PORT   unix:///path   shm:///path   pcie://BDF/resourceN
  ?bell=ADDRESS behind the last two: where clients of other machines ring
  MY_ADDR and PEER_ADDR: a vsock CID, or an IPv4 address (then TCP)

signals: SIGHUP reads the whitelist and the special rules again; SIGTERM finishes what is being executed and exits 0."""

_POSITIONAL = ("WORKERS", "PROXY_THREADS", "MY_ADDR", "MY_PROXY_PORT", "PEER_ADDR", "PEER_PROXY_PORT")
_PORTS = range(1024, 65536)
_PATHS = ("whitelist", "special", "key_file", "pid_file", "run_dir")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="engine",
        usage=_USAGE,
        description="Share directories of this machine with qtfs clients.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("original", nargs="*", metavar="ARGUMENT", help=argparse.SUPPRESS)
    parser.add_argument("--workers", metavar="N", help="worker threads (default 16)")
    parser.add_argument("--listen", action="append", metavar="ADDRESS", help="serve clients here; may be repeated")
    parser.add_argument("--port", metavar="N", help=f"data port where an address names none ({DEFAULT_PORT})")
    parser.add_argument("--bar-layout", metavar="LAYOUT", help="channels=N,request=SIZE,reply=SIZE of shm and pcie")
    parser.add_argument("--whitelist", metavar="FILE", help=f"what clients may do (default {DEFAULT_PATH})")
    parser.add_argument("--special", metavar="FILE", help=f"paths to hide or protect (default {DEFAULT_RULES})")
    parser.add_argument("--key-file", metavar="FILE", help="key that clients must know; needed for TCP beyond loopback")
    parser.add_argument("--log-level", metavar="LEVEL", help="NONE, ERROR, WARN, INFO or DEBUG (default WARN)")
    parser.add_argument("--config", metavar="FILE", help="TOML file with the same settings; options override it")
    parser.add_argument("--pid-file", metavar="FILE", help="write the process id here")
    parser.add_argument("--run-dir", metavar="DIR", help="locks and control sockets (default /run/qtfs)")
    parser.add_argument("--grace", metavar="SECONDS", help="how long a session outlives its client (90)")
    parser.add_argument("--max-nodes", metavar="N", help="files that a session may know at a time (16777216)")
    parser.add_argument("--max-handles", metavar="N", help="files that a session may have open (1048576)")
    parser.add_argument("--upgrade", action="store_true", help="take over from the engine that runs, and all it has")
    parser.add_argument("--version", action="version", version=f"qtfs {__version__}")
    return parser


def _number(name: str, text: str, allowed: range) -> int:
    if not text.isascii() or not text.isdigit() or int(text) not in allowed:
        raise QtfsError(f"{name}: {text!r} is not a number from {allowed.start} to {allowed.stop - 1}", 2)
    return int(text)


def _from_positional(words: list[str]) -> dict[str, Any]:
    """The original's six arguments as settings. Those of the socket proxy are only checked."""
    if len(words) != len(_POSITIONAL):
        raise QtfsError(f"expected {' '.join(_POSITIONAL)}, got {len(words)} of these {len(_POSITIONAL)}", 2)
    named = dict(zip(_POSITIONAL, words, strict=True))
    _number("PROXY_THREADS", named["PROXY_THREADS"], range(1, 2))
    for name in ("MY_PROXY_PORT", "PEER_PROXY_PORT"):
        _number(name, named[name], _PORTS)
    parse_address(named["PEER_ADDR"])
    return {
        "workers": _number("WORKERS", named["WORKERS"], range(1, MAX_WORKERS + 1)),
        "listen": (named["MY_ADDR"],),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """Configuration file, then positional arguments, then options: the later wins."""
    settings = load_config(args.config, ENGINE_SCHEMA) if args.config else {}
    if args.original:
        settings |= _from_positional(args.original)
    given = {key: _checked(key, getattr(args, key)) for key in ENGINE_SCHEMA if getattr(args, key, None) is not None}
    if args.original and args.listen:
        given["listen"] = (*settings["listen"], *args.listen)
    return settings | given


def _checked(key: str, value: str | list[str]) -> Any:
    """An option's value, under the rules of the configuration file; but paths may start here."""
    if key in _PATHS:
        value = os.path.abspath(str(value))
    try:
        return ENGINE_SCHEMA[key][1](value) if isinstance(value, list) else value_from_text(key, value, ENGINE_SCHEMA)
    except ValueError as error:
        raise QtfsError(f"--{key.replace('_', '-')}: {error}", 2) from error


def _options(settings: dict[str, Any], upgrade: bool) -> EngineOptions:
    port = settings.get("port", DEFAULT_PORT)
    addresses: tuple[Address, ...] = tuple(parse_address(text, port) for text in settings.get("listen", ()))
    if not addresses:
        raise QtfsError("no address to listen on: give --listen, or the six arguments (see --help)", 2)

    def path(key: str) -> Path | None:
        return Path(settings[key]) if settings.get(key) else None

    return EngineOptions(
        listen=addresses,
        workers=settings.get("workers", 16),
        whitelist=path("whitelist") or Path(DEFAULT_PATH),
        special=path("special"),
        key_file=path("key_file"),
        pid_file=path("pid_file"),
        run_dir=path("run_dir"),
        grace_s=settings.get("grace", 90.0),
        max_nodes=settings.get("max_nodes", 1 << 24),
        max_handles=settings.get("max_handles", 1 << 20),
        bar_layout=parse_layout(settings["bar_layout"]) if settings.get("bar_layout") else Layout(),
        upgrade=upgrade,
    )


def _announce(addresses: list[Address]) -> None:
    print("qtfs engine: listening on", ", ".join(map(str, addresses)), flush=True)


def main(arguments: list[str] | None = None) -> int:
    """Run the engine in the foreground; 0 after SIGTERM, 1 or 2 for mistakes of the user."""
    args = _parser().parse_args(arguments)
    try:
        settings = _settings(args)
        logs.setup(settings.get("log_level", "WARN"), program="engine")
        return run(_options(settings, args.upgrade), _announce)
    except QtfsError as error:
        print(f"engine: {error}", file=sys.stderr)
        return error.exit_code


if __name__ == "__main__":
    sys.exit(main())
