"""Build of the Cython modules; everything declarative is in pyproject.toml.

Every ``**/*.pyx`` of the packages that exist becomes one extension, so a new module needs no entry here.

Environment: ``QTFS_DEBUG=1`` builds with assertions, bounds checks and ``-Og``; ``QTFS_SANITIZE=1`` with these and the
address and undefined-behaviour sanitizers (``make sanitize`` knows how to run that); ``QTFS_FUZZ=1``, with clang, for
``make fuzz``. The generated C and the objects of the modes live apart under ``build/``, so going back and forth
recompiles nothing.
"""

import filecmp
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

from setuptools import Command, Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
PACKAGES = ("qtfs_common", "qtfs_server", "qtfs_client", "ipc", "rexec", "qtinfo")

# Modules that need a system library. Without it the module is left out with a warning: a server needs no libfuse.
PKG_CONFIG = {"qtfs_client.drivers.mounting": "fuse3"}

MODES = [m for m in ("fuzz", "sanitize", "debug") if os.environ.get(f"QTFS_{m.upper()}", "") not in ("", "0")]
MODE = MODES[0] if MODES else "release"
DEBUG = MODE != "release"
JOBS = len(os.sched_getaffinity(0))

DIRECTIVES = {
    "language_level": 3,
    "boundscheck": DEBUG,
    "wraparound": False,
    "cdivision": True,
    "initializedcheck": DEBUG,
    "nonecheck": DEBUG,
}

#: Of the address sanitizer's own reports none is survived; the other's would be, and then nobody would look.
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
OPTIMIZATION = {
    "release": ["-O2", "-g"],
    "debug": ["-Og", "-g3", "-UNDEBUG"],
    "sanitize": ["-O1", "-g", "-UNDEBUG", *SANITIZERS],
    # For the libFuzzer and the address sanitizer that atheris brings along, to be loaded first.
    "fuzz": ["-O1", "-g", "-UNDEBUG", "-fsanitize=fuzzer-no-link,address", "-fno-omit-frame-pointer"],
}[MODE]
LINKING = SANITIZERS if MODE == "sanitize" else []

# The -Wno- are for code that Cython generates whether or not a module uses it.
C_FLAGS = [
    *OPTIMIZATION,
    "-Wall",
    "-Wextra",
    "-Wno-unused-function",
    "-Wno-unused-variable",
    "-Wno-unused-parameter",
    "-Wno-missing-field-initializers",
    "-Wno-cast-function-type",
]
C_MACROS: list[tuple[str, str | None]] = [] if DEBUG else [("CYTHON_WITHOUT_ASSERTIONS", "1")]


def pkg_config(package: str) -> dict[str, list[str]] | None:
    """Compiler and linker flags of a system library; None if it is not installed."""
    tool = os.environ.get("PKG_CONFIG", "pkg-config")
    try:
        cflags, libs = (
            shlex.split(subprocess.run([tool, what, package], check=True, capture_output=True, text=True).stdout)
            for what in ("--cflags", "--libs")
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return {"extra_compile_args": cflags, "extra_link_args": libs}


def extensions() -> list[Extension]:
    # Paths stay relative to this file: setuptools refuses absolute sources, and an sdist must not name this machine.
    headers = sorted(str(h.relative_to(ROOT)) for p in PACKAGES for h in (ROOT / p).rglob("*.h"))
    found = []
    for pyx in sorted(x for p in PACKAGES for x in (ROOT / p).rglob("*.pyx")):
        source = pyx.relative_to(ROOT)
        name = ".".join(source.with_suffix("").parts)
        library = {}
        if name in PKG_CONFIG:
            flags = pkg_config(PKG_CONFIG[name])
            if flags is None:
                print(f"warning: {name} left out: {PKG_CONFIG[name]} (pkg-config) not found", file=sys.stderr)
                continue
            library = flags
        found.append(
            Extension(
                name,
                [str(source)],
                # The generated C lies under build/, so the pyx's own folder has to be named for its headers.
                include_dirs=[".", str(source.parent)],
                define_macros=C_MACROS,
                depends=headers,
                extra_compile_args=C_FLAGS + library.get("extra_compile_args", []),
                extra_link_args=LINKING + library.get("extra_link_args", []),
            )
        )
    return found


class BuildExt(build_ext):
    """build_ext that cythonizes only when it really builds (an sdist needs no C) and installs in place atomically."""

    def initialize_options(self):
        super().initialize_options()
        self.parallel = JOBS

    def finalize_options(self):
        super().finalize_options()
        if self.inplace:
            self.build_lib = str(ROOT / "build" / MODE / "lib")
            self.build_temp = str(ROOT / "build" / MODE / "temp")

    def run(self):
        from Cython.Build import cythonize

        if self.extensions:
            made = cythonize(
                self.extensions,
                build_dir=os.path.join("build", MODE, "c"),
                compiler_directives=DIRECTIVES,
                nthreads=JOBS if len(self.extensions) > 1 else 0,
                force=bool(self.force),
            )
            by_name = {ext.name: ext for ext in made}
            for ext in self.extensions:  # updated, not replaced: setuptools keeps notes of its own on these objects
                vars(ext).update(vars(by_name[ext.name]))
        super().run()

    def copy_extensions_to_source(self):
        wanted = set()
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            target = ROOT / self.get_ext_filename(ext.name)
            wanted.add(target)
            if target.exists() and filecmp.cmp(built, target, shallow=False):
                continue
            # By rename: a daemon or test that runs from this checkout sees the old module or the new one, never half.
            partial = target.with_name(f".{target.name}.{os.getpid()}")
            shutil.copy2(built, partial)
            os.replace(partial, target)
        suffix = sysconfig.get_config_var("EXT_SUFFIX")
        for stale in {x for p in PACKAGES for x in (ROOT / p).rglob(f"*{suffix}")} - wanted:
            stale.unlink()  # of a module that was renamed or removed: it would still be imported


class LintCython(Command):
    """``setup.py lint_cython``: Cython's extra warnings over every module, as errors."""

    user_options: ClassVar[list[tuple[str, str, str]]] = []

    def initialize_options(self):
        pass

    def finalize_options(self):
        pass

    def run(self):
        out = ROOT / "build" / "lint"
        out.mkdir(parents=True, exist_ok=True)
        options = [o for key, value in DIRECTIVES.items() if key != "language_level" for o in ("-X", f"{key}={value}")]
        failed = 0
        for ext in self.distribution.ext_modules or []:
            command = [sys.executable, "-m", "cython", "-3", "-Wextra", "-Werror", *options]
            command += ["-o", str(out / f"{ext.name}.c"), *ext.sources]
            failed += subprocess.run(command, cwd=ROOT).returncode != 0
        if failed:
            raise SystemExit(f"lint_cython: {failed} module(s) with warnings")


os.chdir(ROOT)
setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt, "lint_cython": LintCython})
