/* fuzz target: what an NBD client sends in the transmission phase. core: attach._nbd
 *
 * The socket is the target's: bytes come in pieces of any size, and are taken in such. Oracles: the target below is asked for
 * nothing outside the disk, with memory of the connection's arena only (a guard page behind it). What came is parsed once more,
 * by doc/proto.md of the NBD project: every request is answered once, with its cookie, error and data; the disk is what a disk of
 * our own comes to. In the end the connection is closed, and all that it had is back. With operations that end late, in any order
 * and with errors, the answers' order and data are nobody's promise, and are not compared.
 */
#include "fuzz.h"

#include <endian.h>

static ssize_t nbd_recvmsg(int fd, struct msghdr *m, int flags);
static ssize_t nbd_sendmsg(int fd, const struct msghdr *m, int flags);
#define recvmsg(fd, m, flags) nbd_recvmsg((fd), (m), (flags))
#define sendmsg(fd, m, flags) nbd_sendmsg((fd), (m), (flags))
#define epoll_ctl(epoll, what, fd, event) 0
#define shutdown(fd, how) (hung_up = true, 0)
#define write(fd, data, n) ((ssize_t)(n))
#define read(fd, data, n) ((ssize_t)(n))
#define close(fd) (closed = true, 0)
#define munmap(at, n) 0
static bool hung_up, closed;

#include CORE_SOURCE
#undef write
#undef read
#undef close
#undef munmap

enum { STREAM = 1 << 16, OUT = 1 << 20, DISK = 1 << 16, WAITING = 64, ASKED = 300 };
static T_disk_t d;
static T_conn_t c;
static T_request_t pool[E_REQUESTS];
static T_piece_t pieces[E_PIECES];
static uint8_t *arena;
static const uint8_t zeros[E_PIECE];
static uint8_t disk[DISK], model[DISK], stream[STREAM], out[OUT];
static uint32_t stream_size, stream_at, out_size, chunk, accept_most, syncs;
static uint32_t most_stream, most_data; /* bytes; fewer where they go in small pieces: a round for each is what takes the time */
static bool late, big, ended;
static T_io_t *waiting[WAITING];
static uint32_t nwaiting;

static struct asked { uint16_t flags, type; uint64_t cookie, offset; uint32_t length, data; int error; bool answered; } asked[ASKED];
static uint32_t nasked;

/* ---- the socket */
FUZZ_QUIET static ssize_t nbd_recvmsg(int fd, struct msghdr *m, int flags) {
    size_t most = chunk, done = 0;
    if (stream_at == stream_size) {
        errno = EAGAIN;
        return ended ? 0 : -1;
    }
    for (size_t k = 0; k < m->msg_iovlen && most != 0 && stream_at < stream_size; k++) {
        size_t n = m->msg_iov[k].iov_len < most ? m->msg_iov[k].iov_len : most;
        n = n < stream_size - stream_at ? n : stream_size - stream_at;
        uint8_t *to = m->msg_iov[k].iov_base;
        EXPECT(to >= arena && n <= E_ARENA && to + n <= arena + E_ARENA, "received outside the arena");
        memcpy(to, stream + stream_at, n);
        stream_at += (uint32_t)n;
        done += n;
        most -= n;
    }
    return (ssize_t)done;
}
FUZZ_QUIET static ssize_t nbd_sendmsg(int fd, const struct msghdr *m, int flags) {
    size_t done = 0;
    if (accept_most == 0) {
        errno = EAGAIN;
        return -1;
    }
    for (size_t k = 0; k < m->msg_iovlen && done < accept_most; k++) {
        size_t n = m->msg_iov[k].iov_len < accept_most - done ? m->msg_iov[k].iov_len : accept_most - done;
        EXPECT(out_size + n <= OUT, "more answers than were asked for");
        memcpy(out + out_size, m->msg_iov[k].iov_base, n);
        out_size += (uint32_t)n;
        done += n;
    }
    return (ssize_t)done;
}

