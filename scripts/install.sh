#!/bin/sh
# install.sh install|uninstall: called by make, with DESTDIR, PREFIX, SYSCONFDIR and SBINDIR in the environment.
#
# Everything of ours, Python packages that we depend on included, is in PREFIX/lib/qtfs and nowhere else in the system.
set -eu
umask 022
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
lib=$PREFIX/lib/qtfs
units=$PREFIX/lib/systemd/system
man=$PREFIX/share/man

# Where: what it calls. A new command is a new line. mount(8) knows what is mounted as fuse.qtfs, when it is to remount it.
commands="$PREFIX/bin/qtfs-engine=qtfs_server.cli
$PREFIX/bin/qtctl=qtfs_client.qtctl
$SBINDIR/mount.qtfs=qtfs_client.cli
$SBINDIR/mount.fuse.qtfs=qtfs_client.cli"

remove() { # what an earlier version may have left must not stay importable
    rm -rf "$DESTDIR$lib"
    for entry in $commands; do rm -f "$DESTDIR${entry%=*}"; done
    for file in "$root"/config/systemd/*; do rm -f "$DESTDIR$units/${file##*/}"; done
    for file in "$root"/doc/man/*.[1-8]; do rm -f "$DESTDIR$man/man${file##*.}/${file##*/}"; done
}

if [ "$1" = uninstall ]; then
    remove
    echo "$DESTDIR$SYSCONFDIR/qtfs is yours and stays"
    exit 0
fi

python=$root/.venv/bin/python
extra=
"$python" -I -c 'import llfuse' 2>/dev/null && extra='[llfuse]'
remove
mkdir -p "$DESTDIR$lib"
"$python" -I -m pip install -qq --disable-pip-version-check --no-warn-script-location --target "$DESTDIR$lib" \
    "$(echo "$root"/dist/qtfs-*.whl)$extra"
rm -rf "$DESTDIR$lib/bin" "$DESTDIR$lib/share" # pip's copies name the build's own .venv

# The interpreter below .venv: .venv belongs to the checkout and may go.
base=$("$python" -I -c 'import os, sys; print(os.path.realpath(sys.executable))')
for entry in $commands; do
    file=${entry%=*}
    mkdir -p "$DESTDIR${file%/*}"
    cat >"$DESTDIR$file" <<LAUNCHER
#!$base -I
import sys

sys.path.insert(0, "$lib")
from ${entry#*=} import main

sys.exit(main())
LAUNCHER
    chmod 755 "$DESTDIR$file"
done

mkdir -p "$DESTDIR$SYSCONFDIR/qtfs" "$DESTDIR$units"
for file in "$root"/config/qtfs/*; do
    target=$DESTDIR$SYSCONFDIR/qtfs/${file##*/}
    if [ ! -e "$target" ]; then
        install -m 644 "$file" "$target"
    elif ! cmp -s "$file" "$target"; then
        echo "kept $target; this version's sample is $file"
    fi
done
for file in "$root"/config/systemd/*; do
    sed "s|/usr/local/|$PREFIX/|g" "$file" >"$DESTDIR$units/${file##*/}"
    chmod 644 "$DESTDIR$units/${file##*/}"
done
for file in "$root"/doc/man/*.[1-8]; do
    [ ! -e "$file" ] || install -D -m 644 "$file" "$DESTDIR$man/man${file##*.}/${file##*/}"
done
