#!/bin/sh
# The tour: one machine is server and client at once, over TCP on loopback. Run as root, after make; `make demo` does both.
#
# Everything happens in one temporary directory, with a run directory and a whitelist of its own, and is gone afterwards,
# also after a failure or Ctrl-C. The exit status is 0 only if every step did what it says.
set -eu
export LC_ALL=C
root=$(CDPATH='' cd -- "$(dirname -- "$(readlink -f -- "$0")")/.." && pwd)
engine=$root/qtfs_server/engine
helper=$root/qtfs_client/mount.qtfs

if [ -t 1 ]; then bold=$(printf '\033[1m') plain=$(printf '\033[m'); else bold='' plain=''; fi
step=0
say() { step=$((step + 1)); printf '%s%2d. %s%s\n' "$bold" "$step" "$*" "$plain"; }
show() { sed 's/^/      /'; }
die() { printf 'demo: %s\n' "$*" >&2; exit 1; }
now_ms() { echo $(($(date +%s%N) / 1000000)); }
took() { printf '      took %s ms\n' $(($(now_ms) - $1)); }

# --------------------------------------------------------------------------------------------------------- clean up

work=''
engine_pid=''

mounted() { grep -Fq " $work/client " /proc/self/mountinfo; }

finish() {
    status=$?
    trap '' INT TERM HUP
    set +e
    if [ "$status" -gt 128 ]; then
        echo "demo: interrupted" >&2
    elif [ "$status" != 0 ] && [ -s "$work/engine.log" ]; then
        echo "demo: failed; the engine's last lines:" >&2
        tail -n 20 "$work/engine.log" >&2
    fi
    cd /
    # Lazily: whatever still uses the mount must not keep us here.
    ! mounted || umount -l "$work/client"
    if [ -n "$engine_pid" ]; then
        kill "$engine_pid" 2>/dev/null
        wait "$engine_pid" 2>/dev/null
    fi
    [ -z "$work" ] || mounted || rm -rf --one-file-system "$work"
    exit "$status"
}

trap finish EXIT
trap 'exit 130' INT
trap 'exit 143' TERM
trap 'exit 129' HUP

# ------------------------------------------------------------------------------------------------------------- parts

check_machine() {
    [ "$(id -u)" = 0 ] || die "run it as root: it mounts a file system that every user may use"
    [ -x "$engine" ] && [ -x "$helper" ] || die "not built yet: run make in $root"
    [ -e /dev/fuse ] || modprobe fuse 2>/dev/null || die "this kernel has no FUSE (/dev/fuse is missing)"
    command -v git >/dev/null || die "git is not installed"
}

write_whitelist() { # everything, but only below the directory that is shared
    for group in Mount Open Read Write Readdir Mkdir Rmdir Create Unlink Rename Setattr Setxattr; do
        printf '[%s]\nPath=%s;\n' "$group" "$work/server"
    done >"$work/whitelist"
}

# Port 0: the kernel chooses one that is free, and the ready line says which.
start_engine() {
    "$engine" 16 1 127.0.0.1 12121 127.0.0.1 12121 --port 0 \
        --whitelist "$work/whitelist" --run-dir "$work/run" >"$work/engine.log" 2>&1 &
    engine_pid=$!
    for _ in $(seq 200); do
        address=$(sed -n 's/^qtfs engine: listening on //p' "$work/engine.log")
        [ -z "$address" ] || return 0
        kill -0 "$engine_pid" 2>/dev/null || die "the engine did not start"
        sleep 0.1
    done
    die "the engine is not ready after 20 s"
}

mount_client() {
    # mount(8) finds only helpers in /sbin; without ours there, call it as mount(8) would.
    if [ "$(readlink -f /sbin/mount.qtfs)" = "$(readlink -f "$helper")" ]; then
        set -- mount -t qtfs
    else
        set -- "$helper"
    fi
    set -- "$@" "$work/server" "$work/client" -o "server=$address"
    echo "$*" | show
    "$@"
}

# A repository that this checkout stands for: itself, or, if it was unpacked from an archive, one made of its files.
source_repository() {
    printf '[safe]\n\tdirectory = *\n[user]\n\tname = demo\n\temail = demo@localhost\n[init]\n\tdefaultBranch = main\n' \
        >"$work/gitconfig"
    export GIT_CONFIG_GLOBAL="$work/gitconfig" GIT_CONFIG_NOSYSTEM=1
    if git -C "$root" rev-parse -q --verify HEAD >/dev/null 2>&1; then
        repository=$root
        return
    fi
    repository=$work/repository
    mkdir "$repository"
    tar -C "$root" -c --exclude=./.venv --exclude=./.cache --exclude=./build . | tar -C "$repository" -x
    git -C "$repository" init -q
    git -C "$repository" add -A
    git -C "$repository" commit -qm 'this checkout'
}