/* ---- the disk below */
FUZZ_QUIET static void execute(T_io_t *io) {
    uint64_t at = io->block * d.block, n = (uint64_t)io->nblocks * d.block;
    io->error = 0;
    for (uint64_t k = at; k < at + n && io->kind != E_IO_SYNC; k += d.block) {
        uint8_t *b = io->buf == NULL ? NULL : io->buf + (k - at);
        if (io->kind == E_IO_READ && k < DISK)
            memcpy(b, disk + k, d.block);
        else if (io->kind == E_IO_READ)
            memset(b, 0, d.block);
        else if (k < DISK && io->kind == E_IO_WRITE)
            memcpy(disk + k, b, d.block);
        else if (k < DISK)
            memset(disk + k, 0, d.block);
        else if (io->kind == E_IO_DISCARD)
            break;
    }
}
static void take_io(void *ctx, T_io_t *io) {
    EXPECT(io->next == NULL && io->done != NULL, "a list");
    if (io->kind == E_IO_SYNC)
        syncs++;
    else {
        EXPECT(io->nblocks != 0 && io->block <= d.size / d.block && io->nblocks <= d.size / d.block - io->block,
               "%u blocks at %llu of %llu", io->nblocks, (unsigned long long)io->block, (unsigned long long)(d.size / d.block));
        EXPECT(io->kind == E_IO_READ || !d.read_only, "a read-only disk is written");
        EXPECT(io->kind == E_IO_READ || io->kind == E_IO_WRITE || d.discards, "a discard");
        uint64_t n = (uint64_t)io->nblocks * d.block;
        if (io->kind == E_IO_READ || (io->kind == E_IO_WRITE && io->buf != zeros))
            EXPECT(io->buf >= arena + E_STAGING && io->buf + n <= arena + E_ARENA && n <= E_PIECE, "memory that is nobody's");
        EXPECT(io->buf != zeros || n <= E_PIECE, "more zeros than there are");
    }
    if (!late || nwaiting == WAITING) {
        execute(io);
        io->done(io);
        return;
    }
    waiting[nwaiting++] = io;
}
static void end_one(uint32_t which, bool fails) {
    T_io_t *io = waiting[which];
    waiting[which] = waiting[--nwaiting];
    execute(io);
    if (fails)
        io->error = -EIO;
    io->done(io);
}

