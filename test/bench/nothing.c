/*
 * A FUSE file system that does nothing: names are there or not, files read as zeros, and what is written is thrown
 * away. What it takes for an operation is what any FUSE file system takes before it has done any work: the floor.
 *
 * It is asked what passthrough_ll with cache=never is asked, but for the FLUSH of files that were opened, and one thread
 * answers. That one looks for the next request before it sleeps, so that no operation pays for a processor that has to be
 * woken. Its root has what calls.py prepares: the files "small" and "data", and the directory "many" with file0 to file999.
 *
 *   nothing MOUNTPOINT
 */
#define FUSE_USE_VERSION 34
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <poll.h>
#include <sched.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

enum { LOOK_NS = 2000000 };
enum { MANY = FUSE_ROOT_ID + 1, FIRST_NAME, NAMES = 64, FIRST_OF_MANY = FIRST_NAME + NAMES, MANY_FILES = 1000 };

static const off_t FILE_BYTES = 64 << 20;
static char zeros[1 << 20];
static struct name {
    char text[32];
    bool there, is_dir;
} names[NAMES];

static struct stat attributes(fuse_ino_t node)
{
    bool is_dir = node < FIRST_NAME || (node < FIRST_OF_MANY && names[node - FIRST_NAME].is_dir);
    struct stat st = {.st_ino = node, .st_nlink = 1, .st_mode = is_dir ? S_IFDIR | 0755 : S_IFREG | 0644};

    st.st_size = is_dir ? 0 : FILE_BYTES;
    return st;
}

/* The node of a name in the root, there or not; 0: the table is full, or the name is too long. */
static fuse_ino_t node_of(const char *text)
{
    for (int i = 0; i < NAMES && strlen(text) < sizeof(names[i].text); i++) {
        if (names[i].text[0] == '\0')
            snprintf(names[i].text, sizeof(names[i].text), "%s", text);
        if (strcmp(names[i].text, text) == 0)
            return FIRST_NAME + i;
    }
    return 0;
}

static fuse_ino_t look_up(fuse_ino_t parent, const char *text)
{
    unsigned number;

    if (parent == MANY)
        return sscanf(text, "file%u", &number) == 1 && number < MANY_FILES ? FIRST_OF_MANY + number : 0;
    if (strcmp(text, "many") == 0)
        return MANY;
    fuse_ino_t node = node_of(text);
    return node != 0 && names[node - FIRST_NAME].there ? node : 0;
}

static struct fuse_entry_param entry(fuse_ino_t node)
{
    return (struct fuse_entry_param){.ino = node, .attr = attributes(node)};
}

static void on_lookup(fuse_req_t req, fuse_ino_t parent, const char *text)
{
    struct fuse_entry_param found = entry(look_up(parent, text));

    if (found.ino == 0)
        fuse_reply_err(req, ENOENT);
    else
        fuse_reply_entry(req, &found);
}

static void on_getattr(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *fi)
{
    struct stat st = attributes(node);

    (void)fi;
    fuse_reply_attr(req, &st, 0);
}

static void on_setattr(fuse_req_t req, fuse_ino_t node, struct stat *wanted, int valid, struct fuse_file_info *fi)
{
    (void)wanted, (void)valid;
    on_getattr(req, node, fi);
}

/* The node, which is there from now on; 0: answered with an error. */
static fuse_ino_t make(fuse_req_t req, const char *text, bool is_dir)
{
    fuse_ino_t node = node_of(text);

    if (node == 0) {
        fuse_reply_err(req, ENOSPC);
        return 0;
    }
    names[node - FIRST_NAME].there = true;
    names[node - FIRST_NAME].is_dir = is_dir;
    return node;
}

static void on_create(fuse_req_t req, fuse_ino_t parent, const char *text, mode_t mode, struct fuse_file_info *fi)
{
    fuse_ino_t node = make(req, text, false);

    (void)parent, (void)mode;
    if (node != 0) {
        struct fuse_entry_param made = entry(node);
        fi->direct_io = 1;
        fuse_reply_create(req, &made, fi);
    }
}

