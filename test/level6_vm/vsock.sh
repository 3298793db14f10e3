#!/bin/sh
# Runs in the guest, as root, in the checkout: the conformance set over vsock within one machine (CID 1, loopback).
set -eu
mkdir -p /etc/qtfs /tmp/share /tmp/local /mnt/auto /mnt/none
modprobe vsock_loopback
ln -s "$PWD/qtfs_client/mount.qtfs" /sbin/mount.qtfs
for group in Mount Open Read Write Readdir Mkdir Rmdir Create Unlink Rename Setattr Setxattr; do
    printf '[%s]\nPath=/tmp/share\n' "$group"
done >/etc/qtfs/whitelist
qtfs_server/engine --listen vsock://1:12345 >/tmp/engine.log 2>&1 &
engine=$!
until grep -q 'listening on' /tmp/engine.log; do
    kill -0 "$engine" || { cat /tmp/engine.log; exit 1; }
    sleep 0.1
done
for cache in auto none; do
    mount -t qtfs /tmp/share "/mnt/$cache" -o "server=vsock://1:12345,cache=$cache"
done
.venv/bin/python -I test/level6_vm/conformance.py --here /tmp/share /tmp/local /mnt/auto /mnt/none
umount /mnt/auto /mnt/none
kill "$engine"
wait "$engine"