/* ---- what comes, by the protocol */
static int refused(const struct asked *a) {
    bool data = a->type == 0 || a->type == 1;
    uint16_t allowed = 1; /* FUA */
    if (a->type == 0 && c.structured)
        allowed |= 4;
    if (a->type == 6)
        allowed |= 2 | 16;
    if (a->type > 6 || a->type == 5 || a->type == 2 || (a->flags & ~allowed))
        return EINVAL;
    if (a->type == 3)
        return a->offset != 0 || a->length != 0 ? EINVAL : 0;
    if (a->type != 0 && d.read_only)
        return EPERM;
    if (a->type == 4 && !d.discards)
        return EINVAL;
    if (data && a->length > 33554432)
        return EINVAL;
    if ((unsigned __int128)a->offset + a->length > d.size)
        return a->type == 1 || a->type == 6 ? ENOSPC : EINVAL;
    if (a->type == 6 && a->flags & 16 && (!d.clears || a->flags & 2))
        return EOPNOTSUPP;
    return 0;
}
FUZZ_QUIET static uint64_t be(const uint8_t *p, int n) {
    uint64_t v = 0;
    while (n-- > 0)
        v = v << 8 | *p++;
    return v;
}
static int parse(void) { /* 0: well, 1: a wrong magic, 2: cut */
    uint32_t at = 0;
    uint64_t data = 0;
    nasked = 0;
    while (stream_size - at >= 28) {
        const uint8_t *p = stream + at;
        struct asked *a = &asked[nasked];
        if (be(p, 4) != 0x25609513)
            return 1;
        *a = (struct asked){(uint16_t)be(p + 4, 2), (uint16_t)be(p + 6, 2), be(p + 8, 8), be(p + 16, 8), (uint32_t)be(p + 24, 4), at + 28};
        if (a->type == 2)
            return 0;
        a->error = refused(a);
        data += a->type == 0 && a->error == 0 ? a->length : 0;
        if (data > most_data) { /* more than is worth the time: the stream ends before */
            stream_size = at;
            return 0;
        }
        at += 28;
        if (a->type == 1 && a->length != 0) {
            if (stream_size - at < a->length)
                return 2;
            at += a->length;
        }
        if (++nasked == ASKED)
            fuzz_fail("too many requests for this target");
    }
    return at != stream_size ? 2 : 0;
}
static void request(uint16_t flags, uint16_t type, uint64_t offset, uint32_t length, uint32_t number) {
    uint8_t *p = stream + stream_size;
    uint32_t payload = type == 1 ? length : 0;
    if (stream_size + 28 > most_stream)
        return;
    p = put32(p, 0x25609513);
    p = put16(p, flags);
    p = put16(p, type);
    p = put64(p, UINT64_C(0x7700000000) + number);
    p = put64(p, offset);
    put32(p, length);
    stream_size += 28;
    payload = payload < most_stream - stream_size ? payload : most_stream - stream_size;
    payload = payload < 20000 ? payload : 20000;
    memset(stream + stream_size, (int)(0x31 + number * 7), payload);
    stream_size += payload;
}
static void make_stream(void) {
    static const uint16_t types[] = {0, 1, 1, 0, 3, 4, 6, 6};
    stream_size = 0;
    for (uint32_t number = 0; fuzz_left() != 0 && number < 40; number++) {
        uint8_t what = fuzz_u8(), more = fuzz_u8();
        uint64_t offset = (uint64_t)fuzz_u16() * (more & 1 ? 1 : d.block) % (big ? DISK : d.size);
        uint32_t length = (uint32_t)fuzz_u16() % 6000;
        uint16_t flags = 0, type = types[what & 7];
        if (more & 2)
            length = length / d.block * d.block;
        if (more & 4)
            flags = (uint16_t)(1 << (what >> 3 & 7));
        if (more & 8)
            offset = fuzz_odd();
        if (more & 16)
            offset = d.size - fuzz_u8();
        if ((more & 0x60) == 0x60)
            length = type == 0 && big ? 33554433 + fuzz_u16() : (uint32_t)fuzz_odd();
        if (type == 0 && length > 200000 && length <= 33554432 && big)
            length = 200000; /* time */
        if (type == 3 && !(more & 8))
            offset = length = 0;
        if ((what >> 6) == 3)
            type = what & 32 ? fuzz_u8() : type;
        request(flags, type, offset, length, number);
        if (more & 128 && (what & 32) && stream_size != 0) /* another byte somewhere in its end */
            stream[stream_size - 1 - fuzz_u8() % (stream_size < 40 ? stream_size : 40)] ^= (uint8_t)(1 << (fuzz_u8() & 7));
    }
    if (stream_size > 30 && (fuzz_u8() & 3) == 3)
        stream_size -= fuzz_u8() % 30;
}

