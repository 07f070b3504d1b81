/* A stand-in for NVIDIA's driver, libcuda.so.1, where there is no GPU. Its memory is the host's.

   With -DHEADER='"cuda.h"' the compiler compares each function with the real declaration. What is queued on a stream runs
   when the stream is synchronised, so what is read too early is wrong. Functions refuse what the driver refuses: any
   work without a current context, and waiting while a graph is recorded. */
#include <stddef.h>
#include <stdlib.h>
#include <string.h>

#ifdef HEADER
#include HEADER
#else
typedef int CUresult, CUdevice, CUdevice_attribute, CUstreamCaptureMode;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUgraph_st *CUgraph;
typedef struct CUgraphExec_st *CUgraphExec;
#endif

enum { OK, INVALID_VALUE = 1, NO_MEMORY = 2, NO_CONTEXT = 201, CAPTURING = 900, INVALIDATED = 901 };
enum { CONTEXTS, CURRENT, STREAMS, GRAPHS, DEVICE_BLOCKS, DEVICE_BYTES, HOST_BLOCKS, LAUNCHES, KINDS };
#define TOTAL 1000000000UL

typedef struct { void *to; const void *from; size_t size; void (*kernel)(void); } Operation;
typedef struct { Operation operations[64]; int count; } List;
struct CUctx_st { int none; };
struct CUstream_st { List queue, recorded; int recording, broken; };
struct CUgraph_st { List list; };
struct CUgraphExec_st { List list; };

static struct CUctx_st primary;
static __thread int depth;
static long held[KINDS];
static size_t limit = TOTAL;
static int failed;

long stand_in_held(int kind) { return kind == CURRENT ? depth : held[kind]; }
void stand_in_limit(size_t bytes) { limit = bytes ? bytes : TOTAL; }
void stand_in_fail(int code) { failed = code; }
int stand_in_recording(CUstream stream) { return stream->recording; }
void stand_in_break(CUstream stream) { stream->broken = 1; }

static CUresult queue(CUstream stream, Operation operation) {
    if (!depth) return NO_CONTEXT;
    List *list = stream->recording ? &stream->recorded : &stream->queue;
    list->operations[list->count++] = operation;
    return OK;
}

CUresult stand_in_kernel(CUstream stream, void (*kernel)(void)) {
    Operation operation = {NULL, NULL, 0, kernel};
    return queue(stream, operation);
}

CUresult cuInit(unsigned int flags) { return OK; }

CUresult cuGetErrorString(CUresult error, const char **text) {
    *text = (int)error == NO_MEMORY ? "out of memory" : (int)error == NO_CONTEXT ? "invalid device context" : "an error";
    return OK;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) { *device = 0; return OK; }

CUresult cuDeviceGetName(char *name, int size, CUdevice device) { strncpy(name, "Xavier", size); return OK; }

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    *value = attribute == 75 ? 7 : attribute == 76 ? 2 : attribute == 16 ? 6 : -1;
    return OK;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    held[CONTEXTS]++;
    *context = &primary;
    return OK;
}

CUresult cuDevicePrimaryCtxRelease_v2(CUdevice device) { return --held[CONTEXTS] < 0 ? NO_CONTEXT : OK; }

CUresult cuCtxPushCurrent_v2(CUcontext context) {
    if (context != &primary || !held[CONTEXTS]) return NO_CONTEXT;
    depth++;
    return OK;
}

CUresult cuCtxPopCurrent_v2(CUcontext *context) {
    if (!depth) return NO_CONTEXT;
    depth--;
    *context = &primary;
    return OK;
}

CUresult cuMemGetInfo_v2(size_t *available, size_t *total) {
    if (!depth) return NO_CONTEXT;
    *available = limit - held[DEVICE_BYTES];
    *total = TOTAL;
    return OK;
}

