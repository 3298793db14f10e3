#!/bin/sh
# Runs in the guest, as root, in the checkout: engine and client over vsock within one machine (CID 1, loopback).
#
# /etc and /sbin are the guest's own (an overlay in its memory), so qtfs is installed there as its README says.
set -eu
checkout=$PWD
share=/tmp/share
client=/mnt/qtfs
second=/mnt/second

die() { echo "FAILED: $*"; exit 1; }
say() { printf '== %s (after %s s)\n' "$*" "$(cut -d. -f1 /proc/uptime)"; }

finish() {
    status=$?
    [ "$status" = 0 ] && return
    echo "-- the engine's log"
    cat /tmp/engine.log*
    echo "-- processes"
    ps -eo pid,stat,wchan:20,args | grep '[q]tfs'
}
trap finish EXIT

start_engine() { # LOG
    cd "$checkout/qtfs_server"
    nohup ./engine 16 1 1 12121 1 12121 >"$1" 2>&1 &
    engine=$!
    cd "$checkout"
    for _ in $(seq 300); do
        grep -q '^qtfs engine: listening on vsock://1:12345$' "$1" && return
        kill -0 "$engine" || die "the engine did not start"
        sleep 0.1
    done
    die "the engine is not ready"
}

wait_gone() { # DIR: until no daemon serves it
    for _ in $(seq 100); do
        pgrep -f "qtfs_client.cli .*$1" >/dev/null || return 0
        sleep 0.1
    done
    die "the daemon of $1 did not end"
}

make_repository() { # PATH: the end of this checkout's history, or its files if it has none
    git clone -q --bare --depth=20 "file://$checkout" "$1" 2>/dev/null && return
    mkdir "$1"
    tar -c --exclude-from=.gitignore --exclude=./.git . | tar -C "$1" -x
    git -C "$1" init -q
    git -C "$1" add -A
    git -C "$1" commit -qm 'this checkout'
}

modprobe vsock_loopback
mkdir -p /etc/qtfs "$share" "$client" "$second"
ln -s "$checkout/qtfs_client/mount.qtfs" /sbin/mount.qtfs
for group in Mount Open Read Write Readdir Mkdir Rmdir Create Unlink Rename Setattr Setxattr; do
    printf '[%s]\nPath=%s;/proc;/sys;/tmp/cgroup1\n' "$group" "$share"
done >/etc/qtfs/whitelist

say "the original's command line"
start_engine /tmp/engine.log

say "two mounts"
mount -t qtfs "$share" "$client" -o server=vsock://1:12345
printf 'qtfs_server_vsock_cid = 1\n' >/etc/qtfs/client.toml
echo "$share $second qtfs cache=none,nofail,_netdev,x-systemd.requires=network.target 0 0" >>/etc/fstab
mount "$second"
grep -E " ($client|$second) " /proc/self/mountinfo
[ "$(grep -cE " ($client|$second) .* - fuse.qtfs $share " /proc/self/mountinfo)" = 2 ] || die "not mounted"

say "checks"
"$checkout/.venv/bin/python" -I test/level6_vm/checks.py "$share" "$client" "$second"

# Of the upper levels only: this machine is emulated. Level 3 walks all of both.
say "a walk of /proc and /sys, on a busy machine"
mkdir -p /mnt/proc /mnt/sys /mnt/cgroup1 /tmp/cgroup1
mount -t cgroup2 none /sys/fs/cgroup
mount -t cgroup -o freezer none /tmp/cgroup1
mount -t qtfs /proc /mnt/proc
mount -t qtfs /sys /mnt/sys
mount -t qtfs /tmp/cgroup1 /mnt/cgroup1
(while :; do sleep 0.02; done) &
busy=$!
find /mnt/proc -maxdepth 2 >/dev/null 2>/tmp/walk.err || :
! grep -vE 'No such (file or directory|process)$' /tmp/walk.err || die "/proc"
for file in version filesystems devices sys/kernel/ostype sys/kernel/random/boot_id; do
    cmp "/proc/$file" "/mnt/proc/$file"
