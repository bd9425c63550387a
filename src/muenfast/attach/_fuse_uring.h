/* FUSE over io_uring (Linux 6.14): what the kernel's requests and answers look like there; no Python.h.
 *
 * For each CPU that the system may have there is a queue of entries. An entry is a header and a buffer for the payload; it is
 * registered once, and from then on the kernel's until a command of its completes: with a request, or for good with an error.
 * The answer is written over the request and committed, which also asks for the entry's next request. FORGET and INTERRUPT,
 * which have no answer, still come from read(2).
 */
#ifndef MUENFAST_FUSE_URING_H
#define MUENFAST_FUSE_URING_H

#include <errno.h>
#include <stdint.h>
#include <string.h>
#include <sys/uio.h>

#include <linux/fuse.h>

/* All of it: include/uapi/linux/fuse.h, 7.42. */
enum {
    FUSE_URING_REGISTER = 1, /* FUSE_IO_URING_CMD_REGISTER */
    FUSE_URING_COMMIT = 2,   /* FUSE_IO_URING_CMD_COMMIT_AND_FETCH */
    FUSE_URING_FIRST = 128   /* most bytes of a request's first argument; of struct fuse_in_header, too */
};
#define FUSE_URING_INIT_EXT (1u << 30) /* of fuse_init_in.flags: flags2 is there */
#define FUSE_URING_FLAG2 (1u << 9)     /* of flags2: bit 41, FUSE_OVER_IO_URING */

typedef struct fuse_uring_header {
    union { /* of the request, and written over it that of the answer */
        struct fuse_in_header in;
        struct fuse_out_header out;
        char header[128];
    };
    char first[FUSE_URING_FIRST]; /* the request's first argument; the others are the payload */
    uint64_t flags;
    uint64_t commit_id; /* to be said by the commit */
    uint32_t payload;   /* bytes of it */
    uint32_t padding;
    uint64_t reserved;
} fuse_uring_header;

typedef struct fuse_uring_command {
    uint64_t flags;
    uint64_t commit_id;
    uint16_t queue;
    uint8_t padding[6];
} fuse_uring_command;

_Static_assert(sizeof(fuse_uring_header) == 288, "as the kernel's");
_Static_assert(sizeof(fuse_uring_command) == 24, "as the kernel's");

/* Whether a request of n bytes is an INIT that offers it. */
static inline int fuse_uring_offered(const void *request, size_t n) {
    const struct fuse_in_header *header = (const struct fuse_in_header *)request;
    const uint32_t *init = (const uint32_t *)(header + 1); /* major, minor, max_readahead, flags, flags2 */
    return n >= sizeof *header + 5 * sizeof *init && header->opcode == FUSE_INIT && (init[3] & FUSE_URING_INIT_EXT) != 0
           && (init[4] & FUSE_URING_FLAG2) != 0;
}

/* Makes an INIT's answer of n bytes, its header left out, say that we want it; 0 or -EPROTO. */
static inline int fuse_uring_accept(void *answer, size_t n) {
    uint32_t *word = (uint32_t *)answer; /* struct fuse_init_out: flags is the fourth, flags2 the ninth */
    if (n < 9 * sizeof *word)
        return -EPROTO;
    word[3] |= FUSE_URING_INIT_EXT;
    word[8] |= FUSE_URING_FLAG2;
    return 0;
}
#endif
