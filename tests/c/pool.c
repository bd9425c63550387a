/* The pool of _aio.h: a disk whose write stands still, and another one. pool ROUNDS prints how often a read of the other one came
 * to its end meanwhile; it gives up on one after a second. pread and pwrite are ours. */
#define MUENFAST_NO_URING
#include <errno.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <unistd.h>

static pthread_mutex_t stands = PTHREAD_MUTEX_INITIALIZER;

static ssize_t held_pwrite(int fd, const void *data, size_t length, off_t at) {
    (void)fd, (void)data, (void)at;
    pthread_mutex_lock(&stands);
    pthread_mutex_unlock(&stands);
    return (ssize_t)length;
}

static ssize_t quick_pread(int fd, void *data, size_t length, off_t at) {
    (void)fd, (void)data, (void)at;
    return (ssize_t)length;
}

#define pwrite held_pwrite
#define pread quick_pread
#include "_aio.h"

static aio_op *ended(aio *a, uint64_t patience) {
    uint64_t end = now_ns() + patience;
    aio_op *op;
    while ((op = aio_take(a)) == NULL && now_ns() < end)
        aio_wait(a, NULL, 0, 1000000);
    return op;
}

int main(int argc, char **argv) {
    static aio a;
    static uint8_t data[2][4096];
    int rounds = argc == 2 ? atoi(argv[1]) : 0, round, good = 0;
    aio_source plain = {NULL, NULL, NULL, NULL};
    aio_open(&a, true, NULL, 0);
    for (round = 0; round < 2; round++)
        aio_add(&a, -1, false, plain);
    for (round = 0; round < rounds; round++) {
        aio_op write = {.data = data[0], .length = 4096, .kind = AIO_WRITE, .file = 0};
        aio_op read = {.data = data[1], .length = 4096, .kind = AIO_READ, .file = 1};
        aio_op warm = read, *first;
        aio_submit(&a, &warm); /* there is a thread, which has nothing to do by now */
        aio_begin(&a);
        if (ended(&a, UINT64_C(20000000000)) != &warm)
            return 1;
        usleep(1000);
        pthread_mutex_lock(&stands);
        aio_submit(&a, &write);
        aio_begin(&a);
        aio_submit(&a, &read); /* before that thread has woken up */
        aio_begin(&a);
        first = ended(&a, UINT64_C(1000000000));
        good += first == &read;
        pthread_mutex_unlock(&stands);
        if (ended(&a, UINT64_C(20000000000)) == NULL || (first == NULL && ended(&a, UINT64_C(20000000000)) == NULL))
            return 1;
    }
    aio_close(&a);
    printf("%d\n", good);
    return 0;
}
