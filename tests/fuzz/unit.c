/* A module that another one's target stands on: its functions by name, and its turns those of fuzz.h. */
#define FUZZ_PEER
#define FUZZ_CLOCK
#include "fuzz.h"

#include CORE_SOURCE
#undef memcpy

void *UNIT_FUNCTION(const char *name) {
    static bool ready;
    if (!ready) {
        ready = true;
        CORE_CONSTANTS
        CORE_BINDINGS
#ifdef V_SETTLE_PAUSES
        V_SETTLE_PAUSES = 0; /* what passes meanwhile is turns here */
#endif
    }
#define EXPORT(function)                                                                                                    \
    if (strcmp(name, #function) == 0)                                                                                       \
        return (void *)F_##function;
    CORE_EXPORTS
    fuzz_fail("there is no %s", name);
}
