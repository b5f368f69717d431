/* The ways to copy, see ways.c. */

#ifndef GPUREMOTE_WAYS_H
#define GPUREMOTE_WAYS_H

#include "choosing.h"

enum {
    WAY_PLAIN,    /* the C library's */
    WAY_STRING,   /* one instruction */
    WAY_ABREAST,  /* past the caches, four pages at a time */
    WAY_IN_ORDER, /* past the caches, one line after the other */
    WAY_SHARED,   /* and each of them by several processors */
};

#ifdef __x86_64__
#define WAYS_ALONE (1u << WAY_PLAIN | 1u << WAY_ABREAST | 1u << WAY_IN_ORDER)
#define WAYS_CACHED (WAYS_ALONE | 1u << WAY_STRING)
#define WAY_CACHED WAY_STRING
#else
#define WAYS_ALONE (1u << WAY_PLAIN)
#define WAYS_CACHED WAYS_ALONE
#define WAY_CACHED WAY_PLAIN
#endif
#define WAYS_SHARED (WAYS_ALONE | WAYS_ALONE << WAY_SHARED)

#endif
