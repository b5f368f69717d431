/* The ways to copy flat bytes.

   What is larger than the caches may go past them: it would be out of them by the time somebody reads
   it, and memory that is written around them need not be read first. The C library does so as well, but
   later by far: from some 200 MiB on. Whether that is faster, in which order the lines are best taken,
   and whether a second processor helps, depends on the machine, and on what else runs there: see
   choosing.c. */

#include "native.h"
#include "ways.h"

#include <string.h>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#define PAGE 4096
#define LINE 64

#ifdef __x86_64__
/* One instruction: on some processors it takes memory over line by line without reading it first. */
static void copy_string(char *to, const char *from, size_t size)
{
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size) : : "memory");
}
#endif

#ifdef __SSE2__
static inline void stream_line(char *to, const char *from)
{
    const __m128i *in = (const __m128i *)from;
    __m128i a = _mm_loadu_si128(in), b = _mm_loadu_si128(in + 1);
    __m128i c = _mm_loadu_si128(in + 2), d = _mm_loadu_si128(in + 3);
    __m128i *out = (__m128i *)to;
    _mm_stream_si128(out, a);
    _mm_stream_si128(out + 1, b);
    _mm_stream_si128(out + 2, c);
    _mm_stream_si128(out + 3, d);
}

/* Four pages take turns, a line each: so the memory has four rows open, and the processor fetches
   ahead in four places. On a Xeon page after page takes up to twice as long, and with prefetches that
   leave the caches out (prefetchnta) it did as well. */
#define ABREAST 4

static size_t stream_abreast(char *to, const char *from, size_t size)
{
    size_t done = 0;
    for (; size - done >= ABREAST * PAGE; done += ABREAST * PAGE)
        for (size_t at = done; at < done + PAGE; at += LINE)
            for (size_t page = at; page < at + ABREAST * PAGE; page += PAGE)
                stream_line(to + page, from + page);
    return done;
}

/* One line after the other: on an EPYC that is faster by half. */
static size_t stream_in_order(char *to, const char *from, size_t size)
{
    size_t done = 0;
    for (; size - done >= LINE; done += LINE)
        stream_line(to + done, from + done);
    return done;
}

/* A line per instruction: 10 % more there. */
__attribute__((target("avx512f"))) static size_t stream_wide(char *to, const char *from, size_t size)
{
    size_t done = 0;
    for (; size - done >= 4 * LINE; done += 4 * LINE) {
        __m512i a = _mm512_loadu_si512(from + done), b = _mm512_loadu_si512(from + done + LINE);
        __m512i c = _mm512_loadu_si512(from + done + 2 * LINE);
        __m512i d = _mm512_loadu_si512(from + done + 3 * LINE);
        _mm512_stream_si512((void *)(to + done), a);
        _mm512_stream_si512((void *)(to + done + LINE), b);
        _mm512_stream_si512((void *)(to + done + 2 * LINE), c);
        _mm512_stream_si512((void *)(to + done + 3 * LINE), d);
    }
    return done;
}

static void copy_past_caches(char *to, const char *from, size_t size, int abreast)
{
    size_t done = -(uintptr_t)to & (LINE - 1);
    done = done < size ? done : size;
    memcpy(to, from, done);
    if (abreast)
        done += stream_abreast(to + done, from + done, size - done);
    else if (__builtin_cpu_supports("avx512f"))
        done += stream_wide(to + done, from + done, size - done);
    done += stream_in_order(to + done, from + done, size - done);
    /* Such stores come in any order: what says that they are there must not overtake them. */
    _mm_sfence();
    memcpy(to + done, from + done, size - done);
}
#endif

void copy_one_way(char *to, const char *from, size_t size, int way)
{
    switch (way % WAY_SHARED) {
#ifdef __x86_64__
    case WAY_STRING:
        copy_string(to, from, size);
        break;
#endif
#ifdef __SSE2__
    case WAY_ABREAST:
    case WAY_IN_ORDER:
        copy_past_caches(to, from, size, way % WAY_SHARED == WAY_ABREAST);
        break;
#endif
    default:
        memcpy(to, from, size);
    }
}