/* ---- what went out */
static uint32_t code_of(const struct asked *a) {
    static const uint32_t codes[][2] = {{EINVAL, 22}, {EPERM, 1}, {ENOSPC, 28}, {EOPNOTSUPP, 95}};
    for (size_t i = 0; i < sizeof codes / sizeof *codes; i++)
        if (a->error == (int)codes[i][0])
            return codes[i][1];
    return 0;
}
FUZZ_QUIET static void answers(void) {
    uint32_t at = 0, next = 0, count = 0, want_syncs = 0;
    for (uint32_t k = 0; k < nasked && late; k++)
        for (uint32_t other = 0; other < k; other++)
            if (asked[k].cookie == asked[other].cookie)
                return; /* which answer is whose is not to be told then */
    while (at < out_size) {
        uint32_t magic = (uint32_t)be(out + at, 4), error, length, head, k;
        uint64_t cookie;
        const uint8_t *data = NULL;
        EXPECT(out_size - at >= 16, "an answer is cut short");
        if (magic == 0x67446698) {
            error = (uint32_t)be(out + at + 4, 4);
            cookie = be(out + at + 8, 8);
            head = 16;
            length = 0;
        } else {
            uint16_t type = (uint16_t)be(out + at + 6, 2);
            EXPECT(magic == 0x668e33ef && c.structured && out_size - at >= 20 && be(out + at + 4, 2) == 1, "no answer begins with %08x", magic);
            cookie = be(out + at + 8, 8);
            length = (uint32_t)be(out + at + 16, 4);
            EXPECT(out_size - at - 20 >= length, "an answer is cut short");
            head = 20 + length;
            error = 0;
            if (type & 0x8000) {
                EXPECT(type == 0x8001 && length >= 6 && be(out + at + 24, 2) == length - 6, "an error's text");
                error = (uint32_t)be(out + at + 20, 4);
                EXPECT(error != 0, "an error of 0");
            } else {
                EXPECT(type == (length ? 1 : 0) && length != 8, "type %u with %u bytes", type, length);
                data = out + at + 28;
                length = length ? length - 8 : 0;
            }
        }
        for (k = late ? 0 : next; k < nasked; k++)
            if (!asked[k].answered && asked[k].cookie == cookie &&
                (!late || error == code_of(&asked[k]) || (code_of(&asked[k]) == 0 && error == 5)))
                break;
            else
                EXPECT(late, "request %u has no answer, the next one has", k);
        EXPECT(k < nasked, "an answer to nobody, or a second one");
        struct asked *a = &asked[k];
        a->answered = true;
        next = k + 1;
        count++;
        uint32_t want = code_of(a);
        EXPECT(error == want || (late && want == 0 && error == 5), "request %u (type %u, %u bytes at %llu): error %u, not %u", k, a->type, a->length,
               (unsigned long long)a->offset, error, want);
        if (magic == 0x67446698) {
            EXPECT(!c.structured || (a->type != 0 && error == 0), "a simple answer");
            if (a->type == 0 && error == 0) {
                data = out + at + 16;
                length = a->length;
                head += length;
                EXPECT(out_size - at >= head, "an answer is cut short");
            }
        } else if (error == 0) {
            EXPECT(a->type == 0 && length == a->length && (length == 0 || be(out + at + 20, 8) == a->offset), "another range");
        }
        at += head;
        if (error != 0 || (a->length == 0 && a->type != 3))
            continue;
        if (a->type == 3 || (a->type != 0 && a->flags & 1))
            want_syncs++;
        if (late)
            continue;
        uint64_t from = a->offset, to = a->offset + a->length;
        if (a->type == 4 || a->type == 6) {
            if (a->type == 4) {
                from = (from + d.block - 1) / d.block * d.block;
                to = to / d.block * d.block;
            }
            if (from < to && from < DISK)
                memset(model + from, 0, (to < DISK ? to : DISK) - from);
        } else if (a->type == 1) {
            memcpy(model + (from < DISK ? from : DISK), stream + a->data, from >= DISK ? 0 : a->length < DISK - from ? a->length : DISK - from);
        } else if (a->type == 0)
            for (uint64_t i = 0; i < length; i++)
                EXPECT(data[i] == (from + i < DISK ? model[from + i] : 0), "byte %llu is not what was written", (unsigned long long)(from + i));
    }
    EXPECT(count == nasked, "%u of %u requests have answers", count, nasked);
    EXPECT(late ? syncs >= want_syncs : syncs == want_syncs, "%u syncs, not %u", syncs, want_syncs);
    if (!late)
        EXPECT(memcmp(disk, model, d.size < DISK ? d.size : DISK) == 0, "the disk is not what was written");
}

