#!/bin/sh
# Runs in the guest, as root, in the checkout: mounts of the machine that the guest runs on, through a PCI BAR.
# $share is set before. What the test does meanwhile is in test_guests.py.
set -eu
. /run/guest/functions

die() { echo "FAILED: $*"; exit 1; }
say() { printf '== %s (after %s s)\n' "$*" "$(cut -d. -f1 /proc/uptime)"; }

ln -s "$PWD/qtfs_client/mount.qtfs" /sbin/mount.qtfs
mkdir -p /mnt/auto /mnt/none
for cache in auto none; do
    mount -t qtfs "$share" "/mnt/$cache" -o "server=pcie://$(find_ivshmem)/resource2,cache=$cache"
done
say "mounted"
