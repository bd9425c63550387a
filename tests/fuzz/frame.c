/* fuzz target: packets in elements, in the three framings. core: _frame.h
 *
 * Oracles: no byte beyond the element is read or written (guard pages). What frame_finish() makes of a packet, frame_take()
 * gives back, and nothing of what stood in the element before remains. What frame_take() accepts has the length that its own
 * header, or the element's end, says, and is what stands there; the element may change at any turn.
 */
#define FUZZ_PEER
#include "fuzz.h"

#include "_frame.h"
#undef memcpy

enum { MOST = 2048 };
static fuzz_region element;
static uint8_t got[MOST + 64];
static bool moved;
static uint32_t whole; /* bytes of the element */

static void writer_acts(void) {
    uint16_t at = fuzz_u16();
    moved = true;
    element.theirs[at % whole] = fuzz_u8();
}

static void take(int kind, uint32_t size) {
    uint32_t mark = 0x5a5a5a5a, start = kind == FRAME_NET ? 8 : 0;
    const uint8_t *e = element.theirs;
    int32_t want = (int32_t)size, n;
    bool ip4 = size > 8 && e[8] >> 4 == 4;
    memset(got, 0xcc, sizeof got);
    moved = false;
    if (kind == FRAME_ETH) {
        want = e[size - 2] | e[size - 1] << 8;
        want = want < 14 || (uint32_t)want > size - 2 ? FRAME_LENGTH : want;
    } else if (kind == FRAME_NET) {
        if ((!ip4 && e[8] >> 4 != 6) || e[6] != (ip4 ? 4 : 41))
            want = FRAME_PROTOCOL;
        else {
            want = ip4 ? e[10] << 8 | e[11] : 40 + (e[12] << 8 | e[13]);
            if (ip4 && ((e[8] & 15) < 5 || want < (e[8] & 15) * 4))
                want = FRAME_LENGTH;
        }
        if (want > 0 && (uint32_t)want > size - 8)
            want = FRAME_LENGTH;
        if (want == FRAME_LENGTH && e[6] != (ip4 ? 4 : 41))
            want = FRAME_PROTOCOL;
    }
    n = frame_take(kind, got, element.ours, size, &mark);
    EXPECT(n == FRAME_LENGTH || n == FRAME_PROTOCOL || (n >= 0 && (uint32_t)n <= size - start), "a packet of %d in an element of %u", n, size);
    for (uint32_t k = size; k < sizeof got; k++)
        EXPECT(got[k] == 0xcc, "byte %u behind an element of %u was written", k, size);
    if (kind == FRAME_NET && n > 0) { /* by its own header, as it was copied: the one that all later decisions are about */
        uint8_t *p = got + 8;
        int32_t own = p[0] >> 4 == 4 ? p[2] << 8 | p[3] : 40 + (p[4] << 8 | p[5]);
        EXPECT(own == n && (p[0] >> 4 == 4 || p[0] >> 4 == 6), "%d bytes are taken of a packet of %d", n, own);
        EXPECT(p[0] >> 4 == 6 || ((p[0] & 15) >= 5 && (p[0] & 15) * 4 <= n), "a header beyond its packet");
    }
    if (moved)
        return;
    EXPECT(n == want, "%d, not %d", n, want);
    if (n > 0)
        EXPECT(memcmp(got + start, e + start, (uint32_t)n) == 0 && (kind != FRAME_NET || memcmp(&mark, e, 4) == 0), "another packet");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    uint32_t n, room, mark, used;
    uint8_t what;
    int kind, status;
    if (!made) {
        fuzz_region_make(&element, MOST + 16, PROT_READ | PROT_WRITE);
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = writer_acts;
    what = fuzz_u8();
    kind = what % 3;
    whole = frame_size(kind, FRAME_LEAST + fuzz_u16() % (MOST - FRAME_LEAST));
    EXPECT(whole == frame_room(kind, whole) + (kind == FRAME_NET ? 8 : kind == FRAME_ETH ? 2 : 0), "an element of %u", whole);
    fuzz_region_size(&element, (whole + 7) / 8 * 8);
    element.ours += element.length - whole; /* which ends where it ends */
    element.theirs += element.length - whole;
    memset(element.theirs, 0xee, whole);
    room = frame_room(kind, whole);
    mark = fuzz_u32();
    if (what & 4) { /* a packet of ours goes there first */
        n = fuzz_u16() % (room + 8);
        used = n;
        if (n <= room) {
            memset(element.theirs + frame_start(kind), 0x11, n);
            fuzz_bytes(element.theirs + frame_start(kind), n < 64 ? n : 64);
            used = room;
        }
        status = frame_finish(kind, element.ours, whole, element.ours + frame_start(kind), n, used, mark);
        EXPECT((status == FRAME_OVERSIZE) == (n > room), "%u bytes into a room of %u: %d", n, room, status);
        if (status == 0) {
            uint32_t tail = kind == FRAME_ETH ? 2 : 0, back;
            for (uint32_t k = frame_start(kind) + n; k < whole - tail; k++)
                EXPECT(element.theirs[k] == 0, "byte %u of an earlier packet goes out", k);
            int32_t again = frame_take(kind, got, element.theirs, whole, &back);
            if (kind == FRAME_NET) {
                const uint8_t *p = element.theirs + 8;
                EXPECT(again > 0 && (uint32_t)again <= n && back == mark, "what was sent is not received: %d of %u", again, n);
                EXPECT(element.theirs[7] == (p[0] >> 4 == 4 ? p[1] >> 2 : (p[0] & 15) << 2 | p[1] >> 6), "DSCP");
                EXPECT((element.theirs[4] | element.theirs[5] << 8) == (int)n, "net_hdr's length");
            } else if (kind == FRAME_ETH)
                EXPECT(n < 14 ? again == FRAME_LENGTH : again == (int32_t)n, "what was sent is not received: %d of %u", again, n);
        }
    } else
        fuzz_bytes(element.theirs, whole < 96 ? whole : 96);
    if (kind == FRAME_ETH && what & 8) {
        element.theirs[whole - 2] = fuzz_u8();
        element.theirs[whole - 1] = fuzz_u8() & 15;
    }
    for (int k = 0; k < 3; k++) {
        if (what & 16)
            fuzz_arm();
        take(kind, whole);
    }
    fuzz_countdown = 0;
    return 0;
}
