#!/bin/sh
# Runs in the guest, as root, in the checkout: the conformance set over vsock within one machine (CID 1, loopback), uncached,
# so that each call goes over it; then a bell by vsock, and what the engine tells machines that say nothing, so that one
# which was started again answers.
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

mkdir -p /etc/qtfs /tmp/share /tmp/local /mnt/vsock /mnt/ring
modprobe vsock_loopback
ln -s "$PWD/qtfs_client/mount.qtfs" /sbin/mount.qtfs
for group in Mount Open Read Write Readdir Mkdir Rmdir Create Unlink Rename Setattr Setxattr; do
    printf '[%s]\nPath=/tmp/share\n' "$group"
done >/etc/qtfs/whitelist
start_engine /tmp/engine.log --listen vsock://1:12345 --listen 'shm:///dev/shm/bar?bell=vsock://1:12346'
mount -t qtfs /tmp/share /mnt/vsock -o server=vsock://1:12345,cache=none
.venv/bin/python -I test/level6_vm/conformance.py --here /tmp/share /tmp/local /mnt/vsock

mount -t qtfs /tmp/share /mnt/ring -o 'server=shm:///dev/shm/bar?bell=vsock://1:12346,cache=none'
for number in $(seq 20); do
    echo "$number" >/mnt/vsock/number
    [ "$(cat /mnt/ring/number)" = "$number" ]
done
mount -t tracefs none /sys/kernel/tracing
echo 1 >/sys/kernel/tracing/events/vsock/virtio_transport_recv_pkt/enable
told() { grep -qE "1:$1 -> .* op=CREDIT_UPDATE .*buf_alloc=41943(0[5-9]|1.) " /sys/kernel/tracing/trace; }
expect told 12345
expect told 12346
[ "$(cat /mnt/ring/number)" = 20 ]
umount /mnt/vsock /mnt/ring
kill "$engine"
wait "$engine"
echo "== silent machines are told something"
