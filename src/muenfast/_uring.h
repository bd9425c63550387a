/* liburing, and what it or the kernel's headers may be too old to name; no Python.h.
 *
 * With MUENFAST_NO_URING defined (no liburing at build time) there is nothing here.
 */
#ifndef MUENFAST_URING_H
#define MUENFAST_URING_H

#ifndef MUENFAST_NO_URING
#include <stdbool.h>
#include <stdint.h>
#pragma push_macro("BLOCK_SIZE") /* _wire.h has one, and linux/fs.h another */
#undef BLOCK_SIZE
#include <liburing.h>
#undef BLOCK_SIZE
#pragma pop_macro("BLOCK_SIZE")

enum {
    URING_OP_COMMAND = 46,    /* linux/io_uring.h of Linux 5.19: IORING_OP_URING_CMD */
    URING_OP_FUTEX_WAIT = 51, /* linux/io_uring.h of Linux 6.7: IORING_OP_FUTEX_WAIT */
    URING_FUTEX2_U32 = 2,     /* linux/futex.h: FUTEX2_SIZE_U32, shared between processes */
    /* linux/io_uring.h of Linux 6.0: IORING_SETUP_... */
    URING_SETUP_COOP_TASKRUN = 1 << 8,
    URING_SETUP_TASKRUN_FLAG = 1 << 9,
    URING_SETUP_SQE128 = 1 << 10,
    URING_SETUP_SINGLE_ISSUER = 1 << 12
};

/* A completion when the word is no longer `seen`, or is woken. The kernel waits for the memory, not for the address. */
static inline void uring_prep_futex_wait(struct io_uring_sqe *sqe, const uint32_t *word, uint32_t seen) {
    io_uring_prep_rw(URING_OP_FUTEX_WAIT, sqe, URING_FUTEX2_U32, word, 0, seen);
    sqe->addr3 = UINT32_MAX; /* mask: any wake-up */
}
#endif
#endif
