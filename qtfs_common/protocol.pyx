"""The wire format for Python: operation names and numbers, and encoders for what is not per-request."""
from typing import Final

OPERATIONS: Final[dict[str, int]] = {
    "HELLO": OP_HELLO, "AUTHENTICATE": OP_AUTHENTICATE, "MOUNT": OP_MOUNT,
    "ATTACH": OP_ATTACH, "DETACH": OP_DETACH, "PING": OP_PING,
    "CANCEL": OP_CANCEL, "READY": OP_READY, "MOUNTS_CHANGED": OP_MOUNTS_CHANGED,
    "LOOKUP": OP_LOOKUP, "FORGET": OP_FORGET,
    "GETATTR": OP_GETATTR, "SETATTR": OP_SETATTR, "READLINK": OP_READLINK,
    "SYMLINK": OP_SYMLINK, "MKNOD": OP_MKNOD, "MKDIR": OP_MKDIR,
    "UNLINK": OP_UNLINK, "RMDIR": OP_RMDIR, "RENAME": OP_RENAME,
    "LINK": OP_LINK, "OPEN": OP_OPEN, "READ": OP_READ, "WRITE": OP_WRITE,
    "STATFS": OP_STATFS, "RELEASE": OP_RELEASE, "FSYNC": OP_FSYNC,
    "SETXATTR": OP_SETXATTR, "GETXATTR": OP_GETXATTR, "LISTXATTR": OP_LISTXATTR,
    "REMOVEXATTR": OP_REMOVEXATTR, "FLUSH": OP_FLUSH, "OPENDIR": OP_OPENDIR,
    "READDIR": OP_READDIR, "RELEASEDIR": OP_RELEASEDIR, "FSYNCDIR": OP_FSYNCDIR,
    "GETLK": OP_GETLK, "SETLK": OP_SETLK, "SETLKW": OP_SETLKW,
    "ACCESS": OP_ACCESS, "CREATE": OP_CREATE, "TMPFILE": OP_TMPFILE,
    "IOCTL": OP_IOCTL, "FALLOCATE": OP_FALLOCATE, "LSEEK": OP_LSEEK,
    "COPY_FILE_RANGE": OP_COPY_FILE_RANGE, "STATX": OP_STATX, "SYNCFS": OP_SYNCFS,
    "POLL": OP_POLL,
    "SYSMOUNT": OP_SYSMOUNT, "SYSUMOUNT": OP_SYSUMOUNT, "KILL": OP_KILL,
    "SETAFFINITY": OP_SETAFFINITY, "GETAFFINITY": OP_GETAFFINITY, "PROCESSES": OP_PROCESSES,
    "LIST_MOUNTS": OP_LIST_MOUNTS,
}
OPERATION_NAMES: Final[dict[int, str]] = {number: name for name, number in OPERATIONS.items()}

VERSION: Final = PROTOCOL_VERSION
MAGIC: Final = HELLO_MAGIC
REPLY: Final = MESSAGE_REPLY
DELAYED: Final = ERROR_DELAYED
LIMITS: Final[dict[str, int]] = {
    "MAX_PAYLOAD": MAX_PAYLOAD, "MAX_MESSAGE": MAX_MESSAGE, "MAX_NAME": MAX_NAME,
    "MAX_PATH": MAX_PATH, "MAX_XATTR": MAX_XATTR, "MAX_GROUPS": MAX_GROUPS,
    "MAX_RELEASES": MAX_RELEASES, "MAX_SLOTS": MAX_SLOTS,
}
ROOT: Final = ROOT_NODE
EVENT: Final = EVENT_SLOT
RECORD_BYTES: Final[dict[str, int]] = {
    "header": sizeof(header), "hello": sizeof(hello), "welcome": sizeof(welcome),
    "mount_request": sizeof(mount_request), "mount_reply": sizeof(mount_reply),
    "attach_request": sizeof(attach_request), "attach_reply": sizeof(attach_reply),
    "caller": sizeof(caller), "attributes": sizeof(attributes), "entry": sizeof(entry),
    "attributes_reply": sizeof(attributes_reply), "forget_item": sizeof(forget_item),
    "getattr_request": sizeof(getattr_request), "setattr_request": sizeof(setattr_request),
    "mknod_request": sizeof(mknod_request), "mkdir_request": sizeof(mkdir_request),
    "symlink_request": sizeof(symlink_request), "rename_request": sizeof(rename_request),
    "link_request": sizeof(link_request), "open_request": sizeof(open_request),
    "open_reply": sizeof(open_reply), "create_request": sizeof(create_request),
    "create_reply": sizeof(create_reply), "read_request": sizeof(read_request),
    "write_request": sizeof(write_request), "count_reply": sizeof(count_reply),
    "statfs_reply": sizeof(statfs_reply), "release_request": sizeof(release_request),
    "fsync_request": sizeof(fsync_request), "xattr_request": sizeof(xattr_request),
    "readdir_request": sizeof(readdir_request), "direntry": sizeof(direntry),
    "direntry_plus": sizeof(direntry_plus), "lock_request": sizeof(lock_request),
    "lock_reply": sizeof(lock_reply), "access_request": sizeof(access_request),
    "ioctl_request": sizeof(ioctl_request), "ioctl_reply": sizeof(ioctl_reply),
    "fallocate_request": sizeof(fallocate_request), "lseek_request": sizeof(lseek_request),
    "lseek_reply": sizeof(lseek_reply), "copy_request": sizeof(copy_request),
    "statx_request": sizeof(statx_request), "statx_reply": sizeof(statx_reply),
    "poll_request": sizeof(poll_request), "poll_reply": sizeof(poll_reply),
    "stale_name": sizeof(stale_name),
    "sysmount_request": sizeof(sysmount_request), "mount_option": sizeof(mount_option),
    "sysumount_request": sizeof(sysumount_request), "kill_request": sizeof(kill_request),
    "affinity_request": sizeof(affinity_request), "processes_request": sizeof(processes_request),
    "process_record": sizeof(process_record), "list_mounts_request": sizeof(list_mounts_request),
    "list_mounts_reply": sizeof(list_mounts_reply), "mount_record": sizeof(mount_record),
}
