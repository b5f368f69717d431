/* The calls that went by, and what they say of the next one: the same at both ends. */

#include "repeats.h"

void history_begin_anew(Repeats *r)
{
    r->count = r->byte_count = r->link_count = 0;
    r->dropped = 0;
    r->back = r->pending = 0;
    if (r->anchors != NULL)
        memset(r->anchors, 0, ANCHORS * sizeof *r->anchors);
}

int history_allocate(Repeats *r)
{
    if (r->calls != NULL)
        return 0;
    Link *links = PyMem_Malloc(LINKS_KEPT * sizeof *links);
    char *bytes = PyMem_Malloc(BYTES_KEPT);
    Call *calls = PyMem_Malloc(CALLS_KEPT * sizeof *calls);
    if (links == NULL || bytes == NULL || calls == NULL) {
        PyMem_Free(links);
        PyMem_Free(bytes);
        PyMem_Free(calls);
        PyErr_NoMemory();
        return -1;
    }
    r->links = links;
    r->bytes = bytes;
    r->calls = calls;
    return 0;
}

void history_make_room(Repeats *r, size_t size, size_t operands)
{
    while (r->count == CALLS_KEPT || r->byte_count + size > BYTES_KEPT
           || r->link_count + operands > LINKS_KEPT) {
        const size_t half = (r->count + 1) / 2;
        const size_t start = half < r->count ? r->calls[half].start : r->byte_count;
        const size_t link = half < r->count ? r->calls[half].link : r->link_count;
        memmove(r->bytes, r->bytes + start, r->byte_count - start);
        memmove(r->links, r->links + link, (r->link_count - link) * sizeof *r->links);
        memmove(r->calls, r->calls + half, (r->count - half) * sizeof *r->calls);
        r->byte_count -= start;
        r->link_count -= link;
        r->count -= half;
        r->dropped += half;
        for (size_t k = 0; k < r->count; k++) {
            r->calls[k].start -= start;
            r->calls[k].link -= link;
        }
    }
}

const Call *history_back(const Repeats *r, uint64_t back)
{
    return back > 0 && back <= r->count ? &r->calls[r->count - back] : NULL;
}

/* The call that a handle is a result of. */
static Link origin_of(const Repeats *r, uint64_t handle)
{
    size_t low = 0, high = r->count;
    while (low < high) {
        const size_t middle = (low + high) / 2;
        if (r->calls[middle].number <= handle)
            low = middle + 1;
        else
            high = middle;
    }
    Link link = {0, 0, 0};
    if (low == 0)
        return link;
    const Call *call = &r->calls[low - 1];
    const uint64_t result = handle - call->number;
    if (result < call->results && result <= UINT16_MAX) {
        link.back = (uint32_t)(r->count - (low - 1));
        link.result = (uint16_t)result;
    }
    return link;
}

/* What a link of a call names if it stands for the next call; 0: nothing. */
static uint64_t moved(const Repeats *r, Link link)
{
    const Call *call = history_back(r, link.back);
    return call != NULL && link.result < call->results ? call->number + link.result : 0;
}

char *history_predict(const Repeats *r, const Call *like, const Form *form)
{
    char *record = r->bytes + r->byte_count;
    memcpy(record, r->bytes + like->start, like->size);
    for (uint32_t k = 0; k < like->operands; k++) {
        const Link link = r->links[like->link + k];
        const uint64_t handle = link.moves ? moved(r, link) : 0;
        if (handle)
            memcpy(record + form->at[k], &handle, 8);
    }
    return record;
}

/* Keep one more call, whose bytes and links are there. */
static void keep(Repeats *r, uint64_t number, uint32_t plan, const Form *form)
{
    r->calls[r->count++] = (Call){number,         plan,          form->size,   form->results,
                                  form->operands, r->byte_count, r->link_count};
    r->byte_count += form->size;
    r->link_count += form->operands;
}

void history_add_predicted(Repeats *r, uint64_t number, const Call *like, const Form *form)
{
    const uint32_t plan = like->plan;
    memcpy(r->links + r->link_count, r->links + like->link, like->operands * sizeof *r->links);
    keep(r, number, plan, form);
    r->repeated++;
}

void history_add_sent(Repeats *r, uint64_t number, uint32_t plan, const Form *form,
                   const char *record)
{
    const Call *like = history_back(r, r->back);
    if (like != NULL && like->plan != plan)
        like = NULL;
    for (uint32_t k = 0; k < form->operands; k++) {
        const uint64_t handle = handle_at(record, form, k);
        Link link = origin_of(r, handle);
        link.moves = link.back != 0;
        if (like != NULL) {
            const uint64_t would_be = moved(r, r->links[like->link + k]);
            if (!(would_be && would_be == handle)
                && handle_at(r->bytes + like->start, form, k) == handle)
                link.moves = 0;
        }
        r->links[r->link_count + k] = link;
    }
    memcpy(r->bytes + r->byte_count, record, form->size);
    keep(r, number, plan, form);
}

size_t history_fixed_size(const Repeats *r, uint32_t kind, const char *record, size_t left)
{
    if (kind >= CALL)
        return 0;
    size_t size = r->sizes[kind];
    if (kind == FREE || kind == FREE_NEAR) {
        uint32_t count;
        if (left < 16)
            return 0;
        memcpy(&count, record + 4, 4);
        size = 16 + (size_t)count * (kind == FREE ? 4 : 2);
    }
    return size <= left ? size : 0;
}

const Form *history_form(const Repeats *r, uint32_t plan)
{
    return plan >= r->first_form && plan - r->first_form < r->form_count
               ? r->forms[plan - r->first_form]
               : NULL;
}

void history_forget_forms(Repeats *r)
{
    for (uint32_t k = 0; k < r->form_count; k++)
        PyMem_Free(r->forms[k]);
    r->form_count = r->first_form = 0;
}

PyObject *history_learn(PyObject *self, PyObject *args)
{
    Repeats *r = (Repeats *)self;
    unsigned int plan, size, results;
    Py_buffer at;
    if (!PyArg_ParseTuple(args, "IIIy*", &plan, &size, &results, &at))
        return NULL;
    const uint32_t operands = (uint32_t)(at.len / 4);
    int fits = plan >= CALL && size >= 4 && size <= LARGEST && operands <= OPERANDS;
    for (uint32_t k = 0; fits && k < operands; k++) {
        uint32_t offset;
        memcpy(&offset, (const char *)at.buf + 4 * k, 4);
        fits = offset >= 4 && offset + 8 <= size;
    }
    if (r->form_count == 0)
        r->first_form = plan;
    fits = fits && plan >= r->first_form && plan - r->first_form < FORMS;
    Form *form = fits ? PyMem_Malloc(sizeof *form + operands * sizeof form->at[0]) : NULL;
    if (form != NULL && r->forms == NULL)
        r->forms = PyMem_Calloc(FORMS, sizeof *r->forms);
    if (fits && (form == NULL || r->forms == NULL)) {
        PyMem_Free(form);
        PyBuffer_Release(&at);
        return PyErr_NoMemory();
    }
    if (fits) {
        const uint32_t place = plan - r->first_form;
        *form = (Form){size, results, operands};
        memcpy(form->at, at.buf, operands * sizeof form->at[0]);
        while (r->form_count <= place)
            r->forms[r->form_count++] = NULL;
        PyMem_Free(r->forms[place]);
        r->forms[place] = form;
    }
    PyBuffer_Release(&at);
    Py_RETURN_NONE;
}

