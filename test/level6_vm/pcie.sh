#!/bin/sh
# Runs in the guest, as root, in the checkout: mounts of the machine that the guest runs on, through a PCI BAR. One is woken by
# the bell, a port of that machine, the other looks. $share and $port are set before. What the test does meanwhile is in
# test_guests.py.
set -eu
. /run/guest/functions

die() { echo "FAILED: $*"; exit 1; }
say() { printf '== %s (after %s s)\n' "$*" "$(cut -d. -f1 /proc/uptime)"; }

ln -s "$PWD/qtfs_client/mount.qtfs" /sbin/mount.qtfs
modprobe virtio_net
ip address add 10.0.2.15/24 dev eth0
ip link set eth0 up
mkdir -p /mnt/auto /mnt/none
bar=pcie://$(find_ivshmem)/resource2
mount -t qtfs "$share" /mnt/auto -o "server=$bar?bell=tcp://10.0.2.2:$port"
mount -t qtfs "$share" /mnt/none -o "server=$bar,cache=none"
say "mounted"
