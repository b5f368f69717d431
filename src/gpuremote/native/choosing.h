/* Choosing the fastest of several ways to do the same, see choosing.c. */

#ifndef GPUREMOTE_CHOOSING_H
#define GPUREMOTE_CHOOSING_H

#define MOST_WAYS 8
#define MOST_RUN 24

typedef struct {
    int run;       /* steps that go one way, one after the other, up to MOST_RUN */
    unsigned ways; /* a bit for each that there is */
    int warms;     /* runs, from the present one on, of which nothing is learnt */
    int best;      /* the fastest, and at first that to begin with */
    /* Filled in here: */
    double worth[MOST_WAYS]; /* how fast each is, beside the others; 0: not known yet */
    int way, begun, steps, done; /* of the present run: how many there are to be */
    double rates[MOST_RUN]; /* of the present run, in order */
    int before;             /* the way of the run before, and its rate; 0: not known */
    double rate;
    int challenger;
    char passed[MOST_WAYS];  /* how often each was passed over, as it was far behind */
    unsigned trials, rest;   /* since another way won; runs of the best until the next one */
    long long last;          /* when the latest step began */
    int paused;              /* it came after a pause */
} Choice;

/* Nothing is known of these steps yet: what is known of others, that are much like them, will do. */
void choosing_begin_like(Choice *choice, const Choice *others);

/* The way that the next step goes, and how fast it was. Steps of several threads may overlap. */
int choosing_way(Choice *choice);
void choosing_learn(Choice *choice, int way, double rate);

#endif