static void turn(void) {
    T_request_t *sent;
    if (c.blocked && accept_most != 0) {
        sent = F_transmit(&c);
        F_release(sent);
    }
    if (c.reading && !closed)
        F_serve(&c);
    if (d.woken)
        F_look_at_kicked(&d);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    if (arena == NULL) {
        arena = mmap(NULL, E_ARENA + 4096, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
        if (arena == MAP_FAILED || mprotect(arena, E_ARENA, PROT_READ | PROT_WRITE) != 0)
            fuzz_fail("no memory");
        pthread_mutex_init(&d.lock, NULL);
        pthread_mutex_init(&c.tx_lock, NULL);
    }
    fuzz_begin(data, size);
    uint8_t kind = fuzz_u8(), sizes = fuzz_u8();
    pthread_mutex_t locks[2] = {d.lock, c.tx_lock};
    memset(&d, 0, sizeof d);
    memset(&c, 0, sizeof c);
    d.lock = locks[0];
    c.tx_lock = locks[1];
    d.submit = (T_submit_fn)take_io;
    d.block = kind & 1 ? 4096 : 512;
    big = kind & 2;
    d.size = big ? 64 << 20 : d.block * (1 + sizes % 15u);
    d.read_only = (kind & 0x1c) == 0x1c;
    d.discards = kind >> 3 & 1;
    d.clears = d.discards && kind & 4;
    d.zeros = (uint8_t *)zeros;
    d.limit = 1;
    d.conns = &c;
    d.connections = 1;
    d.epoll = d.wake = d.noted_event = 7;
    c.disk = &d;
    c.fd = 9;
    c.structured = kind >> 5 & 1;
    c.arena = c.staging = arena;
    c.requests = pool;
    c.pieces = pieces;
    c.reading = c.listed = c.used = 1;
    late = kind >> 6 & 1;
    nwaiting = out_size = stream_at = syncs = 0;
    closed = hung_up = ended = false;
    for (uint32_t k = 0; k < DISK; k += 512)
        memset(disk + k, (int)(k / 512 + 3), 512);
    memcpy(model, disk, DISK);
    chunk = sizes & 128 ? 1 + sizes % 64 : 70000;
    most_stream = sizes & 128 ? 4096 : STREAM;
    most_data = kind & 128 ? 8192 : OUT - (64 << 10);
    accept_most = 300000;
    make_stream();
    int how = parse();
    for (uint32_t turns = 0; turns < 3000 && stream_at < stream_size && !closed && c.state != E_STATE_ENDED; turns++) {
        uint32_t dice = turns * 2654435761u ^ ((uint32_t)kind << 8 | sizes) * 40503u;
        accept_most = !(kind & 128) ? 300000 : dice >> 8 & 1 ? 0 : 1 + (dice >> 9) % 100;
        turn();
        while (nwaiting > (dice >> 16) % 8)
            end_one((dice >> 20) % nwaiting, (dice >> 28) == 7);
    }
    accept_most = 300000;
    ended = true;
    for (int turns = 0; turns < 2000 && !closed; turns++) {
        turn();
        while (nwaiting != 0)
            end_one(nwaiting / 2, false);
    }
    EXPECT(closed && d.connections == 0, "the connection is not closed: state %u, %u requests are out", c.state, c.active);
    EXPECT(c.active == 0 && c.spare_pieces == c.fresh_pieces, "%u requests are out, %u of %u pieces are back", c.active, c.spare_pieces,
           c.fresh_pieces);
    EXPECT(d.active == NULL && d.waiting == NULL && d.partials == 0, "a range is still taken");
    EXPECT(d.violations == (how == 1) && d.cut == (how == 2), "%llu violations and %llu cut, the stream ends with %d",
           (unsigned long long)d.violations, (unsigned long long)d.cut, how);
    answers();
    return 0;
}
