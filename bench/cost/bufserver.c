/* Rows: a block server over a shared buffer. core: _buffer; server.c. */
#define SHARED
#include "server.c"
