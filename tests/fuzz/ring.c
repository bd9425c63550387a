/* fuzz target: a reader of a channel whose writer is anybody. core: _ring
 *
 * Oracles: nothing outside the region is read, and nothing of it written (guard pages, a read-only mapping). What stands
 * still is read as docs/protocol.md has it: result, elements and losses by a reader of its own, written from that text. What
 * an honest writer does, at any turn, comes out whole, in order, once, and what is lost is counted.
 */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "fuzz.h"

#include CORE_SOURCE
#undef memcpy

enum { MOST_BYTES = 64 + 1024, MOST_ELEMENT = 64, PROTOCOL = 0x77 };
static fuzz_region region;
static bell_page bell;
static T_reader_t r;
static T_writer_t w;
static ring_header *h; /* the writer's side of the header */
static bool honest;    /* since the writer's start, under a new epoch: nothing came but by the core's own writer */
static bool moved;     /* the writer acted during this call */
static uint64_t next_epoch, ended_at[256]; /* by epoch: what was published of it; UINT64_MAX: it goes on */

static uint8_t content(uint64_t epoch, uint64_t number, uint64_t at) {
    return (uint8_t)(epoch * 31 + number * 7 + at * 13 + 1);
}
static void fill(uint64_t number) {
    uint8_t *slot = F_writer_slot(&w, number - w.wc);
    for (uint64_t i = 0; i < w.size; i++)
        slot[i] = content(w.epoch, number, i);
}
static void end_epoch(void) {
    if (w.epoch < 256 && w.epoch != 0)
        ended_at[w.epoch] = w.wc;
}

static void writer_acts(void) {
    static const uint64_t sizes[] = {1, 2, 8, 16, 24, 40, 64, 63}, fields[] = {0, 8, 16, 24, 32, 40, 48, 56};
    uint64_t n, v, size;
    uint8_t what = fuzz_u8(), more = fuzz_u8();
    uint32_t was_armed = fuzz_countdown;
    fuzz_countdown = 0; /* its own accesses are no turns */
    moved = true;
    switch (what % 8) {
    case 0: /* it starts */
        end_epoch();
        size = sizes[more % 8];
        if (region.length < 64 + size)
            size = 1;
        F_writer_init(&w, region.theirs, region.length, size, more & 64 ? PROTOCOL + 1 : PROTOCOL);
        w.bell = more & 128 ? &bell : NULL;
        F_writer_start(&w, next_epoch);
        ended_at[next_epoch++] = UINT64_MAX;
        honest = true;
        break;
    case 1: /* it publishes */
        if (w.epoch == 0 || !honest)
            break;
        for (n = 1 + more % 4; n != 0; n--) {
            F_writer_reserve(&w, 1);
            fill(w.wc);
            F_writer_publish(&w, 1);
        }
        break;
    case 2: /* it publishes many together, or only announces and spoils them */
        if (w.epoch == 0 || !honest)
            break;
        n = 1 + more % w.elements;
        F_writer_reserve(&w, n);
        for (uint64_t k = 0; k < n; k++)
            if (more & 128)
                memset(F_writer_slot(&w, k), 0xee, w.size);
            else
                fill(w.wc + k);
        if (!(more & 128))
            F_writer_publish(&w, n);
        break;
    case 3: /* it stops */
        if (w.epoch != 0) {
            end_epoch();
            F_writer_stop(&w);
        }
        break;
    case 4: /* from here on it does what it likes: a field, */
        honest = false;
        v = fuzz_odd();
        memcpy(region.theirs + fields[more % 8], &v, 8);
        break;
    case 5: /* its counters, by a little or by a lot, together or apart */
        honest = false;
        v = fuzz_odd();
        if (more & 1)
            h->wc += v;
        if (more & 2)
            h->wsc += v;
        if (more & 4)
            h->wc = h->wsc;
        if (more & 8)
            h->wsc += r.elements;
        break;
    case 6: /* a proper header, and counters that are */
        honest = false;
        h->transport = SHMSTREAM_TRANSPORT;
        h->protocol = PROTOCOL;
        h->size = 1 + more % MOST_ELEMENT;
        h->elements = (region.length - 64) / h->size + (fuzz_u8() & 1);
        h->epoch = 300 + fuzz_u8();
        h->wc = h->wsc = fuzz_odd();
        break;
    default: /* the same epoch anew */
        honest = false;
        if (w.epoch != 0)
            F_writer_start(&w, w.epoch);
        else
            memset(region.theirs + 64, more, region.length - 64);
    }
    if (!honest)
        fuzz_no_future(region.theirs, next_epoch);
    fuzz_countdown = was_armed;
}

