/* A peer that rings: as fast as it can, or nearly, it raises the sequence of a bell, says that somebody sleeps there, and wakes
 * all who do. `ringer BELL...` begins at once, with each in turn, and, at the end of its standard input, prints how many times it
 * rang. Page by docs/protocol.md, not by the package. */
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <unistd.h>

enum { SEQ = 2, WAITERS = 3, AT_ONCE = 256, MOST = 16 };

int main(int argc, char **argv) {
    struct pollfd in = {0, POLLIN, 0};
    unsigned long rings = 0;
    uint32_t *bells[MOST];
    if (argc < 2 || argc > 1 + MOST)
        return 2;
    for (int k = 0; k < argc - 1; k++) {
        int fd = open(argv[1 + k], O_RDWR);
        bells[k] = fd < 0 ? MAP_FAILED : mmap(NULL, 4096, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
        if (bells[k] == MAP_FAILED) {
            perror(argv[1 + k]);
            return 1;
        }
    }
    puts("ready");
    fflush(stdout);
    while (poll(&in, 1, 0) == 0)
        for (int k = 0; k < AT_ONCE; k++, rings++) {
            uint32_t *words = bells[rings % (unsigned)(argc - 1)];
            __atomic_fetch_add(&words[SEQ], 1, __ATOMIC_SEQ_CST);
            __atomic_store_n(&words[WAITERS], 1, __ATOMIC_RELAXED);
            syscall(SYS_futex, &words[SEQ], FUTEX_WAKE, INT_MAX, NULL, NULL, 0);
        }
    printf("%lu\n", rings);
    return 0;
}
