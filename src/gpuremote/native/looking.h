/* When a thread looks for what it waits for, before it sleeps. Twin: transport._looking, which
   says why. */

#ifndef GPUREMOTE_LOOKING_H
#define GPUREMOTE_LOOKING_H

#include <time.h>

#define WITHIN_NS 500000

typedef struct {
    char slow; /* what comes takes longer than looking may */
    char missed;
} Looking;

static inline long long looking_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1000000000LL * now.tv_sec + now.tv_nsec;
}

static inline void looking_looked(Looking *l, int found)
{
    l->missed = l->slow = !found;
}

static inline void looking_waited(Looking *l, long long ns)
{
    if (!l->missed && ns < WITHIN_NS)
        l->slow = 0;
    l->missed = 0;
}

#endif
