"""For Python: letting go of a mount's nodes before it is unmounted, see letting_go.pyx."""
from libc.stdint cimport uint64_t

from qtfs_server cimport letting_go


def release_mount(uint64_t mount_id) -> None:
    """Close the descriptors of idle nodes on a mount (an id of mountinfo), in all sessions, so that it is not busy."""
    with nogil:
        letting_go.release_mount(mount_id)


def mount_gone(uint64_t mount_id) -> None:
    """Note that a mount was taken away, and not lazily: its id may be given out again."""
    with nogil:
        letting_go.mount_gone(mount_id)
