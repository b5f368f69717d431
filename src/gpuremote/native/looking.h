/* When a thread looks for what it waits for, before it sleeps. Twin: transport._looking, which
   says why. */

#ifndef GPUREMOTE_LOOKING_H
#define GPUREMOTE_LOOKING_H

#include <time.h>

#define WITHIN_NS 500000

#define MISSES 3
#define REST_NS 50000000LL

typedef struct {
    char misses; /* looks in vain, one after the other */
    char missed; /* the latest one was */
} Looking;

static inline int looking_due(const Looking *l)
{
    return l->misses < MISSES;
}

static inline long long looking_now(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return 1000000000LL * now.tv_sec + now.tv_nsec;
}

static inline void looking_looked(Looking *l, int found)
{
    l->missed = !found;
    l->misses = found ? 0 : (char)(l->misses + (l->misses < MISSES));
}

static inline void looking_waited(Looking *l, long long ns, int came)
{
    if ((!l->missed && ns < WITHIN_NS) || (came && ns > REST_NS))
        l->misses = 0;
    l->missed = 0;
}

#endif
