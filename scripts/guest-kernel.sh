#!/bin/sh
# Prints two lines: the path of a stock kernel, and of its modules' directory, for a QEMU guest of the tests.
#
# A kernel that the system has installed is taken if it has the modules a guest needs. Otherwise Debian's is fetched and
# unpacked into .cache/guest-kernel, and never installed: its maintainer scripts would build an initrd and touch the boot
# loader of a machine that only wants to run tests.
#
#   guest-kernel.sh            fetch if need be
#   guest-kernel.sh --offline  only what is here already; fails if nothing is
set -eu
PATH=$PATH:/usr/sbin:/sbin # depmod, for users other than root
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
cache=$root/.cache/guest-kernel

# / of the host over 9p, an overlay above it, vsock on loopback and on virtio, FUSE. Kernels may have some built in.
needed='9p 9pnet_virtio overlay vsock_loopback fuse virtio_pci'

complete() { # MODULES_DIR
    for module in $needed; do
        grep -Eq "(^|/)$module\.ko" "$1/modules.dep" "$1/modules.builtin" 2>/dev/null || return 1
    done
}

answer() { # VMLINUZ MODULES_DIR
    if [ -r "$1" ] && complete "$2"; then
        printf '%s\n%s\n' "$1" "$2"
        exit 0
    fi
}

look() {
    for dir in "$cache"/lib/modules/*; do
        answer "$cache/boot/vmlinuz-${dir##*/}" "$dir"
    done
    for dir in /lib/modules/*; do
        answer "/boot/vmlinuz-${dir##*/}" "$dir"
        answer "$dir/vmlinuz" "$dir" # Fedora, RHEL, openEuler
    done
}

fetch_deb() {
    arch=$(dpkg --print-architecture)
    package=$(apt-cache depends "linux-image-$arch" 2>/dev/null | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n1)
    if [ -z "$package" ]; then
        apt-get update -qq >&2
        package=$(apt-cache depends "linux-image-$arch" | sed -n 's/^ *Depends: \(linux-image-[^ ]*\)$/\1/p' | head -n1)
    fi
    [ -n "$package" ] || return 1
    # An old list names a version that the archive may have dropped already.
    (cd "$1" && { apt-get download -qq "$package" || { apt-get update -qq && apt-get download -qq "$package"; }; }) >&2 2>"$1/log" ||
        { cat "$1/log" >&2; return 1; }
    # Only what a guest without hardware can use: a tenth of the package.
    modules='./lib/modules/*'
    dpkg-deb --fsys-tarfile "$1"/*.deb | tar -x -C "$1" --wildcards './boot/vmlinuz-*' "$modules/modules.*" \
        "$modules/kernel/fs/9p/*" "$modules/kernel/fs/fuse/*" "$modules/kernel/fs/overlayfs/*" \
        "$modules/kernel/fs/ext4/*" "$modules/kernel/fs/jbd2/*" "$modules/kernel/fs/mbcache.ko*" \
        "$modules/kernel/fs/netfs/*" "$modules/kernel/fs/fscache/*" "$modules/kernel/net/9p/*" \
        "$modules/kernel/net/vmw_vsock/*" "$modules/kernel/drivers/vhost/*" "$modules/kernel/drivers/virtio/*" \
        "$modules/kernel/drivers/net/virtio_net.ko*" "$modules/kernel/drivers/net/net_failover.ko*" \
        "$modules/kernel/net/core/failover.ko*" "$modules/kernel/drivers/block/*" "$modules/kernel/drivers/uio/*" \
        "$modules/kernel/drivers/char/hw_random/*" "$modules/kernel/lib/*" "$modules/kernel/crypto/*" \
        "$modules/kernel/arch/*/crypto/*" 2>"$1/log" || : # not every architecture has them all; look() judges
    rm -f "$1"/*.deb "$1/log"
    depmod -b "$1" "$(basename "$1"/lib/modules/*)" 2>/dev/null
}

look
[ "${1:-}" != --offline ] || exit 1
command -v apt-get >/dev/null && command -v depmod >/dev/null || {
    echo "guest-kernel: no kernel in /lib/modules with: $needed" >&2
    exit 1
}
mkdir -p "$root/.cache"
partial=$(mktemp -d "$root/.cache/guest-kernel.XXXXXX")
chmod 755 "$partial"
trap 'rm -rf "$partial"' EXIT
fetch_deb "$partial"
# Renamed when complete: a run that was cut off leaves nothing that looks usable.
rm -rf "$cache"
mv "$partial" "$cache"
look
echo "guest-kernel: the kernel that was fetched lacks some of: $needed" >&2
exit 1
