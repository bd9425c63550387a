/* _frame.h: checksums of elements that end where their memory does, under AddressSanitizer. `frames` prints what is wrong. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "_frame.h"

enum { MTU = 200, LENGTH = 100 };

static int wrong;

static void expect(int good, const char *what, int kind, uint32_t length) {
    if (good)
        return;
    printf("framing %d, length %u: %s\n", kind, length, what);
    wrong = 1;
}

/* An element that was sealed after its packet's own header had come to say `length`; whether a receiver takes it. */
static int sealed(int kind, uint32_t length) {
    uint32_t size = frame_size(kind, MTU), n = kind == FRAME_RAW ? size : LENGTH, mark;
    uint8_t *slot = calloc(1, size + FRAME_SUM), *element = calloc(1, size), *packet = slot + frame_start(kind);
    int32_t taken;
    int good;
    packet[0] = 0x45;
    packet[3] = LENGTH;
    expect(frame_finish(kind, slot, size, packet, n, n, 7) == 0, "is none to send", kind, length);
    packet[2] = (uint8_t)(length >> 8);
    packet[3] = (uint8_t)length;
    frame_seal(kind, slot, size, n, 3, 11);
    taken = frame_take(kind, element, slot, size, &mark);
    good = taken > 0 && frame_right(kind, element, slot, size, (uint32_t)taken, 3, 11);
    expect(!good || !frame_right(kind, element, slot, size, (uint32_t)taken, 4, 11), "right as another element", kind, length);
    expect(!good || !frame_right(kind, element, slot, size, (uint32_t)taken, 3, 12), "right in another epoch", kind, length);
    free(slot);
    free(element);
    return good;
}

int main(void) {
    static const uint32_t others[] = {LENGTH + 1, MTU, MTU + 1, 1500, 65535}, none[] = {0, 19};
    for (int kind = FRAME_RAW; kind <= FRAME_ETH; kind++)
        expect(sealed(kind, LENGTH), "is not taken", kind, LENGTH);
    expect(sealed(FRAME_NET, LENGTH - 1), "is not taken", FRAME_NET, LENGTH - 1);
    for (size_t k = 0; k < sizeof others / sizeof *others; k++)
        expect(!sealed(FRAME_NET, others[k]), "more than was put there is taken", FRAME_NET, others[k]);
    for (size_t k = 0; k < sizeof none / sizeof *none; k++)
        expect(!sealed(FRAME_NET, none[k]), "what is no packet is taken", FRAME_NET, none[k]);
    return wrong;
}
