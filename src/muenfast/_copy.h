/* Copies into and out of slots; no Python.h. */
#ifndef MUENFAST_COPY_H
#define MUENFAST_COPY_H

#include <stddef.h>
#include <string.h>

/* On x86, gcc makes `rep movsq` of a copy of constant size up to 8 KiB, and glibc `rep movsb` of longer ones than about
 * 2 KiB. On Zen either is two to four times slower for some pairs of addresses, which ones differs from run to run
 * (docs/decisions/004). Pieces below that threshold, of a size that gcc does not know, are copied with vectors. */
enum { COPY_PIECE = 1536 };

static inline void copy_bytes(void *to, const void *from, size_t n) {
    unsigned char *d = (unsigned char *)to;
    const unsigned char *s = (const unsigned char *)from;
#if defined(__x86_64__)
    size_t piece = COPY_PIECE;
    __asm__("" : "+r"(piece), "+r"(n));
    while (n > piece) {
        memcpy(d, s, piece);
        d += piece;
        s += piece;
        n -= piece;
    }
#endif
    memcpy(d, s, n);
}

/* Payload of any length between a shared buffer and memory: of whole blocks, lines that `rep movsb` does not read before
 * it writes them count for more (docs/decisions/004). */
enum { COPY_LONG = 4096 };

static inline void copy_payload(void *to, const void *from, size_t n) {
    if (n >= COPY_LONG)
        memcpy(to, from, n);
    else
        copy_bytes(to, from, n);
}

#endif