static void on_mkdir(fuse_req_t req, fuse_ino_t parent, const char *text, mode_t mode)
{
    fuse_ino_t node = make(req, text, true);

    (void)parent, (void)mode;
    if (node != 0) {
        struct fuse_entry_param made = entry(node);
        fuse_reply_entry(req, &made);
    }
}

static void on_remove(fuse_req_t req, fuse_ino_t parent, const char *text)
{
    fuse_ino_t node = node_of(text);

    (void)parent;
    if (node != 0)
        names[node - FIRST_NAME].there = false;
    fuse_reply_err(req, node != 0 ? 0 : ENOENT);
}

static void on_open(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *fi)
{
    (void)node;
    fi->direct_io = 1;
#if FUSE_VERSION >= FUSE_MAKE_VERSION(3, 11)
    fi->noflush = 1;
#endif
    fuse_reply_open(req, fi);
}

static void on_read(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *fi)
{
    (void)node, (void)fi;
    fuse_reply_buf(req, zeros, offset >= FILE_BYTES ? 0 : size < sizeof(zeros) ? size : sizeof(zeros));
}

static void on_write(fuse_req_t req, fuse_ino_t node, const char *data, size_t size, off_t offset,
                     struct fuse_file_info *fi)
{
    (void)node, (void)data, (void)offset, (void)fi;
    fuse_reply_write(req, size);
}

static void on_readdirplus(fuse_req_t req, fuse_ino_t node, size_t size, off_t offset, struct fuse_file_info *fi)
{
    char *page = malloc(size), text[16];
    size_t used = 0, more;

    (void)fi;
    for (off_t i = offset; page != NULL && node == MANY && i < MANY_FILES; i++, used += more) {
        struct fuse_entry_param found = entry(FIRST_OF_MANY + i);
        snprintf(text, sizeof(text), "file%d", (int)i);
        more = fuse_add_direntry_plus(req, page + used, size - used, text, &found, i + 1);
        if (more > size - used)
            break;
    }
    fuse_reply_buf(req, page, used);
    free(page);
}

static void on_close(fuse_req_t req, fuse_ino_t node, struct fuse_file_info *fi)
{
    (void)node, (void)fi;
    fuse_reply_err(req, 0);
}

static const struct fuse_lowlevel_ops operations = {
    .lookup = on_lookup, .getattr = on_getattr, .setattr = on_setattr, .create = on_create, .mkdir = on_mkdir,
    .unlink = on_remove, .rmdir = on_remove, .open = on_open, .read = on_read, .write = on_write,
    .flush = on_close, .release = on_close, .readdirplus = on_readdirplus,
};

static long long now_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

/* Until unmounted: 0, or -errno of the device. */
static int serve(struct fuse_session *session)
{
    struct pollfd device = {.fd = fuse_session_fd(session), .events = POLLIN};
    struct fuse_buf request = {.mem = NULL};
    long long asked = now_ns();
    int got = 0;

    if (fcntl(device.fd, F_SETFL, fcntl(device.fd, F_GETFL) | O_NONBLOCK) < 0)
        return -errno;
    while (!fuse_session_exited(session) && (got >= 0 || got == -EAGAIN || got == -EINTR)) {
        got = fuse_session_receive_buf(session, &request);
        if (got > 0) {
            fuse_session_process_buf(session, &request);
            asked = now_ns();
        } else if (now_ns() - asked < LOOK_NS) {
            sched_yield();
        } else {
            poll(&device, 1, -1);
        }
    }
    free(request.mem);
    return fuse_session_exited(session) ? 0 : got;
}

int main(int argc, char **argv)
{
    struct fuse_args args = FUSE_ARGS_INIT(1, argv);
    struct fuse_session *session = fuse_session_new(&args, &operations, sizeof(operations), NULL);

    if (argc != 2 || session == NULL || fuse_set_signal_handlers(session) != 0)
        return 1;
    if (fuse_session_mount(session, argv[1]) != 0)
        return 1;
    names[node_of("small") - FIRST_NAME].there = names[node_of("data") - FIRST_NAME].there = true;
    int status = serve(session);
    fuse_session_unmount(session);
    return status < 0;
}
