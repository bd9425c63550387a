/* Survives truncation of mapped shared memory; included by _ring alone (it owns the table); no Python.h.
 *
 * The owner of a region may truncate it while it is mapped here: the next access raises SIGBUS. The handler
 * replaces the whole mapping by private zero pages, marks it broken and returns: the interrupted access goes on
 * and reads an inactive channel (epoch 0). System calls that were given such memory return EFAULT instead.
 * A fault outside every guarded mapping goes to whoever handled SIGBUS before; where that one hands it back (it came
 * between two installations of ours), the process ends as it would have without us.
 */
#ifndef MUENFAST_GUARD_H
#define MUENFAST_GUARD_H

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

#define GUARDS 4096

typedef struct {
    _Atomic uintptr_t base; /* page-aligned; 0 = free. Stored last, with release */
    _Atomic uintptr_t length; /* belongs to base while base is the same before and after it was read */
    uint32_t broken;
} guard_entry;

static guard_entry guard_table[GUARDS];
static _Atomic int guard_high;
static struct sigaction guard_previous;
static int guard_installed;      /* once; under guard_lock */
static _Atomic int guard_inside; /* thread that is in guard_previous now, 0: none */
static _Atomic int guard_passed; /* thread that was there last */
static _Atomic int guard_stacked; /* guard_previous came after us once, and may hand back what it gets */
static pthread_mutex_t guard_lock = PTHREAD_MUTEX_INITIALIZER;

static void guard_on_sigbus(int number, siginfo_t *info, void *context) {
    int saved = errno;
    uintptr_t at = (uintptr_t)info->si_addr;
    int sent = info->si_code <= 0; /* by a program: no fault, and no address */
    int high = sent ? 0 : atomic_load_explicit(&guard_high, memory_order_acquire);
    int found = 0;
    int self;
    for (int i = 0; i < high; i++) {
        guard_entry *g = &guard_table[i];
        uintptr_t base = atomic_load_explicit(&g->base, memory_order_acquire);
        uintptr_t length = atomic_load_explicit(&g->length, memory_order_relaxed);
        atomic_thread_fence(memory_order_acquire);
        if (base == 0 || at - base >= length || atomic_load_explicit(&g->base, memory_order_relaxed) != base)
            continue; /* the last: another thread gives the entry to another mapping */
        /* Several guards may lie on one mapping: all of them are broken. */
        if (mmap((void *)base, length, PROT_READ | PROT_WRITE, MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS, -1, 0) ==
            MAP_FAILED)
            break;
        atomic_store_explicit((_Atomic uint32_t *)&g->broken, 1, memory_order_release);
        found = 1;
    }
    errno = saved;
    if (found)
        return;
    if (sent && !(guard_previous.sa_flags & SA_SIGINFO) && guard_previous.sa_handler == SIG_IGN)
        return;
    self = (int)syscall(SYS_gettid);
    if (((guard_previous.sa_flags & SA_SIGINFO) ||
         (guard_previous.sa_handler != SIG_DFL && guard_previous.sa_handler != SIG_IGN)) &&
        guard_inside != self && !(guard_stacked && sent && guard_passed == self)) {
        guard_inside = guard_passed = self;
        if (guard_previous.sa_flags & SA_SIGINFO)
            guard_previous.sa_sigaction(number, info, context);
        else
            guard_previous.sa_handler(number);
        guard_inside = 0;
        return;
    }
    signal(number, SIG_DFL); /* a fault repeats and ends the process as if we had never been here */
    if (sent)
        raise(number);
}

/* Guards [start, start + length); returns the word that becomes 1 when the mapping broke, NULL when the table is
 * full or the handler cannot be installed. */
static uint32_t *guard_add(const void *start, size_t length) {
    uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    uintptr_t base = (uintptr_t)start & ~(page - 1);
    uintptr_t end = ((uintptr_t)start + length + page - 1) & ~(page - 1);
    uint32_t *word = NULL;
    struct sigaction now;
    pthread_mutex_lock(&guard_lock);
    if (sigaction(SIGBUS, NULL, &now) == 0 && !((now.sa_flags & SA_SIGINFO) && now.sa_sigaction == guard_on_sigbus)) {
        struct sigaction mine = {0};
        mine.sa_sigaction = guard_on_sigbus;
        mine.sa_flags = SA_SIGINFO | SA_ONSTACK;
        sigemptyset(&mine.sa_mask);
        guard_stacked = guard_installed;
        guard_previous = now;
        if (sigaction(SIGBUS, &mine, NULL) != 0)
            goto out;
        guard_installed = 1;
    }
    for (int i = 0; i < GUARDS; i++) {
        guard_entry *g = &guard_table[i];
        if (atomic_load_explicit(&g->base, memory_order_relaxed) != 0)
            continue;
        atomic_thread_fence(memory_order_release); /* base 0 before the new length */
        atomic_store_explicit(&g->length, end - base, memory_order_relaxed);
        g->broken = 0;
        atomic_store_explicit(&g->base, base, memory_order_release);
        if (i >= atomic_load_explicit(&guard_high, memory_order_relaxed))
            atomic_store_explicit(&guard_high, i + 1, memory_order_release);
        word = &g->broken;
        break;
    }
out:
    pthread_mutex_unlock(&guard_lock);
    return word;
}

/* Must precede munmap: afterwards the address range may belong to somebody else. */
static void guard_remove(uint32_t *word) {
    if (word == NULL)
        return;
    guard_entry *g = (guard_entry *)((char *)word - offsetof(guard_entry, broken));
    pthread_mutex_lock(&guard_lock);
    atomic_store_explicit(&g->base, 0, memory_order_release);
    pthread_mutex_unlock(&guard_lock);
}

#endif
