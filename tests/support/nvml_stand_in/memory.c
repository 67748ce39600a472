/* The calls that tell how much memory of a device is used, and by whom. */
#include "calls.h"

#include <math.h>
#include <string.h>

static const double MIB = 1 << 20;

struct listed {
    long pid;
    struct point memory_mib;
};

/* Whether a process is in its list now, under which id and with how much. */
static bool is_listed(const struct process *process, struct listed *listed)
{
    double since = script->epoch;
    long pid = process->pid == WORKER ? worker_find(script->epoch + now, &since) : process->pid;
    listed->pid = pid + script->offset_pid;
    listed->memory_mib = timeline_at(script, process->memory_mib, script->epoch + now - since);
    return pid != 0 && listed->memory_mib.kind != UNKNOWN;
}

/* What all listed processes use; one that is in several lists counts once. */
static double processes_mib(const struct unit *unit)
{
    struct listed listed[MAX_PROCESSES];
    size_t count = 0;
    double sum = 0;
    for (size_t i = 0; i < unit->process_count; i++)
        count += is_listed(&unit->processes[i], &listed[count]);
    for (size_t i = 0; i < count; i++) {
        double most = listed[i].memory_mib.actual;
        bool counted = false;
        for (size_t j = 0; j < count; j++) {
            if (listed[j].pid == listed[i].pid) {
                counted |= j < i;
                most = fmax(most, listed[j].memory_mib.actual);
            }
        }
        sum += counted ? 0 : most;
    }
    return sum;
}

static bool memory_now(const struct unit *unit, double *total, double *reserved, double *used)
{
    /* What is not available is NAN, which bytes() makes all bits one. */
    bool known = (not_available(unit, VALUE_memory_mib) || value_of(unit, VALUE_memory_mib, total))
                 && (not_available(unit, VALUE_reserved_mib) || value_of(unit, VALUE_reserved_mib, reserved))
                 && (not_available(unit, VALUE_used_mib) || value_of(unit, VALUE_used_mib, used));
    if (not_available(unit, VALUE_memory_mib))
        *total = NAN;
    if (not_available(unit, VALUE_reserved_mib))
        *reserved = NAN;
    *used = not_available(unit, VALUE_used_mib) ? NAN : *used;
    if (known)
        *used += processes_mib(unit);
    return known;
}

static unsigned long long bytes(double mib)
{
    if (isnan(mib))
        return ~0ULL;
    return mib > 0 ? (unsigned long long)llround(mib * MIB) : 0;
}

struct memory_v1 {
    unsigned long long total, free, used;
};

int nvmlDeviceGetMemoryInfo(device_t device, struct memory_v1 *memory)
{
    const struct unit *unit;
    double total = 0, reserved = 0, used = 0;
    int code = begin_unit(CALL_nvmlDeviceGetMemoryInfo, device, &unit);
    if (code == OK && memory == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && !memory_now(unit, &total, &reserved, &used))
        code = NOT_SUPPORTED;
    if (code == OK) {
        memory->total = bytes(total);
        memory->free = bytes(total - reserved - used);
        memory->used = bytes(used + (unit->v1_includes_reserved ? reserved : 0));
    }
    return end(code);
}

struct memory_v2 {
    unsigned version;
    unsigned long long total, reserved, free, used;
};

int nvmlDeviceGetMemoryInfo_v2(device_t device, struct memory_v2 *memory)
{
    const struct unit *unit;
    double total = 0, reserved = 0, used = 0;
    int code = begin_unit(CALL_nvmlDeviceGetMemoryInfo_v2, device, &unit);
    if (code == OK && memory == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && memory->version != 0x02000028)
        code = VERSION_MISMATCH;
    if (code == OK && !memory_now(unit, &total, &reserved, &used))
        code = NOT_SUPPORTED;
    if (code == OK) {
        memory->total = bytes(total);
        memory->reserved = bytes(reserved);
        memory->free = bytes(total - reserved - used);
        memory->used = bytes(used + (unit->v2_includes_reserved ? reserved : 0));
    }
    return end(code);
}

struct process_info {
    unsigned pid;
    unsigned long long used;
    unsigned gi, ci;
};

static int list_processes(enum call call, device_t device, enum process_list list, bool v3, unsigned *count, char *out)
{
    const struct unit *unit;
    struct listed listed[MAX_PROCESSES];
    unsigned found = 0;
    int code = begin_unit(call, device, &unit);
    if (code == OK && count == NULL)
        code = INVALID_ARGUMENT;
    for (size_t i = 0; code == OK && i < unit->process_count; i++)
        found += unit->processes[i].list == list && is_listed(&unit->processes[i], &listed[found]);
    if (code == OK && *count < found) {
        *count = found;
        code = INSUFFICIENT_SIZE;
    }
    if (code == OK && found > 0 && out == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK) {
        /* Some drivers write wider entries under the name of the third version, whatever the caller's are. */
        size_t width = v3 ? script->entry_bytes : sizeof(struct process_info);
        double gi = 0, ci = 0;
        bool mig = unit->mig >= 0 && value_of(unit, VALUE_gi, &gi) && value_of(unit, VALUE_ci, &ci);
        for (unsigned i = 0; i < found; i++) {
            const struct point *memory = &listed[i].memory_mib;
            struct process_info info = {
                .pid = (unsigned)listed[i].pid,
                .used = memory->kind == NOT_AVAILABLE ? ~0ULL : bytes(memory->value),
                .gi = mig ? (unsigned)gi : ~0U,
                .ci = mig ? (unsigned)ci : ~0U,
            };
            memset(out + i * width, 0, width);
            memcpy(out + i * width, &info, sizeof info);
        }
        *count = found;
    }
    return end(code);
}

#define PROCESSES(symbol, list, v3) \
    int symbol(device_t device, unsigned *count, char *out) \
    { \
        return list_processes(CALL_##symbol, device, list, v3, count, out); \
    }
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2, COMPUTE, false)
PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3, COMPUTE, true)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2, GRAPHICS, false)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3, GRAPHICS, true)
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v2, MPS, false)
PROCESSES(nvmlDeviceGetMPSComputeRunningProcesses_v3, MPS, true)