attributes() { # DIR: one line for each file
    find "$1" -mindepth 1 -printf '%P type=%y mode=%m owner=%U:%G links=%n size=%s mtime=%T@ target=%l\n' | sort
}

same_on_both_sides() {
    # diff takes two FIFOs for different; the attributes below cover them.
    diff -r --no-dereference -x fifo "$work/server" "$work/client" || die "contents differ"
    attributes "$work/server" >"$work/attributes.server"
    attributes "$work/client" >"$work/attributes.client"
    diff "$work/attributes.server" "$work/attributes.client" || die "types, modes, owners, links, sizes or times differ"
    echo "identical: $(wc -l <"$work/attributes.server") files and directories," \
        "$(du -sh --apparent-size "$work/server" | cut -f1)" | show
}

# -------------------------------------------------------------------------------------------------------------- tour

check_machine
began=$(now_ms)
work=$(mktemp -d /tmp/qtfs-demo.XXXXXX)
mkdir "$work/server" "$work/client" "$work/run"
write_whitelist

say "Start the engine on the server, with the original's six arguments"
start_engine
show <"$work/engine.log"

say "Mount its directory on the client"
mount_client

say "The mount, as the system sees it"
mount | grep -F " $work/client " | show
df -h "$work/client" | show

say "Write on the client, read on the server"
echo 'hello from the client' >"$work/client/from-client"
[ "$(cat "$work/server/from-client")" = 'hello from the client' ] || die "the server has something else"
show <"$work/server/from-client"

say "Write on the server, read on the client"
echo 'hello from the server' >"$work/server/from-server"
[ "$(cat "$work/client/from-server")" = 'hello from the server' ] || die "the client has something else"
show <"$work/client/from-server"

say "Append on both sides in turn, and make links, a FIFO and a file of another user on the client"
echo 'and from the client' >>"$work/client/from-server"
echo 'and from the server' >>"$work/server/from-server"
[ "$(wc -l <"$work/client/from-server")" = 3 ] || die "lines are missing on the client"
ln "$work/client/from-server" "$work/client/hard-link"
ln -s from-server "$work/client/symbolic-link"
mkfifo -m 640 "$work/client/fifo"
install -o 65534 -g 65534 -m 4750 /bin/true "$work/client/owned-by-nobody"
ls -ln "$work/server" | show

source_repository
say "Clone this very Git repository onto the mount"
start=$(now_ms)
git clone -q --no-hardlinks "$repository" "$work/client/clone"
took "$start"
git -C "$work/client/clone" log --oneline -n 3 | show

say "Have Git check every object of it, through the mount"
start=$(now_ms)
git -C "$work/client/clone" fsck --full --strict --no-progress >"$work/fsck.log" 2>&1 ||
    die "git fsck failed: $(cat "$work/fsck.log")"
[ -z "$(git -C "$work/client/clone" status --porcelain)" ] || die "the working tree is not what was committed"
took "$start"

say "Write and read 64 MiB through the mount"
start=$(now_ms)
dd if=/dev/urandom of="$work/client/data" bs=1M count=64 status=none
took "$start"
sum=$(sha256sum <"$work/client/data")
[ "$sum" = "$(sha256sum <"$work/server/data")" ] || die "the checksums of the two sides differ"
echo "sha256 on both sides: ${sum%% *}" | show

say "Compare both sides byte for byte, and every mode, owner, link count, size and time"
start=$(now_ms)
same_on_both_sides
took "$start"

say "The engine allows what the whitelist lists, and nothing else"
refusal=$("$helper" /etc "$work/client/clone" -o "server=$address" 2>&1) && die "it let us mount /etc"
echo "$refusal" | show

say "Unmount and stop the engine"
umount "$work/client"
! mounted || die "still mounted"
kill "$engine_pid"
wait "$engine_pid" || die "the engine ended with status $?"
engine_pid=''

printf '%sDone in %s s.%s\n' "$bold" $((($(now_ms) - began + 500) / 1000)) "$plain"