/* ---- a reader by docs/protocol.md, of what stands still */
typedef struct { enum __pyx_t_8muenfast_5_ring_ring_status status; uint64_t epoch, rc, wc, size, elements, lost, n, slot; } state;
static state now_is(void) {
    state s = {.epoch = r.epoch, .rc = r.rc, .wc = r.wc, .size = r.size, .elements = r.elements};
    return s;
}
static bool back(uint64_t now, uint64_t before) { return now < before && before - now <= UINT64_C(1) << 63; }
static void synchronised(state *s) {
    ring_header c = *h;
    if (c.epoch == 0) {
        s->status = E_INACTIVE;
        s->epoch = 0;
    } else if (c.transport != SHMSTREAM_TRANSPORT || c.protocol == 0 || (r.want_protocol != 0 && c.protocol != r.want_protocol) ||
               c.size == 0 || (r.want_size != 0 && c.size != r.want_size) || c.elements == 0 ||
               (unsigned __int128)c.size * c.elements + 64 > region.length) {
        s->status = E_INCOMPATIBLE_INTERFACE;
        s->epoch = 0;
    } else {
        s->status = E_EPOCH_CHANGED;
        s->epoch = c.epoch;
        s->rc = s->wc = 0;
        s->size = c.size;
        s->elements = c.elements;
    }
}
static void overrun(state *s) {
    if (h->epoch != s->epoch || back(h->wc, s->wc)) {
        synchronised(s);
        return;
    }
    s->status = E_OVERRUN_DETECTED;
    s->lost = h->wc - s->rc;
    s->rc = s->wc = h->wc;
}
static state peeked(void) {
    state s = now_is();
    if (s.epoch == 0 || (s.wc == s.rc && h->epoch != s.epoch)) {
        synchronised(&s);
        return s;
    }
    if (s.wc == s.rc) {
        if (h->wc == s.rc) {
            s.status = E_NO_DATA;
            return s;
        }
        if (back(h->wc, s.wc)) {
            synchronised(&s);
            return s;
        }
        s.wc = h->wc;
        if (s.wc - s.rc > s.elements) {
            overrun(&s);
            return s;
        }
    }
    s.status = E_SUCCESS;
    s.n = s.wc - s.rc;
    if (s.rc != 0 && s.n > -s.rc)
        s.n = -s.rc;
    return s;
}
static state copied(uint64_t most) {
    state s = peeked();
    uint64_t ahead = h->wsc - s.rc;
    if (s.status != E_SUCCESS)
        return s;
    s.n = s.n < most ? s.n : most;
    s.slot = s.rc % s.elements;
    if (h->epoch == s.epoch && ahead <= s.elements && ahead >= s.wc - s.rc && !back(h->wc, s.wc)) {
        s.rc += s.n;
        return s;
    }
    s.n = 0;
    if (h->epoch != s.epoch || back(h->wsc, s.wc))
        synchronised(&s);
    else
        overrun(&s);
    return s;
}
static void compare(const state *s, enum __pyx_t_8muenfast_5_ring_ring_status status, uint64_t n) {
    EXPECT(status == s->status, "result %d, by the protocol it is %d", status, s->status);
    EXPECT(r.epoch == s->epoch, "epoch %llu, not %llu", (unsigned long long)r.epoch, (unsigned long long)s->epoch);
    EXPECT(n == s->n, "%llu elements, not %llu", (unsigned long long)n, (unsigned long long)s->n);
    if (r.epoch != 0)
        EXPECT(r.rc == s->rc && r.size == s->size && r.elements == s->elements, "RC %llu, size %llu, elements %llu",
               (unsigned long long)r.rc, (unsigned long long)r.size, (unsigned long long)r.elements);
    if (status == E_OVERRUN_DETECTED)
        EXPECT(r.lost == s->lost, "lost %llu, not %llu", (unsigned long long)r.lost, (unsigned long long)s->lost);
}

