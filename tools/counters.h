/* Included before everything else in a build for `make coverage` (setup.py): gcov's counters of a module lie in a file that all
 * processes map, so that nobody has to write them out in the end. What ends by os._exit or kill -9, has no right to write a
 * file any more, or is forked counts as anybody else does. counters.ld puts them on pages of their own; they are incremented
 * atomically. Where the file cannot be had, a process counts for itself, and that is lost. */
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

extern char muenfast_counters[] __attribute__((visibility("hidden")));
extern char muenfast_counters_end[] __attribute__((visibility("hidden")));
void __real___gcov_exit(void);
void __wrap___gcov_exit(void) __attribute__((visibility("hidden")));

/* Writes a .gcda file, of what is in the shared counters: for one process, when everybody else is done. */
__attribute__((no_profile_instrument_function)) void __wrap___gcov_exit(void)
{
    if (getenv("MUENFAST_COUNTERS_DUMP"))
        __real___gcov_exit();
}

__attribute__((constructor, no_profile_instrument_function)) static void muenfast_counters_map(void)
{
    const char *file = strrchr("/" __BASE_FILE__, '/');
    size_t length = (size_t)(muenfast_counters_end - muenfast_counters);
    char path[sizeof MUENFAST_COUNTERS + sizeof __BASE_FILE__ + 1] = MUENFAST_COUNTERS;
    int fd = open(strcat(path, file), O_RDWR | O_CREAT | O_CLOEXEC, 0666);
    if (fd < 0)
        return;
    (void)fchmod(fd, 0666);     /* the owner's; others may not, and need not */
    if (!ftruncate(fd, (off_t)length) &&
        mmap(muenfast_counters, length, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, 0) == MAP_FAILED)
        abort();                /* MAP_FIXED may have taken away what was there */
    close(fd);
}
