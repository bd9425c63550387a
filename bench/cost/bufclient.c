/* Rows: a block client over a shared buffer. core: _bufclient, on _client; client.c. */
#define SHARED
#include "client.c"