/* ---- */
static void read_some(uint64_t most) {
    static uint8_t got[8 * MOST_BYTES];
    uint64_t n = 0, before_rc, before_epoch = r.epoch, lost = r.lost_total, size;
    enum __pyx_t_8muenfast_5_ring_ring_status status;
    state s = copied(most);
    bool was_honest = honest;
    before_rc = r.rc;
    moved = false;
    memset(got, 0x5a, most * (r.epoch != 0 ? r.size : 0) + 8);
    status = F_reader_copy(&r, got, most, &n);
    size = r.size;
    if (!moved)
        compare(&s, status, n);
    EXPECT(n <= most && (status == E_SUCCESS) == (n != 0), "result %d with %llu elements", status, (unsigned long long)n);
    EXPECT(r.epoch == 0 || (r.elements != 0 && r.size != 0 && r.elements <= (region.length - 64) / r.size &&
                            r.index < r.elements && r.index == r.rc % r.elements), "the geometry is impossible");
    for (int i = 0; i < 8 && r.epoch != 0 && most * size + 8 <= sizeof got; i++)
        EXPECT(status != E_SUCCESS || got[n * size + i] == 0x5a, "written beyond the caller's buffer");
    if (status == E_SUCCESS && !moved) {
        for (uint64_t k = 0; k < n; k++)
            EXPECT(memcmp(got + k * size, region.theirs + 64 + (s.slot + k) % s.elements * size, size) == 0, "another slot");
    }
    if (!was_honest || !honest || r.epoch >= 256)
        return;
    if (status == E_SUCCESS) {
        EXPECT(r.epoch == before_epoch && r.rc == before_rc + n, "the counter went from %llu to %llu",
               (unsigned long long)before_rc, (unsigned long long)r.rc);
        EXPECT(before_rc + n <= (ended_at[r.epoch] == UINT64_MAX ? w.wc : ended_at[r.epoch]), "delivered, but not published");
        for (uint64_t k = 0; k < n; k++)
            for (uint64_t i = 0; i < size; i++)
                EXPECT(got[k * size + i] == content(r.epoch, before_rc + k, i), "element %llu of epoch %llu is torn",
                       (unsigned long long)(before_rc + k), (unsigned long long)r.epoch);
    } else if (status == E_OVERRUN_DETECTED)
        EXPECT(r.epoch == before_epoch && r.rc - before_rc == r.lost_total - lost, "%llu were lost, %llu are missing",
               (unsigned long long)(r.lost_total - lost), (unsigned long long)(r.rc - before_rc));
    else
        EXPECT(status != E_NO_DATA || r.rc == before_rc, "skipped without a word");
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static bool made;
    uint64_t available;
    uint32_t stop;
    state s;
    if (!made) {
        CORE_CONSTANTS
        V_SETTLE_PAUSES = 0;
        fuzz_region_make(&region, MOST_BYTES, PROT_READ);
        made = true;
    }
    fuzz_begin(data, size);
    fuzz_peer = writer_acts;
    uint8_t kind = fuzz_u8();
    fuzz_region_size(&region, 64 + 8 * (1 + kind % 128));
    h = (ring_header *)region.theirs;
    memset(&w, 0, sizeof w);
    memset(&bell, 0, sizeof bell);
    next_epoch = 1;
    honest = true;
    kind = fuzz_u8();
    F_reader_init(&r, region.ours, region.length, kind & 1 ? 16 : 0, kind & 2 ? PROTOCOL : 0);
    r.settle_ns = kind & 4 ? 100000 : 0;
    r.bell = kind & 8 ? &bell : NULL;
    r.may_spin = kind >> 4 & 1;
    for (int turns = 0; fuzz_left() != 0 && turns < 200 && next_epoch < 250; turns++) {
        uint8_t what = fuzz_u8();
        moved = false;
        switch (what >> 4) {
        default:
            writer_acts();
            break;
        case 8: case 9: case 10:
            read_some(1 + what % 8);
            break;
        case 11:
            s = peeked();
            if (what & 1) {
                enum __pyx_t_8muenfast_5_ring_ring_status status = F_reader_peek(&r, &available);
                if (!moved)
                    compare(&s, status, available);
                EXPECT(status != E_SUCCESS || available <= r.elements, "%llu are granted of %llu", (unsigned long long)available,
                       (unsigned long long)r.elements);
                break;
            }
            bool ready = F_reader_ready(&r);
            if (!moved && r.refused == 0)
                EXPECT(ready == (s.status != E_NO_DATA && !(s.status == E_INACTIVE && r.epoch == 0) &&
                                 s.status != E_INCOMPATIBLE_INTERFACE) || s.status == E_INCOMPATIBLE_INTERFACE,
                       "ready is %d before result %d", ready, s.status);
            break;
        case 12:
            F_reader_drain(&r);
            EXPECT(r.epoch == 0 || r.index < r.elements, "drained out of the ring");
            break;
        case 13:
            stop = 0;
            memcpy(&bell.ringer, &h->epoch, 8);
            bell.waiters = what & 1;
            F_reader_wait(&r, 1000 * (uint64_t)fuzz_u8(), &stop);
            break;
        case 14: case 15:
            fuzz_arm();
        }
        fuzz_region_check(&region);
    }
    return 0;
}
