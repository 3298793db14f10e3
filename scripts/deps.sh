#!/bin/sh
# Installs what is missing, and says nothing and asks no network if nothing is.
#
#   deps.sh [build] [test] [bench] [fuzz]   system packages of these groups (needs root if something is missing)
#   deps.sh atheris                  what fuzzing is guided by, into .venv; without it fuzzing is blind, and says so
#   deps.sh venv                     .venv with the Python packages of pyproject.toml
#   deps.sh kernel                   a kernel for the tests that boot a guest (scripts/guest-kernel.sh)
#   deps.sh python                   prints the interpreter that .venv is or would be made from
#
# Environment: PYTHON chooses the interpreter.
set -eu
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)

say() { printf 'deps: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

# ---------------------------------------------------------------------------------------------- system packages

packages() { # GROUP FAMILY
    case $2:$1 in
    deb:build) echo gcc libc6-dev pkg-config fuse3 libfuse3-dev libfuse-dev acl attr util-linux iproute2 kmod \
        strace procps ;;
    deb:test) echo git rsync sqlite3 fio stress-ng tar make perl gettext-base autoconf automake libtool e2fsprogs \
        qemu-system-x86 busybox-static cpio ;;
    deb:bench) echo sshfs openssh-sftp-server fio git tar ;;
    deb:fuzz) echo clang ;;
    deb:python) echo python3-venv python3-dev ;;
    rpm:build) echo gcc glibc-devel pkgconf fuse3 fuse3-devel fuse-devel acl attr util-linux iproute kmod strace \
        procps-ng ;;
    rpm:test) echo git rsync sqlite fio stress-ng tar make perl gettext autoconf automake libtool e2fsprogs \
        qemu-system-x86 busybox cpio ;;
    rpm:bench) echo fuse-sshfs openssh-server fio git tar ;;
    rpm:fuzz) echo clang ;;
    rpm:python) if rpm_python3_is_old; then echo python3.11 python3.11-pip python3.11-devel; else
        echo python3 python3-pip python3-devel; fi ;;
    *) die "no packages known for '$1'" ;;
    esac
}

rpm_python3_is_old() { ! /usr/bin/python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; }

family() {
    if command -v apt-get >/dev/null; then echo deb
    elif command -v dnf >/dev/null || command -v yum >/dev/null; then echo rpm
    else die "neither apt-get nor dnf nor yum here: install libfuse 3's headers, a C compiler and the tools by hand"
    fi
}

missing() { # FAMILY PACKAGE...
    kind=$1
    shift
    if [ "$kind" = deb ]; then
        have=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "$@" 2>/dev/null | sed -n 's/^installed //p' || :)
    else
        have=$(for p; do rpm -q --quiet --whatprovides "$p" && echo "$p" || :; done)
    fi
    for p; do
        printf '%s\n' "$have" | grep -Fqx -- "$p" || printf '%s ' "$p"
    done
}

install_packages() { # FAMILY PACKAGE...
    kind=$1
    shift
    [ "$(id -u)" = 0 ] || die "missing packages: $*; install them, or run as root: $root/scripts/deps.sh $groups"
    say "installing $*"
    if [ "$kind" = deb ]; then
        export DEBIAN_FRONTEND=noninteractive
        # Stale or unreachable lists need not be fatal: the packages may be there all the same.
        apt-get update -qq || say "apt-get update failed, going on with the lists that are here"
        apt-get install -qq -y --no-install-recommends -o DPkg::Lock::Timeout=300 -o Dpkg::Use-Pty=0 "$@" >&2 </dev/null
    else
        tool=dnf
        command -v dnf >/dev/null || tool=yum
        # One by one: which of them exist differs between openEuler, RHEL and RHEL with EPEL.
        for p; do "$tool" install -y "$p" >&2 </dev/null || say "$tool has no $p: what needs it is skipped"; done
    fi
}

system() { # GROUP...
    kind=$(family)
    wanted=
    for group; do wanted="$wanted $(packages "$group" "$kind")"; done
    [ -d "$root/.venv" ] || find_python reachable >/dev/null || [ "$(id -u)" != 0 ] && find_python >/dev/null ||
        wanted="$wanted $(packages python "$kind")"
    # shellcheck disable=SC2086 # package names, one word each
    lacking=$(missing "$kind" $wanted)
    # shellcheck disable=SC2086
    [ -z "$lacking" ] || install_packages "$kind" $lacking
}

# ------------------------------------------------------------------------------------------------------- Python

# What an interpreter must have to make .venv and to compile extension modules: its own headers, not another Python's.
usable='
import os, sys, sysconfig, venv, ensurepip
sys.version_info >= (3, 11) or sys.exit(1)
os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")) or sys.exit(1)
path = os.path.realpath(sys.executable)
while sys.argv[1:] == ["reachable"] and path != "/":
    os.stat(path).st_mode & 1 or sys.exit(1)
    path = os.path.dirname(path)
print(os.path.realpath(sys.executable))'

