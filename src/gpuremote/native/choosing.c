/* Choosing the fastest of several ways to do the same, where that depends on the machine, on what else
   runs there, and on what lies in the caches.

   A single step says little: it finds the caches that the way before it has left behind. So steps go one
   way in runs, and of a run the median of its second half counts. And a rate says little beside one that
   was measured a while ago: by now memory may be twice as busy. So ways are compared by runs that follow
   each other, and what is kept is how many times as fast as the best one each of the others was. */

#include "native.h"
#include "choosing.h"

#define PAUSE_NS 50000000LL /* behind it, the first steps find other caches than the next ones do */
#define MUCH 1.25           /* times as fast that are believed at once */
#define FAR 0.75            /* of the best: is passed over PASSED times before it is tried */
#define PASSED 2
#define CLOSE 0.9           /* of the best: one that is not so close is tried BEHIND times more seldom */
#define BEHIND 3            /* at first */
#define LONG 32             /* runs of the best way for one of another, in the long run */
#define SOON 4              /* trials one after the other, at first and after another way has won */
#define SELDOM 9            /* trials after which there is one in a long while */

static int is_there(const Choice *c, int way)
{
    return c->ways >> way & 1;
}

/* The next one of those that there are, one that was far behind not every time; or the best if there is
   no other. */
static int next_challenger(Choice *c)
{
    for (int k = 1; k <= MOST_WAYS; k++) {
        int way = (c->challenger + k) % MOST_WAYS;
        if (!is_there(c, way) || way == c->best)
            continue;
        if (c->worth[way] < FAR * c->worth[c->best] && c->passed[way] < PASSED) {
            c->passed[way]++;
            continue;
        }
        c->passed[way] = 0;
        return way;
    }
    return c->best;
}

static void begin_run(Choice *c)
{
    c->begun = 1;
    c->done = 0;
    c->steps = c->run;
    c->way = c->best;
    if (c->warms || c->worth[c->best] == 0 || c->rate == 0)
        return; /* there is nothing to compare with */
    for (int way = 0; way < MOST_WAYS; way++)
        if (is_there(c, way) && c->worth[way] == 0) { /* at first each of them, in order */
            c->way = way;
            c->steps = (c->run + 1) / 2; /* a first look, which may mislead */
            c->passed[way] = PASSED;
            c->rest = BEHIND;
            return;
        }
    if (c->rest > 0) {
        c->rest--;
        return;
    }
    c->trials++;
    c->rest = c->trials < SOON ? 1 : c->trials < SELDOM ? 1u << (c->trials - SOON) : LONG;
    c->way = c->challenger = next_challenger(c);
    if (c->worth[c->way] < CLOSE * c->worth[c->best] && c->rest < LONG)
        c->rest *= BEHIND;
}

/* Two runs one after the other: another way was so many times as fast as the best one. Of much more
   than that it may have been the other run that was kept from going on: then the former best wins the
   comparison that comes soon. */
static void compare(Choice *c, int way, double times)
{
    c->worth[way] = (c->worth[way] + c->worth[c->best] * (times < MUCH ? times : MUCH)) / 2;
}

static void end_run(Choice *c, double rate)
{
    int former = c->best, before = c->before;
    double times = c->rate > 0 ? rate / c->rate : 0;
    c->begun = 0;
    c->before = c->way;
    c->rate = rate;
    if (c->warms) { /* not even to be compared with */
        c->warms--;
        c->rate = 0;
        return;
    }
    if (c->worth[c->best] == 0)
        c->worth[c->best] = 1;
    else if (times > 0 && c->worth[c->way] == 0)
        c->worth[c->way] = c->worth[before] * times;
    else if (times > 0 && c->way != before && before == c->best)
        compare(c, c->way, times);
    else if (times > 0 && c->way != before && c->way == c->best)
        compare(c, before, 1 / times);
    for (int way = 0; way < MOST_WAYS; way++)
        if (c->worth[way] > c->worth[c->best])
            c->best = way;
    if (c->best != former) { /* which is given a chance to defend itself */
        c->trials = 0;
        c->rest = 1;
        c->challenger = (former + MOST_WAYS - 1) % MOST_WAYS;
    }
}

void choosing_begin_like(Choice *c, const Choice *others)
{
    if (c->last != 0 || c->ways != others->ways)
        return;
    for (int way = 0; way < MOST_WAYS; way++)
        if (is_there(others, way) && others->worth[way] == 0)
            return;
    memcpy(c->worth, others->worth, sizeof c->worth);
    c->best = others->best;
    c->trials = SOON;
}

int choosing_way(Choice *c)
{
    const long long now = looking_now();
    const int pause = c->last != 0 && now - c->last > PAUSE_NS;
    if (pause && !c->paused) { /* a burst begins; where each step comes after a pause they are alike */
        c->begun = 0;
        c->rate = 0;
        if (c->warms == 0)
            c->warms = c->run > 2; /* else it is so much that caches do not matter */
    }
    c->paused = pause;
    c->last = now;
    if (!c->begun)
        begin_run(c);
    return c->way;
}

void choosing_learn(Choice *c, int way, double rate)
{
    if (way != c->way || !c->begun) /* another thread has ended the run */
        return;
    const int half = c->steps / 2;
    int at = c->done++ - half;
    if (at >= 0) {
        for (; at > 0 && c->rates[at - 1] > rate; at--)
            c->rates[at] = c->rates[at - 1];
        c->rates[at] = rate;
    }
    if (c->done >= c->steps)
        end_run(c, c->rates[(c->steps - half) / 2]);
}
