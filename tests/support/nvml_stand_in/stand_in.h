/* What the files of the stand-in share. The grammar of a script is described in __init__.py. */
#ifndef STAND_IN_H
#define STAND_IN_H

#include <stdbool.h>
#include <stddef.h>
#include <stdio.h>

/* Every call that a script may let fail, delay or crash. __init__.py reads the names from here. */
#define CALLS(X) \
    X(nvmlInit_v2) \
    X(nvmlInitWithFlags) \
    X(nvmlShutdown) \
    X(nvmlSystemGetDriverVersion) \
    X(nvmlSystemGetNVMLVersion) \
    X(nvmlSystemGetCudaDriverVersion) \
    X(nvmlSystemGetCudaDriverVersion_v2) \
    X(nvmlDeviceGetCount_v2) \
    X(nvmlDeviceGetHandleByIndex_v2) \
    X(nvmlDeviceGetHandleByUUID) \
    X(nvmlDeviceGetHandleByPciBusId_v2) \
    X(nvmlDeviceGetName) \
    X(nvmlDeviceGetUUID) \
    X(nvmlDeviceGetIndex) \
    X(nvmlDeviceGetPciInfo_v3) \
    X(nvmlDeviceGetCudaComputeCapability) \
    X(nvmlDeviceGetVbiosVersion) \
    X(nvmlDeviceGetMemoryInfo) \
    X(nvmlDeviceGetMemoryInfo_v2) \
    X(nvmlDeviceGetComputeRunningProcesses_v2) \
    X(nvmlDeviceGetComputeRunningProcesses_v3) \
    X(nvmlDeviceGetGraphicsRunningProcesses_v2) \
    X(nvmlDeviceGetGraphicsRunningProcesses_v3) \
    X(nvmlDeviceGetMPSComputeRunningProcesses_v2) \
    X(nvmlDeviceGetMPSComputeRunningProcesses_v3) \
    X(nvmlDeviceGetUtilizationRates) \
    X(nvmlDeviceGetPowerUsage) \
    X(nvmlDeviceGetEnforcedPowerLimit) \
    X(nvmlDeviceGetPowerManagementLimit) \
    X(nvmlDeviceGetPowerManagementDefaultLimit) \
    X(nvmlDeviceGetPowerManagementLimitConstraints) \
    X(nvmlDeviceGetTotalEnergyConsumption) \
    X(nvmlDeviceGetFieldValues) \
    X(nvmlDeviceGetTemperature) \
    X(nvmlDeviceGetTemperatureV) \
    X(nvmlDeviceGetTemperatureThreshold) \
    X(nvmlDeviceGetClockInfo) \
    X(nvmlDeviceGetMaxClockInfo) \
    X(nvmlDeviceGetCurrentClocksEventReasons) \
    X(nvmlDeviceGetCurrentClocksThrottleReasons) \
    X(nvmlDeviceGetEccMode) \
    X(nvmlDeviceGetPersistenceMode) \
    X(nvmlDeviceGetPerformanceState) \
    X(nvmlDeviceGetPowerState) \
    X(nvmlDeviceGetCurrPcieLinkGeneration) \
    X(nvmlDeviceGetCurrPcieLinkWidth) \
    X(nvmlDeviceGetMigMode) \
    X(nvmlDeviceGetMaxMigDeviceCount) \
    X(nvmlDeviceGetMigDeviceHandleByIndex) \
    X(nvmlDeviceGetDeviceHandleFromMigDeviceHandle) \
    X(nvmlDeviceIsMigDeviceHandle) \
    X(nvmlDeviceGetGpuInstanceId) \
    X(nvmlDeviceGetComputeInstanceId) \
    X(nvmlDeviceGetAttributes_v2)

/* The lines of a device that hold a timeline. __init__.py reads these names too. */
#define VALUES(X) \
    X(memory_mib) \
    X(reserved_mib) \
    X(used_mib) \
    X(power_w) \
    X(power_average_w) \
    X(power_instant_w) \
    X(power_limit_w) \
    X(energy) \
    X(energy_tick) \
    X(energy_start_j) \
    X(field_type) \
    X(field_stamp_s) \
    X(temperature_c) \
    X(slowdown_c) \
    X(sm_clock_mhz) \
    X(mem_clock_mhz) \
    X(max_sm_clock_mhz) \
    X(max_mem_clock_mhz) \
    X(utilization) \
    X(event_reasons) \
    X(ecc) \
    X(persistence) \
    X(pstate) \
    X(pcie_generation) \
    X(pcie_width) \
    X(mig) \
    X(gi) \
    X(ci) \
    X(multiprocessors) \
    X(lost)

enum call {
#define X(name) CALL_##name,
    CALLS(X)
#undef X
    CALL_COUNT
};

enum value {
#define X(name) VALUE_##name,
    VALUES(X)
#undef X
    VALUE_COUNT
};

enum { MAX_DEVICES = 8, MAX_MIG = 8, MAX_UNITS = 32, MAX_PROCESSES = 32, MAX_RULES = 64, TEXT_SIZE = 96 };

struct point {
    double at;
    enum { UNKNOWN, KNOWN, NOT_AVAILABLE } kind;
    double value;  /* what a call answers */
    double actual; /* what a process really uses; elsewhere the same as value */
};

/* Points first to first + count - 1 of the script's points. */
struct timeline {
    size_t first, count;
};

enum process_list { COMPUTE, GRAPHICS, MPS };

struct process {
    enum process_list list;
    long pid; /* WORKER for whichever process trains now */
    struct timeline memory_mib;
};

enum { WORKER = -1 };

/* A GPU, or an instance of one under MIG. */
struct unit {
    int device;
    int mig; /* -1: the whole GPU */
    char name[TEXT_SIZE], uuid[TEXT_SIZE], pci[TEXT_SIZE], vbios[TEXT_SIZE];
    double capability[2];     /* NAN where unknown */
    double power_limits_w[3]; /* smallest, default, largest; NAN where unknown */
    bool v1_includes_reserved, v2_includes_reserved;
    struct timeline values[VALUE_COUNT];
    struct process processes[MAX_PROCESSES];
    size_t process_count;
};

struct rule {
    enum { FAIL, LATENCY, CRASH } kind;
    enum call call;
    double amount; /* the code that is returned, or seconds */
    unsigned long after, times;
};

struct script {
    double epoch;
    char driver[TEXT_SIZE];
    int cuda; /* 0: unknown */
    int init_error;
    size_t entry_bytes;
    long offset_pid;
    struct unit units[MAX_UNITS];
    size_t unit_count;
    struct rule rules[MAX_RULES];
    size_t rule_count;
    struct point *points;
    size_t point_count;
};

/* script.c: a script, or NULL after a message on standard error that names the line. */
struct script *script_read(FILE *file, const char *path);
void script_free(struct script *script);

/* The point that holds at a time; an empty timeline is unknown. */
struct point timeline_at(const struct script *script, struct timeline timeline, double time);
/* The integral from 0 to a time; what is unknown counts nothing. */
double timeline_integral(const struct script *script, struct timeline timeline, double time);

/* worker.c: the process that trains, or 0; and since when this process has known it, on the clock of `now`. */
long worker_find(double now, double *since);

#endif