# find_python [reachable]: "reachable" asks for one that every user may run: a Python in root's home is no good for mounts
# that other users make.
find_python() {
    for candidate in ${PYTHON:+"$PYTHON"} python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3 \
        /usr/bin/python3.11; do
        # An activated venv (this one, even) is no base for another: it may be removed under it.
        command -v "$candidate" >/dev/null 2>&1 || continue
        base=$("$candidate" -I -c 'import sys; print(getattr(sys, "_base_executable", sys.executable))' 2>/dev/null) || continue
        "$base" -I -c "$usable" "$@" 2>/dev/null && return
        [ -z "${PYTHON:-}" ] || [ $# -gt 0 ] || die "PYTHON=$PYTHON is older than 3.11 or lacks venv, ensurepip or Python.h"
    done
    return 1
}

python() {
    find_python reachable || find_python && return
    say "no Python 3.11 with venv, ensurepip and Python.h"
    # shellcheck disable=SC2046
    install_packages "$(family)" $(packages python "$(family)")
    find_python || die "still none after installing the system's Python packages"
}

requirements() { # VENV_PYTHON SECTION: from pyproject.toml, the one place where they are written
    "$1" -I - "$root/pyproject.toml" "$2" <<'PY'
import sys, tomllib
with open(sys.argv[1], "rb") as f:
    t = tomllib.load(f)
p = t["project"]
extras = p["optional-dependencies"]
print("\n".join(extras[sys.argv[2]] if sys.argv[2] in extras else t["build-system"]["requires"] + p["dependencies"] + extras["dev"]))
PY
}

# What .venv was made from. By content, not by time: a checkout of another branch and back installs nothing. Whether llfuse
# can be built counts, so that it comes once its headers are there.
venv_key() {
    {
        echo "$root $fuse2 ${PYTHON:-}"
        requirements "$venv/bin/python" all
        requirements "$venv/bin/python" llfuse
        cat "$root/scripts/deps.sh"
    } | sha256sum | cut -d' ' -f1
}

venv() {
    venv=$root/.venv
    stamp=$venv/.qtfs-stamp
    fuse2=no
    ! pkg-config --exists fuse 2>/dev/null || fuse2=yes
    [ ! -s "$stamp" ] || [ "$(cat "$stamp")" != "$(venv_key)" ] || return 0
    base=$(python)
    if ! "$venv/bin/python" -I -m pip --version >/dev/null 2>&1 || [ -n "${PYTHON:-}" ]; then
        say "making .venv with $base"
        rm -rf "$venv"
        "$base" -I -m venv "$venv"
    fi
    say "installing Python packages into .venv"
    requirements "$venv/bin/python" all >"$venv/requirements.txt"
    "$venv/bin/python" -I -m pip install -qq --disable-pip-version-check -r "$venv/requirements.txt"
    if [ $fuse2 = yes ]; then
        requirements "$venv/bin/python" llfuse >"$venv/requirements-llfuse.txt"
        "$venv/bin/python" -I -m pip install -qq --disable-pip-version-check -r "$venv/requirements-llfuse.txt" ||
            say "llfuse did not build: mounts with driver=llfuse will be refused"
    else
        say "libfuse 2's headers are not here (run: make deps): mounts with driver=llfuse will be refused"
    fi
    # The checkout on the venv's own path, so that nobody needs PYTHONPATH, from whatever directory.
    site=$("$venv/bin/python" -I -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    printf '%s\n' "$root" >"$site/qtfs-checkout.pth"
    venv_key >"$stamp"
}

atheris() {
    ! "$root/.venv/bin/python" -c 'import atheris' 2>/dev/null || return 0
    requirements "$root/.venv/bin/python" fuzz >"$root/.venv/requirements-fuzz.txt"
    "$root/.venv/bin/python" -I -m pip install -qq --disable-pip-version-check -r "$root/.venv/requirements-fuzz.txt" ||
        say "atheris cannot be had: fuzzing will not be guided by coverage"
}

# --------------------------------------------------------------------------------------------------------- main

# Two makes in one checkout must not fill one .venv at once.
if [ "${QTFS_DEPS_LOCKED:-}" != "$root" ] && command -v flock >/dev/null; then
    mkdir -p "$root/.cache"
    QTFS_DEPS_LOCKED=$root exec flock "$root/.cache/deps.lock" "$0" "$@"
fi

groups=
for arg; do
    case $arg in
    build | test | bench | fuzz) groups="$groups $arg" ;;
    venv | atheris | kernel | python) ;;
    *) die "unknown: $arg (build, test, bench, fuzz, venv, atheris, kernel, python)" ;;
    esac
done
# shellcheck disable=SC2086
[ -z "$groups" ] || system $groups
for arg; do
    case $arg in
    venv) venv ;;
    atheris) atheris ;;
    python) python ;;
    kernel) "$root/scripts/guest-kernel.sh" >/dev/null || say "no guest kernel: tests that boot one are skipped" ;;
    esac
done
