/* SIGBUS in shared memory: a BAR whose device went away, or a file that somebody cut short.
 *
 * The handler marks the mapping lost and then puts a fresh page in place of the one that failed, so that the access goes on
 * with zeros; whoever reads zeros finds the mark afterwards, and gives the channel up. The other pages stay: a system call
 * that reads file data from them, or writes it there, ends with EFAULT and not with zeros. Any other SIGBUS ends the
 * process as ever. mmap(2) is not on signal-safety(7)'s list, but it is a bare system call.
 */
#ifndef QTFS_BUS_ERROR_H
#define QTFS_BUS_ERROR_H

#ifndef _GNU_SOURCE
#define _GNU_SOURCE
#endif
#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

#define BUS_REGIONS 256

struct bus_region {
    uintptr_t begin; /* 0: free */
    size_t bytes;
    int32_t *lost;
};

static struct bus_region bus_regions[BUS_REGIONS];
static struct sigaction bus_previous;
static pthread_mutex_t bus_guard = PTHREAD_MUTEX_INITIALIZER;
static int bus_installed;
static uintptr_t bus_page_bytes;

static void bus_handler(int number, siginfo_t *info, void *context)
{
    int saved = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    (void)context;
    for (int i = 0; i < BUS_REGIONS && info->si_code > 0; i++) {
        uintptr_t begin = __atomic_load_n(&bus_regions[i].begin, __ATOMIC_ACQUIRE);
        if (begin == 0 || at < begin || at - begin >= bus_regions[i].bytes)
            continue;
        __atomic_store_n(bus_regions[i].lost, 1, __ATOMIC_SEQ_CST);
        if (mmap((void *)(at & ~(bus_page_bytes - 1)), bus_page_bytes, PROT_READ | PROT_WRITE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED)
            break;
        errno = saved;
        return;
    }
    sigaction(number, &bus_previous, NULL); /* and the instruction faults again */
    errno = saved;
}

/* Watch over a mapping; its index, or -1. */
static int bus_watch(void *begin, size_t bytes, int32_t *lost)
{
    struct sigaction action;
    int index = -1;
    pthread_mutex_lock(&bus_guard);
    if (!bus_installed) {
        bus_page_bytes = (uintptr_t)sysconf(_SC_PAGESIZE);
        memset(&action, 0, sizeof(action));
        action.sa_sigaction = bus_handler;
        action.sa_flags = SA_SIGINFO | SA_ONSTACK;
        bus_installed = sigaction(SIGBUS, &action, &bus_previous) == 0;
    }
    for (int i = 0; i < BUS_REGIONS && bus_installed && index < 0; i++)
        if (bus_regions[i].begin == 0)
            index = i;
    if (index >= 0) {
        bus_regions[index].bytes = bytes;
        bus_regions[index].lost = lost;
        __atomic_store_n(&bus_regions[index].begin, (uintptr_t)begin, __ATOMIC_RELEASE);
    }
    pthread_mutex_unlock(&bus_guard);
    return index;
}

static void bus_unwatch(int index)
{
    __atomic_store_n(&bus_regions[index].begin, 0, __ATOMIC_RELEASE);
}

#endif
