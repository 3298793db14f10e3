"""list_mounts: the server's mounts below a session's root."""
from libc.errno cimport EINVAL, ENOMEM, errno
from libc.stdint cimport uint32_t, uint64_t
from libc.string cimport memcpy

from qtfs_common.protocol cimport MAX_PATH, MAX_PAYLOAD, ROOT_NODE, list_mounts_request
from qtfs_server.descriptors cimport fd_path
from qtfs_server.includes.linux cimport AT_EMPTY_PATH, AT_NO_AUTOMOUNT, STATX_MNT_ID, statx, statx_t
from qtfs_server.nodes cimport node_pin, node_unpin
from qtfs_server.request cimport MALFORMED, request
from qtfs_server.session cimport node

import logging
import zlib

from qtfs_common import mountinfo, remote_calls
from qtfs_server.mounts import read_table, unique_ids

log = logging.getLogger(__name__)


cdef int op_list_mounts(request *r) noexcept nogil:
    """LIST_MOUNTS: list_mounts_request → list_mounts_reply, mount_record[]; parents come before what lies on them."""
    cdef char path[MAX_PATH]
    cdef statx_t st
    cdef node *n = NULL
    cdef int error
    if r.body_bytes != sizeof(list_mounts_request) or (<list_mounts_request *>r.body).size > MAX_PAYLOAD:
        return MALFORMED
    error = node_pin(r.s, ROOT_NODE, &n)
    if error < 0:
        return error
    error = fd_path(n.fd, path, sizeof(path))
    if error >= 0:
        error = -errno if statx(n.fd, b"", AT_EMPTY_PATH | AT_NO_AUTOMOUNT, STATX_MNT_ID, &st) < 0 else 0
    node_unpin(r.s, n)
    if error < 0:
        return error
    with gil:
        return _list(r, <uint32_t>st.stx_mnt_id, path)


cdef int _list(request *r, uint32_t root_mount, bytes root) noexcept:
    """Fill the reply: 0 or -errno."""
    cdef list_mounts_request asked = (<list_mounts_request *>r.body)[0]
    cdef bytes reply
    try:
        records = _records(root_mount, root)
        token = zlib.crc32(b"".join(records)) << 32 | len(records) | 1
        first = asked.first if asked.token in (0, token) else 0
        chosen, room = [], asked.size - 16
        for packed in records[first:]:
            room -= len(packed)
            if room < 0:
                break
            chosen.append(packed)
        if not chosen and first < len(records):
            return -EINVAL
        reply = remote_calls.pack_page(token, len(records), chosen)
    except OSError as failed:
        return -(failed.errno or EINVAL)
    except MemoryError:
        return -ENOMEM
    except Exception:
        log.exception("the mount table cannot be read")
        return -EINVAL
    memcpy(r.reply, <const char *>reply, len(reply))
    r.reply_bytes = len(reply)
    return 0


cdef list _records(uint32_t root_mount, bytes root):
    table = read_table()
    ids = unique_ids(table)
    cut = len(root.rstrip(b"/")) + 1
    records = []
    for mount in mountinfo.visible_below(table.values(), root_mount, root):
        records.append(remote_calls.pack_mount_record(remote_calls.MountRecord(
            ids[mount.id], ids.get(mount.parent, 0), mount.major, mount.minor, mount.path[cut:], mount.type,
            mount.source[:4095], mount.options[:4095], mount.super_options[:4095])))
    return records
