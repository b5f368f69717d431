/* Ways to copy, see ways.c. */

#ifndef GPUREMOTE_WAYS_H
#define GPUREMOTE_WAYS_H

enum {
    WAY_PLAIN,    /* the C library's */
    WAY_STRING,   /* one instruction */
    WAY_ABREAST,  /* past the caches, four pages at a time */
    WAY_IN_ORDER, /* past the caches, one line after the other */
    WAY_SHARED,   /* and each of them by several processors */
    WAYS = 2 * WAY_SHARED,
};

/* What is known of each way for copies of about one size: bytes per nanosecond. Copies go one way in
   runs, as a single one finds the caches of the way before it. */
#define MOST_RUN 24
typedef struct {
    int run;           /* copies, up to MOST_RUN */
    int alone, cached, shared; /* which ways there are: by one processor, also one instruction; by several */
    double rates[WAYS];
    int way, begun, done; /* of the present run: which way, whether there is one, how many have ended */
    double latest[MOST_RUN];
    unsigned runs, trials, rest; /* all, those of another way than the best, those until the next one */
} Ways;

/* The way that the next copy goes; and how fast it was. */
int ways_choose(Ways *ways);
void ways_learn(Ways *ways, int way, double rate);

#endif
