/* A stand-in for libcuda.so.1 on ordinary memory, for tests of what is asked of the driver.
 *
 * It copies for real, keeps a record of every call, and is told through fake_set() how to behave. Where the
 * real driver is strict, so is it: the legacy NULL stream, zero-size entries, a batch under graph capture
 * and an entry across two registered ranges are refused, with the codes that the real one gives.
 * Copies run at once, or, after fake_defer(), when whoever was told of them calls fake_run().
 */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

typedef unsigned long long u64;
enum { SUCCESS = 0, INVALID_VALUE = 1, NOT_FOUND = 500, CAPTURE_UNSUPPORTED = 900 };

typedef struct { int type; int id; } location;
typedef struct { int order; location src, dst; unsigned flags; } attributes;

enum { CALL_BATCH = 1, CALL_SINGLE = 2, CALL_BATCH_CUDA13 = 3 };
typedef struct { u64 kind, stream, count, order, attribute_count, attribute_index, flags, nbytes; } call_record;
typedef struct { u64 start, size, shift; } host_range;

static struct { const char *key; long long value; } settings[] = {
    {"version", 13000},     /* what cuDriverGetVersion says */
    {"init", 0},            /* what cuInit returns */
    {"capturing", 0},       /* status of every stream */
    {"fail_call", 0},       /* the n-th copy call, from 1, fails ... */
    {"fail_code", 0},       /* ... with this code ... */
    {"fail_entry", -1},     /* ... blaming this entry */
    {"host_pointers", 1},   /* CAN_USE_HOST_POINTER_FOR_REGISTERED_MEM */
    {"status_code", 0},     /* what cuStreamIsCapturing returns */
};
enum { SETTINGS = sizeof settings / sizeof settings[0], MAX_CALLS = 16384, MAX_RANGES = 4096 };
static long long defaults[SETTINGS];
static call_record calls[MAX_CALLS];
static host_range ranges[MAX_RANGES];
static int call_count, range_count, started;

static long long *setting(const char *key) {
    for (int i = 0; i < SETTINGS; i++)
        if (!strcmp(settings[i].key, key)) return &settings[i].value;
    return NULL;
}

/* Copies that were enqueued: the arrays are read by then, the memory they name is not. */
typedef struct { size_t count; u64 *dsts, *srcs; size_t *sizes; } copies;
typedef int (*defer_function)(u64 stream, copies *work);
static defer_function defer;

/* From now on each call's copies go to `function`; what it returns is what the call returns. NULL: at once. */
void fake_defer(defer_function function) { defer = function; }

/* Back to a fresh driver: default settings, no registered memory, nothing recorded. */
void fake_reset(void) {
    for (int i = 0; i < SETTINGS; i++) {
        if (!started) defaults[i] = settings[i].value;
        settings[i].value = defaults[i];
    }
    started = 1;
    call_count = range_count = 0;
}

int fake_set(const char *key, long long value) {
    long long *place = setting(key);
    if (!place) return 1;
    *place = value;
    return 0;
}

/* Host memory that CUDA knows, `shift` bytes further for the GPU. */
void fake_register(u64 start, u64 size, u64 shift) {
    host_range r = {start, size, shift};
    if (range_count < MAX_RANGES) ranges[range_count++] = r;
}

int fake_call_count(void) { return call_count; }
const call_record *fake_calls(void) { return calls; }

/* Where a destination is in this process: inside one registered range as the GPU sees it, or nowhere. */
static void *destination(u64 dst, size_t size) {
    if (!range_count) return (void *)dst; /* a test that does not care */
    for (int i = 0; i < range_count; i++) {
        u64 start = ranges[i].start + ranges[i].shift;
        if (dst >= start && dst + size <= start + ranges[i].size) return (void *)(dst - ranges[i].shift);
    }
    return NULL;
}

static int record(u64 kind, void *stream, const size_t *sizes, size_t count, const attributes *attrs,
                  const size_t *indices, size_t attribute_count) {
    call_record r = {kind, (u64)stream, count, 0, attribute_count, 0, 0, 0};
    for (size_t i = 0; i < count; i++) r.nbytes += sizes[i];
    if (attrs) r.order = attrs->order, r.flags = attrs->flags, r.attribute_index = indices[0];
    if (call_count < MAX_CALLS) calls[call_count] = r;
    return ++call_count;
}

/* Run deferred copies and forget them. */
void fake_run(copies *work) {
    for (size_t i = 0; i < work->count; i++)
        memcpy(destination(work->dsts[i], work->sizes[i]), (void *)work->srcs[i], work->sizes[i]);
    free(work->dsts);
    free(work);
}

/* The destinations are checked. */
static int enqueue(u64 *dsts, u64 *srcs, size_t *sizes, size_t count, void *stream) {
    copies *work = malloc(sizeof *work);
    u64 *memory = malloc(3 * count * sizeof *memory);
    *work = (copies){count, memory, memory + count, (size_t *)(memory + 2 * count)};
    memcpy(work->dsts, dsts, count * sizeof *dsts);
    memcpy(work->srcs, srcs, count * sizeof *srcs);
    memcpy(work->sizes, sizes, count * sizeof *sizes);
    if (defer) return defer((u64)stream, work);
    fake_run(work);
    return SUCCESS;
}

