/* A module that others call: its functions by name. */
#include "cost.h"

#include CORE_SOURCE

void *UNIT_FUNCTION(const char *name) {
    static bool ready;
    if (!ready) {
        ready = true;
        CORE_CONSTANTS
        CORE_BINDINGS
    }
#define EXPORT(function)                                                                                                    \
    if (strcmp(name, #function) == 0)                                                                                       \
        return (void *)F_##function;
    CORE_EXPORTS
    cost_fail(__FILE__, __LINE__, "there is no %s", name);
}
