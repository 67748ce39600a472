/* A stand-in for NVIDIA's libnvidia-ml.so.1 that answers from a script, which __init__.py describes: what every call
   begins and ends with. The calls are in devices.c, memory.c and gauges.c. */
#define _GNU_SOURCE
#include "calls.h"

#include <errno.h>
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <time.h>

static const char VARIABLE[] = "MPSCALE_STAND_IN_NVML";

/* Handles are addresses in here: [device][0] is the GPU, [device][1 + i] its MIG instance i. They outlive a change of
   the script, as real ones outlive everything but a reset. */
static char handles[MAX_DEVICES][1 + MAX_MIG];

static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
/* All below is read and written under the mutex. */
struct script *script;
static bool wrong_script;
static struct stat seen;
static unsigned long calls[CALL_COUNT];
static unsigned long users; /* nvmlInit less nvmlShutdown */
double now;

static double monotonic(void)
{
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + (double)time.tv_nsec / 1e9;
}

static bool same_version(const struct stat *a, const struct stat *b)
{
    return a->st_ino == b->st_ino && a->st_size == b->st_size && a->st_mtim.tv_sec == b->st_mtim.tv_sec
           && a->st_mtim.tv_nsec == b->st_mtim.tv_nsec;
}

static void refresh(void)
{
    const char *path = getenv(VARIABLE);
    struct stat found;
    FILE *file = NULL;
    bool there = path != NULL && stat(path, &found) == 0;
    if (there && (script != NULL || wrong_script) && same_version(&found, &seen))
        return;
    script_free(script);
    script = NULL;
    wrong_script = false;
    if (!there || (file = fopen(path, "re")) == NULL)
        return;
    fstat(fileno(file), &seen); /* of what is read, which may be newer than what was found */
    script = script_read(file, path);
    wrong_script = script == NULL;
    fclose(file);
}

static void sleep_for(double seconds)
{
    struct timespec rest = {.tv_sec = (time_t)seconds};
    rest.tv_nsec = (long)((seconds - (double)rest.tv_sec) * 1e9);
    while (nanosleep(&rest, &rest) != 0 && errno == EINTR)
        ;
}

/* The first rule of a kind that applies to the latest call of a symbol, or NULL. */
static const struct rule *rule_for(int kind, enum call call, unsigned long number)
{
    for (size_t i = 0; script != NULL && i < script->rule_count; i++) {
        const struct rule *rule = &script->rules[i];
        bool its_turn = number > rule->after && number - rule->after <= rule->times;
        if ((int)rule->kind == kind && rule->call == call && its_turn)
            return rule;
    }
    return NULL;
}

int begin_uninitialized(enum call call)
{
    pthread_mutex_lock(&mutex);
    refresh();
    unsigned long number = ++calls[call];
    if (rule_for(CRASH, call, number) != NULL) {
        signal(SIGSEGV, SIG_DFL); /* Python's faulthandler may have taken it */
        raise(SIGSEGV);
    }
    const struct rule *latency = rule_for(LATENCY, call, number);
    if (latency != NULL) {
        double seconds = latency->amount;
        pthread_mutex_unlock(&mutex); /* a hanging call must not hold up those of other threads */
        sleep_for(seconds);
        pthread_mutex_lock(&mutex);
        refresh();
    }
    if (wrong_script)
        return WRONG_SCRIPT;
    if (script == NULL)
        return DRIVER_NOT_LOADED;
    now = monotonic() - script->epoch;
    const struct rule *failure = rule_for(FAIL, call, number);
    return failure != NULL ? (int)failure->amount : OK;
}

int begin(enum call call)
{
    int code = begin_uninitialized(call);
    return code == OK && users == 0 ? UNINITIALIZED : code;
}

int end(int code)
{
    pthread_mutex_unlock(&mutex);
    return code;
}

bool value_of(const struct unit *unit, enum value value, double *answer)
{
    struct point point = timeline_at(script, unit->values[value], now);
    *answer = point.value;
    return point.kind == KNOWN;
}

bool not_available(const struct unit *unit, enum value value)
{
    return timeline_at(script, unit->values[value], now).kind == NOT_AVAILABLE;
}

const struct unit *find_unit(int device, int mig)
{
    for (size_t i = 0; i < script->unit_count; i++)
        if (script->units[i].device == device && script->units[i].mig == mig)
            return &script->units[i];
    return NULL;
}

static bool lost(const struct unit *unit)
{
    double at;
    const struct unit *gpu = find_unit(unit->device, -1);
    return value_of(gpu, VALUE_lost, &at) && now >= at;
}

int give_handle(const struct unit *unit, device_t *device)
{
    if (device == NULL)
        return INVALID_ARGUMENT;
    if (unit == NULL)
        return NOT_FOUND;
    if (lost(unit))
        return GPU_IS_LOST;
    *device = &handles[unit->device][1 + unit->mig];
    return OK;
}

int begin_unit(enum call call, device_t device, const struct unit **unit)
{
    int code = begin(call);
    if (code != OK)
        return code;
    uintptr_t offset = (uintptr_t)device - (uintptr_t)&handles[0][0];
    if (offset >= sizeof handles) /* also where it is below the array and wraps */
        return INVALID_ARGUMENT;
    *unit = find_unit((int)(offset / sizeof handles[0]), (int)(offset % sizeof handles[0]) - 1);
    return *unit == NULL || lost(*unit) ? GPU_IS_LOST : OK;
}

int begin_gpu(enum call call, device_t device, const struct unit **gpu)
{
    int code = begin_unit(call, device, gpu);
    return code == OK && (*gpu)->mig >= 0 ? NOT_SUPPORTED : code;
}

int give_text(const char *text, char *answer, unsigned length)
{
    if (answer == NULL)
        return INVALID_ARGUMENT;
    if (text[0] == '\0')
        return NOT_SUPPORTED;
    if (strlen(text) >= length)
        return INSUFFICIENT_SIZE;
    memcpy(answer, text, strlen(text) + 1);
    return OK;
}

int give_number(const struct unit *unit, enum value value, double scale, unsigned *answer)
{
    double number;
    if (answer == NULL)
        return INVALID_ARGUMENT;
    if (not_available(unit, value)) {
        *answer = ~0U;
        return OK;
    }
    if (!value_of(unit, value, &number))
        return NOT_SUPPORTED;
    *answer = (unsigned)llround(number * scale);
    return OK;
}

int gpu_number(enum call call, device_t device, enum value value, double scale, unsigned *answer)
{
    const struct unit *gpu;
    int code = begin_gpu(call, device, &gpu);
    return end(code == OK ? give_number(gpu, value, scale, answer) : code);
}

static int init(enum call call)
{
    int code = begin_uninitialized(call);
    if (code == OK)
        code = script->init_error;
    if (code == OK)
        users++;
    return end(code);
}

int nvmlInit_v2(void)
{
    return init(CALL_nvmlInit_v2);
}

int nvmlInitWithFlags(unsigned flags)
{
    (void)flags;
    return init(CALL_nvmlInitWithFlags);
}

int nvmlShutdown(void)
{
    int code = begin(CALL_nvmlShutdown);
    if (code == OK)
        users--;
    return end(code);
}
