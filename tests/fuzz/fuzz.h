/* What the fuzz targets share (tests/fuzz; tools/attack.py builds and runs them).
 *
 * A target is LLVMFuzzerTestOneInput() over the very C that is built: a header of the package, or what Cython made of a
 * module, included behind this file. One input is one whole life of an engine and its peer, in one thread and on a clock of
 * its own, so that it always comes to the same. Every target has an oracle of its own (EXPECT) besides the sanitizers and
 * the guard pages, which fuzz_fail() reports as a crash.
 *
 * With FUZZ_PEER the core's atomic loads, fences and copies go through here: each is a turn, at which a peer that was armed
 * acts (fuzz_arm). So whatever is fetched twice may differ, and what is checked before it is copied is found out.
 */
#ifndef FUZZ_H
#define FUZZ_H

#include <errno.h>
#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/eventfd.h>
#include <sys/mman.h>
#include <sys/random.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

/* Of an oracle's long loops: what they compare tells a fuzzer nothing, and to look at their every access takes most of the
 * time. Not inlined, for what is is looked at again. */
#ifdef __clang__
#define FUZZ_QUIET __attribute__((noinline, no_sanitize("coverage", "address", "undefined")))
#else
#define FUZZ_QUIET
#endif

/* ---- the input */
void fuzz_begin(const uint8_t *data, size_t size);
size_t fuzz_left(void);
uint8_t fuzz_u8(void); /* all of these: zeros behind the end */
uint16_t fuzz_u16(void);
uint32_t fuzz_u32(void);
uint64_t fuzz_u64(void);
uint64_t fuzz_odd(void); /* small, or at one of the edges where arithmetic goes wrong, or anything */
size_t fuzz_bytes(void *to, size_t most);

_Noreturn void fuzz_fail(const char *format, ...) __attribute__((format(printf, 1, 2)));
#define EXPECT(condition, ...)                                                                                              \
    do {                                                                                                                    \
        if (!(condition))                                                                                                   \
            fuzz_fail(__VA_ARGS__);                                                                                         \
    } while (0)

/* ---- memory between two guard pages, mapped twice: by us as in the product, and by the peer */
typedef struct {
    uint8_t *ours, *theirs; /* of `length` bytes, which end where the guard page begins */
    size_t length, most;
    uint8_t *our_end, *their_end;
} fuzz_region;
void fuzz_region_make(fuzz_region *r, size_t most, int protection); /* once */
void fuzz_region_size(fuzz_region *r, size_t length);               /* length: a multiple of 8, up to `most`; zeroed */
void fuzz_region_check(const fuzz_region *r); /* that what stands before it on its page is untouched */

/* ---- the peer's turns */
extern uint32_t fuzz_countdown; /* turns until it acts; 0: it does not */
extern void (*fuzz_peer)(void);
void fuzz_peer_acts(void);
static inline void fuzz_turn(void) {
    if (fuzz_countdown != 0 && --fuzz_countdown == 0)
        fuzz_peer_acts();
}
static inline void fuzz_arm(void) { fuzz_countdown = 1 + fuzz_u8() % 48; }
/* A server's life: up to `most` turns, `acts` of 256 the client's, some that arm it, the others the server's; then `last` of
 * these. */
void fuzz_serve(int most, uint8_t acts, int last, void (*step)(void));
void *fuzz_copy(void *to, const void *from, size_t n);
long fuzz_syscall(long number, ...);

/* What the peer forged is not the epoch of a life that is to come: those are next, next + 1, ... */
static inline void fuzz_no_future(void *header, uint64_t next) {
    uint64_t epoch;
    memcpy(&epoch, (uint8_t *)header + 8, 8);
    if (epoch - next < 100000) {
        epoch |= UINT64_C(1) << 63;
        memcpy((uint8_t *)header + 8, &epoch, 8);
    }
}

/* ---- the clock */
extern uint64_t fuzz_now;
int fuzz_clock(clockid_t clock, struct timespec *t);
int fuzz_nanosleep(const struct timespec *t, struct timespec *left);
ssize_t fuzz_random(void *to, size_t n); /* another one each time, always the same ones */

/* Other modules' functions, for CORE_BINDINGS: unit.c, or a target. */
void *ring_function(const char *name);
void *client_function(const char *name);
void *store_function(const char *name);

#ifdef FUZZ_PEER
#undef atomic_load_explicit
#undef atomic_thread_fence
/* One thread: a plain load of the width is what the machine would do. */
#define atomic_load_explicit(p, order) (fuzz_turn(), *(const volatile __typeof__(*(p) + 0) *)(uintptr_t)(p))
#define atomic_thread_fence(order) fuzz_turn()
#define COPY_VECTORS 0 /* _copy.h */
#undef memcpy
#define memcpy(to, from, n) fuzz_copy((to), (from), (n))
#endif
#ifdef FUZZ_CLOCK
#define clock_gettime(c, t) fuzz_clock((c), (t))
#define nanosleep(t, l) fuzz_nanosleep((t), (l))
#define syscall(...) fuzz_syscall(__VA_ARGS__)
#define sysconf(name) 2L
#define getrandom(to, n, flags) fuzz_random((to), (n))
#endif
/* ---- files, which are memory of a target's: what the engine reads and writes there, at once */
ssize_t fuzz_pread(int fd, void *data, size_t n, off_t at);
ssize_t fuzz_pwrite(int fd, const void *data, size_t n, off_t at);
int fuzz_discard(int fd, off_t at, off_t n);
#ifdef FUZZ_FILES
#include <fcntl.h>
#include <sys/ioctl.h>
#define pread(fd, data, n, at) fuzz_pread((fd), (data), (n), (at))
#define pwrite(fd, data, n, at) fuzz_pwrite((fd), (data), (n), (at))
#define fdatasync(fd) 0
#define fallocate(fd, mode, at, n) fuzz_discard((fd), (at), (n))
#endif

#endif