done
kill "$busy"
wait "$busy" 2>/dev/null || :
find /sys -mindepth 1 -maxdepth 2 -printf '%P %y %l\n' | sort >/tmp/sys.there
find /mnt/sys -mindepth 1 -maxdepth 2 -printf '%P %y %l\n' | sort >/tmp/sys.here
diff /tmp/sys.there /tmp/sys.here || die "/sys"

say "control groups, versions 2 and 1"
sleep 300 &
sleeper=$!
echo +pids >/mnt/sys/fs/cgroup/cgroup.subtree_control
mkdir /mnt/sys/fs/cgroup/job /mnt/cgroup1/job
echo 10 >/mnt/sys/fs/cgroup/job/pids.max
[ "$(cat /sys/fs/cgroup/job/pids.max)" = 10 ] || die "no limit"
! echo nonsense >/mnt/sys/fs/cgroup/job/pids.max 2>/dev/null || die "nonsense was taken"
echo "$sleeper" >/mnt/sys/fs/cgroup/job/cgroup.procs
[ "$(cat /sys/fs/cgroup/job/cgroup.procs)" = "$sleeper" ] || die "not moved (2)"
echo "$sleeper" >/mnt/cgroup1/job/cgroup.procs
[ "$(cat /tmp/cgroup1/job/tasks)" = "$sleeper" ] || die "not moved (1)"
echo FROZEN >/mnt/cgroup1/job/freezer.state
[ "$(cat /tmp/cgroup1/job/freezer.state)" = FROZEN ] || die "not frozen"
echo THAWED >/mnt/cgroup1/job/freezer.state
kill "$sleeper"
wait "$sleeper" 2>/dev/null || :
for _ in $(seq 100); do
    rmdir /mnt/sys/fs/cgroup/job /mnt/cgroup1/job 2>/dev/null || :
    [ -e /sys/fs/cgroup/job ] || [ -e /tmp/cgroup1/job ] || break
    sleep 0.1
done
umount /mnt/proc /mnt/sys /mnt/cgroup1
for place in /mnt/proc /mnt/sys /mnt/cgroup1; do wait_gone "$place"; done
[ ! -e /sys/fs/cgroup/job ] && [ ! -e /tmp/cgroup1/job ] || die "the groups were not removed"

say "git"
export GIT_CONFIG_GLOBAL=/tmp/gitconfig GIT_CONFIG_NOSYSTEM=1
git config --global safe.directory '*'
git config --global user.name guest
git config --global user.email guest@localhost
make_repository /tmp/repository.git
git clone -q --no-hardlinks /tmp/repository.git "$client/clone"
git -C "$client/clone" fsck --full --strict --no-progress
[ -z "$(git -C "$second/clone" status --porcelain)" ] || die "the two mounts differ"
diff -r --no-dereference "$share/clone" "$client/clone" || die "server and client differ"

say "the engine is killed and started again"
echo before >"$share/file"
[ "$(cat "$client/file")" = before ] || die "no content before"
kill -9 "$engine"
wait "$engine" 2>/dev/null || :
start_engine /tmp/engine.log2
echo after >"$share/file"
[ "$(cat "$client/file")" = after ] || die "no content after"
echo written >"$second/other"
[ "$(cat "$share/other")" = written ] || die "nothing arrived after"

say "the engine stays away: whoever waits for it can be killed, and the mount taken away"
kill -9 "$engine"
wait "$engine" 2>/dev/null || :
ls "$second" >/dev/null 2>&1 &
waiting=$!
sleep 1
kill "$waiting" || die "ls did not wait for the engine to return"
wait "$waiting" 2>/dev/null || :
umount -l "$second"
wait_gone "$second"
start_engine /tmp/engine.log3

say "unmount, end"
umount "$client"
wait_gone "$client"
! grep -q fuse.qtfs /proc/self/mountinfo || die "still mounted"
kill "$engine"
wait "$engine" || die "the engine ended with $?"
say "done"