CUresult cuMemAlloc_v2(CUdeviceptr *address, size_t size) {
    if (!depth) return NO_CONTEXT;
    if (held[DEVICE_BYTES] + size > limit) return NO_MEMORY;
    size_t *block = aligned_alloc(256, (size / 256 + 2) * 256);
    block[0] = size;
    held[DEVICE_BLOCKS]++;
    held[DEVICE_BYTES] += size;
    *address = (CUdeviceptr)(size_t)block + 256;
    return OK;
}

CUresult cuMemFree_v2(CUdeviceptr address) {
    if (!depth) return NO_CONTEXT;
    size_t *block = (size_t *)(size_t)(address - 256);
    held[DEVICE_BLOCKS]--;
    held[DEVICE_BYTES] -= block[0];
    free(block);
    return (CUresult)failed;
}

CUresult cuMemHostAlloc(void **address, size_t size, unsigned int flags) {
    if (!depth) return NO_CONTEXT;
    held[HOST_BLOCKS]++;
    *address = malloc(size);
    return OK;
}

CUresult cuMemFreeHost(void *address) {
    if (!depth) return NO_CONTEXT;
    held[HOST_BLOCKS]--;
    free(address);
    return (CUresult)failed;
}

CUresult cuMemcpyHtoDAsync_v2(CUdeviceptr to, const void *from, size_t size, CUstream stream) {
    Operation operation = {(void *)(size_t)to, from, size, NULL};
    return queue(stream, operation);
}

CUresult cuMemcpyDtoHAsync_v2(void *to, CUdeviceptr from, size_t size, CUstream stream) {
    Operation operation = {to, (const void *)(size_t)from, size, NULL};
    return queue(stream, operation);
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    if (!depth) return NO_CONTEXT;
    if (flags != 1) return INVALID_VALUE; /* blocked by whoever uses the default stream */
    held[STREAMS]++;
    *stream = calloc(1, sizeof **stream);
    return OK;
}

CUresult cuStreamDestroy_v2(CUstream stream) {
    if (!depth) return NO_CONTEXT;
    held[STREAMS]--;
    free(stream);
    return (CUresult)failed;
}

CUresult cuStreamSynchronize(CUstream stream) {
    if (!depth) return NO_CONTEXT;
    if (stream->recording) return CAPTURING;
    for (int place = 0; place < stream->queue.count; place++) {
        Operation operation = stream->queue.operations[place];
        if (operation.kernel) operation.kernel();
        else memcpy(operation.to, operation.from, operation.size);
    }
    stream->queue.count = 0;
    return (CUresult)failed;
}

CUresult cuStreamBeginCapture_v2(CUstream stream, CUstreamCaptureMode mode) {
    if (!depth) return NO_CONTEXT;
    stream->recording = 1;
    stream->broken = stream->recorded.count = 0;
    return OK;
}

CUresult cuStreamEndCapture(CUstream stream, CUgraph *graph) {
    *graph = NULL;
    if (!stream->recording) return INVALID_VALUE;
    stream->recording = 0;
    if (stream->broken) return INVALIDATED;
    *graph = malloc(sizeof **graph);
    (*graph)->list = stream->recorded;
    held[GRAPHS]++;
    return OK;
}

CUresult cuGraphInstantiateWithFlags(CUgraphExec *executable, CUgraph graph, unsigned long long flags) {
    *executable = malloc(sizeof **executable);
    (*executable)->list = graph->list;
    held[GRAPHS]++;
    return OK;
}

CUresult cuGraphLaunch(CUgraphExec executable, CUstream stream) {
    if (!depth) return NO_CONTEXT;
    held[LAUNCHES]++;
    for (int place = 0; place < executable->list.count; place++) queue(stream, executable->list.operations[place]);
    return OK;
}

CUresult cuGraphDestroy(CUgraph graph) { held[GRAPHS]--; free(graph); return OK; }

CUresult cuGraphExecDestroy(CUgraphExec executable) { held[GRAPHS]--; free(executable); return (CUresult)failed; }
