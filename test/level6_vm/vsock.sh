#!/bin/sh
# Runs in the guest, as root, in the checkout: the conformance set over vsock within one machine (CID 1, loopback); then a
# client that falls silent, as one does whose machine was started again.
set -eu

start_engine() { # LOG ARGUMENT...: its process id is then $engine
    log=$1
    shift
    qtfs_server/engine "$@" >"$log" 2>&1 &
    engine=$!
    until grep -q 'listening on' "$log"; do
        kill -0 "$engine" || { cat "$log"; exit 1; }
        sleep 0.1
    done
}

expect() { # COMMAND...: succeeds within a minute
    for _ in $(seq 300); do
        "$@" 2>/dev/null && return
        sleep 0.2
    done
    echo "FAILED: $*"
    cat /tmp/engine.log*
    exit 1
}

mkdir -p /etc/qtfs /tmp/share /tmp/local /mnt/auto /mnt/none
modprobe vsock_loopback
ln -s "$PWD/qtfs_client/mount.qtfs" /sbin/mount.qtfs
for group in Mount Open Read Write Readdir Mkdir Rmdir Create Unlink Rename Setattr Setxattr; do
    printf '[%s]\nPath=/tmp/share\n' "$group"
done >/etc/qtfs/whitelist
start_engine /tmp/engine.log --listen vsock://1:12345
for cache in auto none; do
    mount -t qtfs /tmp/share "/mnt/$cache" -o "server=vsock://1:12345,cache=$cache"
done
.venv/bin/python -I test/level6_vm/conformance.py --here /tmp/share /tmp/local /mnt/auto /mnt/none
umount /mnt/auto /mnt/none
kill "$engine"
wait "$engine"

start_engine /tmp/engine.log2 --listen vsock://1:12345 --grace 5
for cache in auto none; do
    mount -t qtfs /tmp/share "/mnt/$cache" -o "server=vsock://1:12345,cache=$cache"
done
silent=$(pgrep -f 'qtfs.*/mnt/auto')
(flock 9 && exec sleep 600) 9>/mnt/auto/lock &
locker=$!
free() { flock -n /tmp/share/lock true; }
taken() { ! free; }
expect taken
kill -STOP "$silent"
expect free
[ "$(grep -c 'nothing was heard of its client' /tmp/engine.log2)" = 1 ]
kill -CONT "$silent"
kill "$locker"
echo back >/mnt/auto/back
expect [ "$(cat /mnt/none/back)" = back ]
expect umount /mnt/auto
umount /mnt/none
kill "$engine"
wait "$engine"
echo "== the silent client was found out"
