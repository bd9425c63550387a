/* What splitting and merging cost, in one thread's own memory, beside memcpy of the same bytes: nanoseconds of rounds that
 * take turns, one line for each round (bench/packets.py). */
#include <stdio.h>
#include <stdlib.h>

#include "_coalesce.h"
#include "_segment.h"

enum { ROUNDS = 101, TURNS = 20, MOST = 64, SLOT = 1528 };

static uint8_t super[INET_MOST + 64], slots[MOST * SLOT], plain[MOST * SLOT], memory[COALESCE_MEMORY];
static uint8_t *const packet = super + COALESCE_FRONT;
static coalescer c;
static volatile uint64_t sink;

/* A super-packet of so many bytes with its virtio_net_hdr, the checksum as the kernel leaves it. */
static vnet_header make(bool tcp, uint32_t length, uint32_t mtu) {
    vnet_header v = {VNET_NEEDS_CHECKSUM, tcp ? VNET_TCP4 : VNET_UDP, 0, 0, IP4_SIZE, tcp ? TCP_CHECK : UDP_CHECK};
    uint16_t sum;
    uint32_t k;
    for (k = 0; k < length; k++)
        packet[k] = (uint8_t)(k * 2654435761u >> 16);
    memset(packet, 0, 60);
    packet[0] = 0x45;
    put_net16(packet + IP4_LENGTH, length);
    put_net16(packet + IP4_FRAGMENT, IP4_DF);
    packet[IP4_TTL] = 64;
    packet[IP4_PROTOCOL] = tcp ? INET_TCP : INET_UDP;
    put_net32(packet + IP4_SOURCE, 0x0a000001);
    put_net32(packet + IP4_TARGET, 0x0a000002);
    packet[IP4_SIZE + TCP_OFFSET] = 0x80;
    packet[IP4_SIZE + TCP_FLAGS] = TCP_IS_ACK;
    if (!tcp)
        put_net16(packet + IP4_SIZE + UDP_LENGTH, length - IP4_SIZE);
    v.headers = (uint16_t)(IP4_SIZE + (tcp ? 32 : UDP_SIZE));
    v.size = (uint16_t)(mtu - v.headers);
    sum = sum_fold(sum_pseudo4(packet, packet[IP4_PROTOCOL], length - IP4_SIZE));
    memcpy(packet + v.sum_start + v.sum_offset, &sum, 2);
    return v;
}

int main(int argc, char **argv) {
    bool tcp = argc > 1 && strcmp(argv[1], "tcp") == 0;
    uint32_t mtu = argc > 2 ? (uint32_t)atoi(argv[2]) : 1500, length = tcp ? 65535 : IP4_SIZE + UDP_SIZE + 44 * (mtu - 28);
    uint32_t sizes[MOST];
    vnet_header v = make(tcp, length, mtu);
    segmenter s;
    int round, turn, n = segment_begin(&s, &v, packet, length, mtu), k;
    if (n < 1 || n > MOST || mtu > SLOT)
        return 1;
    for (k = 0; k < n; k++)
        sizes[k] = segment_next(&s, slots + k * SLOT);
    coalesce_init(&c, memory, COALESCE_ALL);
    printf("%d packets of %u bytes\n", n, length);
    for (round = 0; round < ROUNDS; round++) {
        uint64_t at[7], sum = 0;
        at[0] = now_ns();
        for (turn = 0; turn < TURNS; turn++) /* into slots, as splitting does */
            for (k = 0; k < n; k++) {
                memcpy(plain + k * SLOT, packet + (size_t)k * v.size, sizes[k]);
                __asm__("" : : : "memory");
            }
        at[1] = now_ns();
        for (turn = 0; turn < TURNS; turn++) {
            segment_begin(&s, &v, packet, length, mtu);
            for (k = 0; k < n; k++)
                segment_next(&s, slots + k * SLOT);
            __asm__("" : : : "memory");
        }
        at[2] = now_ns();
        for (turn = 0; turn < TURNS; turn++) /* out of slots, as merging does */
            for (k = 0; k < n; k++) {
                memcpy(memory + (size_t)k * v.size, slots + k * SLOT, sizes[k]);
                __asm__("" : : : "memory");
            }
        at[3] = now_ns();
        for (turn = 0; turn < TURNS; turn++) {
            const coalesce_ready *r;
            for (k = 0; k < n; k++) {
                if (coalesce_place(&c, slots + k * SLOT, SLOT, 0) != 0)
                    return 2;
                coalesce_commit(&c);
            }
            coalesce_flush(&c);
            while ((r = coalesce_take(&c)) != NULL)
                if (r->segments != (uint32_t)n || r->length != length)
                    return 3;
        }
        at[4] = now_ns();
        for (turn = 0; turn < TURNS; turn++) {
            sum += sum_bytes(packet, length);
            __asm__("" : : : "memory");
        }
        at[5] = now_ns();
        for (turn = 0; turn < TURNS; turn++) {
            memcpy(plain, packet, length);
            __asm__("" : : : "memory");
        }
        at[6] = now_ns();
        sink = sum;
        for (k = 0; k < 6; k++)
            printf("%llu%c", (unsigned long long)((at[k + 1] - at[k]) / TURNS), k < 5 ? ' ' : '\n');
    }
    return 0;
}
