/* What both ends of gpuremote.wire.repeats keep. See repeats.c. */

#ifndef GPUREMOTE_REPEATS_H
#define GPUREMOTE_REPEATS_H

#include "native.h"

#define CALL 64 /* wire.batch.FIRST_PLAN; records below are of a fixed kind */
#define FREE 1  /* wire.batch.Op */
#define FREE_NEAR 24
#define REPEAT 25 /* of wire.repeats */
#define PATCH 26
#define PREFIX 8
#define REPEAT_SIZE 12
#define WORD 4

#define BYTES_KEPT ((size_t)1 << 20)
#define CALLS_KEPT ((size_t)1 << 14)
#define LINKS_KEPT (BYTES_KEPT / 8)
#define LARGEST (BYTES_KEPT / 4)
#define FORMS 65536
#define OPERANDS 4096 /* of a plan, at most */
#define ANCHORS 8192

typedef struct {
    uint32_t size, results, operands;
    uint32_t at[]; /* where in the record the handles lie */
} Form;

typedef struct {
    uint64_t number;
    uint32_t plan, size, results, operands;
    size_t start, link; /* in bytes and links */
} Call;

/* An operand: the result ``result`` of the call that lies ``back`` before (0: none that is kept),
   and whether it is expected to be that again, or the same handle. */
typedef struct {
    uint32_t back;
    uint16_t result;
    uint16_t moves;
} Link;

typedef struct {
    PyObject_HEAD
    uint8_t sizes[CALL]; /* of records of a fixed kind; 0: not taken here */
    Form **forms;
    uint32_t first_form, form_count;
    Call *calls;
    Link *links;
    char *bytes;
    size_t count, byte_count, link_count;
    uint64_t dropped; /* calls before the first that is kept */
    uint32_t back;    /* of the latest REPEAT */
    /* Of the end that sends only: */
    uint32_t pending; /* another way back that the latest call suggests */
    struct {
        uint64_t key, call;
    } *anchors; /* where a call of a plan with that oldest operand came last */
    char fresh; /* what was squeezed last may not go out: the next one begins anew */
    unsigned long long repeated;
} Repeats;

static inline uint64_t handle_at(const char *record, const Form *form, uint32_t operand)
{
    uint64_t handle;
    memcpy(&handle, record + form->at[operand], 8);
    return handle;
}

/* -- history.c -------------------------------------------------------------------------------- */

/* What both ends need; the anchors are made by the one that sends. */
int history_allocate(Repeats *r);
void history_begin_anew(Repeats *r);
/* Drop the older half where there is no room for one more. */
void history_make_room(Repeats *r, size_t size, size_t operands);
/* The call that lies so far back from the next one; NULL if it is not kept. */
const Call *history_back(const Repeats *r, uint64_t back);
/* Write the next call, as ``like`` predicts it, behind the bytes that are kept. */
char *history_predict(const Repeats *r, const Call *like, const Form *form);
/* Keep the call that was predicted last. */
void history_add_predicted(Repeats *r, uint64_t number, const Call *like, const Form *form);
/* Keep a call that was sent. */
void history_add_sent(Repeats *r, uint64_t number, uint32_t plan, const Form *form,
                   const char *record);
const Form *history_form(const Repeats *r, uint32_t plan);
/* Bytes of a record of a fixed kind; 0: it is cut short, or not taken here. */
size_t history_fixed_size(const Repeats *r, uint32_t kind, const char *record, size_t left);
void history_forget_forms(Repeats *r);
/* learn(plan, size, results, offsets): of a plan's record; ``offsets`` are u32, of its handles. */
PyObject *history_learn(PyObject *self, PyObject *args);

#endif
