/* main() for a target where there is no libFuzzer: replays a corpus, then mutations of it, always the same ones.
 *
 * usage: TARGET [-n EXECUTIONS] [-s SEED] [-t SECONDS] [-o FILE] NAME.corpus|INPUT|FOLDER...
 * Prints how many inputs were run. What fails is left in FILE (failed-input). -t: mutations, of which there are some in any
 * case, end after that time, too. NAME.corpus: inputs one after the other, each behind its length, a little-endian u16.
 */
#include <dirent.h>
#include <sys/stat.h>

#include "fuzz.h"

enum { MOST = 4096, INPUTS = 4096, MUTATIONS = 256 /* between looks at the clock */ };
static struct { uint8_t *data; size_t size; } corpus[INPUTS];
static size_t inputs;
static uint8_t now[MOST];
static size_t now_size;
static const char *failed = "failed-input";
static uint64_t dice_state;

static uint64_t dice(void) { /* splitmix64 */
    uint64_t z = dice_state += UINT64_C(0x9e3779b97f4a7c15);
    z = (z ^ z >> 30) * UINT64_C(0xbf58476d1ce4e5b9);
    z = (z ^ z >> 27) * UINT64_C(0x94d049bb133111eb);
    return z ^ z >> 31;
}

static void on_death(int number) {
    FILE *f = fopen(failed, "wb");
    if (f != NULL) {
        fwrite(now, 1, now_size, f);
        fclose(f);
    }
    fprintf(stderr, "signal %d: the input, %zu bytes, is in %s\n", number, now_size, failed);
    signal(number, SIG_DFL);
    raise(number);
}

static void load(const char *path) {
    struct stat s;
    if (stat(path, &s) != 0) {
        perror(path);
        exit(2);
    }
    if (S_ISDIR(s.st_mode)) {
        struct dirent **list;
        int n = scandir(path, &list, NULL, alphasort);
        for (int i = 0; i < n; i++) {
            char name[4096];
            snprintf(name, sizeof name, "%s/%s", path, list[i]->d_name);
            if (list[i]->d_name[0] != '.')
                load(name);
            free(list[i]);
        }
        if (n >= 0)
            free(list);
        return;
    }
    FILE *f = fopen(path, "rb");
    if (f == NULL || inputs == INPUTS) {
        fprintf(stderr, "%s: %s\n", path, f == NULL ? strerror(errno) : "one input too many");
        exit(2);
    }
    bool packed = strlen(path) > 7 && strcmp(path + strlen(path) - 7, ".corpus") == 0;
    for (uint8_t head[2]; !packed || fread(head, 1, 2, f) == 2;) {
        size_t n = packed ? head[0] + 256u * head[1] : MOST;
        if (n > MOST || inputs == INPUTS) {
            fprintf(stderr, "%s: too much\n", path);
            exit(2);
        }
        corpus[inputs].data = malloc(MOST);
        corpus[inputs].size = fread(corpus[inputs].data, 1, n, f);
        inputs++;
        if (!packed)
            break;
    }
    fclose(f);
}

static void once(const uint8_t *data, size_t size) {
    uint8_t *copy = malloc(size + (size == 0)); /* its end is the end, for a sanitizer */
    memcpy(now, data, size);
    memcpy(copy, data, size);
    now_size = size;
    LLVMFuzzerTestOneInput(copy, size);
    free(copy);
}

static void mutate(void) {
    static uint8_t work[MOST];
    size_t size = 0, from, at, n;
    if (inputs != 0) {
        from = dice() % inputs;
        size = corpus[from].size;
        memcpy(work, corpus[from].data, size);
    }
    for (int turns = 1 + (int)(dice() % 6); turns > 0; turns--) {
        at = size == 0 ? 0 : dice() % size;
        n = 1 + dice() % 8;
        switch (dice() % 7) {
        case 0:
            if (size != 0)
                work[at] ^= (uint8_t)(1 << dice() % 8);
            break;
        case 1:
            if (size != 0)
                work[at] = (uint8_t)dice();
            break;
        case 2: /* something comes in between */
            n = n < MOST - size ? n : MOST - size;
            memmove(work + at + n, work + at, size - at);
            for (size_t i = 0; i < n; i++)
                work[at + i] = (uint8_t)dice();
            size += n;
            break;
        case 3: /* something is left out */
            n = n < size - at ? n : size - at;
            memmove(work + at, work + at + n, size - at - n);
            size -= n;
            break;
        case 4: /* the end of another one */
            if (inputs != 0) {
                from = dice() % inputs;
                n = corpus[from].size == 0 ? 0 : dice() % corpus[from].size;
                size_t rest = corpus[from].size - n;
                rest = rest < MOST - at ? rest : MOST - at;
                memcpy(work + at, corpus[from].data + n, rest);
                size = at + rest;
            }
            break;
        case 5: /* twice */
            n = n * 4 < size - at ? n * 4 : size - at;
            n = n < MOST - size ? n : MOST - size;
            memmove(work + at + n, work + at, size - at);
            size += n;
            break;
        default:
            if (size >= at + 8) {
                uint64_t v = dice() % 2 ? (uint64_t)(int64_t)(int8_t)dice() : UINT64_C(1) << dice() % 64;
                memcpy(work + at, &v, dice() % 2 ? 8 : 4);
            }
        }
    }
    once(work, size);
}

static double seconds(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

int main(int argc, char **argv) {
    static const int deaths[] = {SIGABRT, SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGALRM};
    unsigned long most = 0, done = 0;
    double limit = 0, start;
    for (int option; (option = getopt(argc, argv, "n:s:t:o:")) != -1;)
        switch (option) {
        case 'n': most = strtoul(optarg, NULL, 0); break;
        case 's': dice_state = strtoull(optarg, NULL, 0); break;
        case 't': limit = strtod(optarg, NULL); break;
        case 'o': failed = optarg; break;
        default: return 2;
        }
    for (int i = optind; i < argc; i++)
        load(argv[i]);
    for (size_t i = 0; i < sizeof deaths / sizeof *deaths; i++)
        signal(deaths[i], on_death);
    for (size_t i = 0; i < inputs; i++, done++) {
        alarm(20); /* an input that does not end */
        once(corpus[i].data, corpus[i].size);
    }
    start = seconds();
    for (unsigned long i = 0; i < most; i++, done++) {
        if (i % MUTATIONS == 0) {
            alarm(20);
            if (i != 0 && limit != 0 && seconds() - start >= limit)
                break;
        }
        mutate();
    }
    printf("%lu executions\n", done);
    return 0;
}