static int batch(u64 kind, u64 *dsts, u64 *srcs, size_t *sizes, size_t count, attributes *attrs,
                 size_t *indices, size_t attribute_count, size_t *failed, void *stream) {
    int nth = record(kind, stream, sizes, count, attrs, indices, attribute_count);
    if ((u64)stream <= 1 || !count || attribute_count < 1 || indices[0] != 0) return INVALID_VALUE;
    if (attrs->order < 1 || attrs->order > 3) return INVALID_VALUE;
    if (*setting("capturing")) return CAPTURE_UNSUPPORTED;
    if (nth == *setting("fail_call")) {
        if (*setting("fail_entry") >= 0) *failed = *setting("fail_entry");
        return *setting("fail_code");
    }
    for (size_t i = 0; i < count; i++)
        if (!sizes[i] || !destination(dsts[i], sizes[i])) {
            *failed = i;
            return INVALID_VALUE;
        }
    return enqueue(dsts, srcs, sizes, count, stream);
}

int cuMemcpyBatchAsync(u64 *dsts, u64 *srcs, size_t *sizes, size_t count, attributes *attrs,
                       size_t *indices, size_t attribute_count, size_t *failed, void *stream) {
    return batch(CALL_BATCH, dsts, srcs, sizes, count, attrs, indices, attribute_count, failed, stream);
}

/* CUDA 13's own form has no failed index: the stream comes where the index pointer was. */
int cuMemcpyBatchAsync_v2(u64 *dsts, u64 *srcs, size_t *sizes, size_t count, attributes *attrs,
                          size_t *indices, size_t attribute_count, void *stream) {
    size_t failed;
    return batch(CALL_BATCH_CUDA13, dsts, srcs, sizes, count, attrs, indices, attribute_count, &failed, stream);
}

int cuMemcpyAsync(u64 dst, u64 src, size_t size, void *stream) {
    int nth = record(CALL_SINGLE, stream, &size, 1, NULL, NULL, 0);
    if (nth == *setting("fail_call")) return *setting("fail_code");
    if (!destination(dst, size)) return INVALID_VALUE;
    return enqueue(&dst, &src, &size, 1, stream);
}

/* Streams are numbers; their priorities are kept for a look at them. */
static int priorities[MAX_CALLS], stream_count;
int fake_stream_count(void) { return stream_count; }
int fake_stream_priority(int nth) { return priorities[nth]; }

int cuStreamCreateWithPriority(u64 *stream, unsigned flags, int priority) {
    if (flags != 1) return INVALID_VALUE; /* the NULL stream would wait for it */
    if (stream_count < MAX_CALLS) priorities[stream_count] = priority;
    *stream = 0x900000000 + 16 * stream_count++;
    return SUCCESS;
}

int cuStreamIsCapturing(void *stream, int *status) {
    *status = *setting("capturing");
    return *setting("status_code");
}

int cuPointerGetAttribute(void *data, int attribute, u64 pointer) {
    for (int i = 0; i < range_count; i++)
        if (attribute == 2 && pointer >= ranges[i].start && pointer < ranges[i].start + ranges[i].size) {
            *(unsigned *)data = 1; /* CU_MEMORYTYPE_HOST */
            return SUCCESS;
        }
    return INVALID_VALUE; /* pageable: CUDA never heard of it */
}

int cuMemHostGetDevicePointer_v2(u64 *result, void *pointer, unsigned flags) {
    for (int i = 0; i < range_count; i++)
        if (ranges[i].start == (u64)pointer) {
            *result = ranges[i].start + ranges[i].shift;
            return SUCCESS;
        }
    return INVALID_VALUE;
}

int cuDeviceGet(int *device, int ordinal) {
    *device = ordinal;
    return SUCCESS;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 91 ? *setting("host_pointers") : 0;
    return SUCCESS;
}

int cuInit(unsigned flags) { return *setting("init"); }

int cuDriverGetVersion(int *version) {
    *version = *setting("version");
    return SUCCESS;
}

int cuGetProcAddress_v2(const char *symbol, void **function, int version, u64 flags, int *status);

int cuGetProcAddress(const char *symbol, void **function, int version, u64 flags) {
    return cuGetProcAddress_v2(symbol, function, version, flags, NULL);
}

/* Each function with the versions that it serves; the real driver picks by the version asked for too. */
static const struct { const char *name; int from, below; void *function; } table[] = {
    {"cuMemcpyBatchAsync", 12080, 13000, cuMemcpyBatchAsync},
    {"cuMemcpyBatchAsync", 13000, 99999, cuMemcpyBatchAsync_v2},
    {"cuMemcpyAsync", 4000, 99999, cuMemcpyAsync},
    {"cuStreamCreateWithPriority", 5050, 99999, cuStreamCreateWithPriority},
    {"cuStreamIsCapturing", 10000, 99999, cuStreamIsCapturing},
    {"cuPointerGetAttribute", 4000, 99999, cuPointerGetAttribute},
    {"cuMemHostGetDevicePointer", 3020, 99999, cuMemHostGetDevicePointer_v2},
    {"cuDeviceGet", 2000, 99999, cuDeviceGet},
    {"cuDeviceGetAttribute", 2000, 99999, cuDeviceGetAttribute},
    {"cuInit", 2000, 99999, cuInit},
    {"cuDriverGetVersion", 2020, 99999, cuDriverGetVersion},
    {"cuGetProcAddress", 11030, 12000, cuGetProcAddress},
    {"cuGetProcAddress", 12000, 99999, cuGetProcAddress_v2},
};

int cuGetProcAddress_v2(const char *symbol, void **function, int version, u64 flags, int *status) {
    *function = NULL;
    if (status) *status = 1; /* symbol not found */
    for (size_t i = 0; i < sizeof table / sizeof table[0]; i++) {
        if (strcmp(table[i].name, symbol)) continue;
        if (version < table[i].from) {
            if (status && !*function) *status = 2; /* version not sufficient */
        } else if (version < table[i].below) {
            *function = table[i].function;
            if (status) *status = 0;
        }
    }
    return *function ? SUCCESS : NOT_FOUND;
}
