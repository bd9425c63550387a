/* fuzz target: the client over a shared buffer, whose server is anybody. core: _bufclient, on _client and _ring; client.c. */
#define SHARED
#include "client.c"
