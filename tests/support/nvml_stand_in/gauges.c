/* The calls that tell what a GPU does now: power, energy, temperature, clocks, modes. */
#define _GNU_SOURCE
#include "calls.h"

#include <math.h>
#include <stdint.h>
#include <time.h>

int nvmlDeviceGetPowerUsage(device_t device, unsigned *milliwatts)
{
    return gpu_number(CALL_nvmlDeviceGetPowerUsage, device, VALUE_power_w, 1000, milliwatts);
}

int nvmlDeviceGetEnforcedPowerLimit(device_t device, unsigned *milliwatts)
{
    return gpu_number(CALL_nvmlDeviceGetEnforcedPowerLimit, device, VALUE_power_limit_w, 1000, milliwatts);
}

int nvmlDeviceGetPowerManagementLimit(device_t device, unsigned *milliwatts)
{
    return gpu_number(CALL_nvmlDeviceGetPowerManagementLimit, device, VALUE_power_limit_w, 1000, milliwatts);
}

int nvmlDeviceGetPowerManagementDefaultLimit(device_t device, unsigned *milliwatts)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetPowerManagementDefaultLimit, device, &gpu);
    if (code == OK && milliwatts == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && isnan(gpu->power_limits_w[1]))
        code = NOT_SUPPORTED;
    if (code == OK)
        *milliwatts = (unsigned)llround(gpu->power_limits_w[1] * 1000);
    return end(code);
}

int nvmlDeviceGetPowerManagementLimitConstraints(device_t device, unsigned *smallest, unsigned *largest)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetPowerManagementLimitConstraints, device, &gpu);
    if (code == OK && (smallest == NULL || largest == NULL))
        code = INVALID_ARGUMENT;
    if (code == OK && isnan(gpu->power_limits_w[0]))
        code = NOT_SUPPORTED;
    if (code == OK) {
        *smallest = (unsigned)llround(gpu->power_limits_w[0] * 1000);
        *largest = (unsigned)llround(gpu->power_limits_w[2] * 1000);
    }
    return end(code);
}

static int energy_now(const struct unit *gpu, unsigned long long *millijoules)
{
    double on, start, tick;
    if (not_available(gpu, VALUE_energy)) {
        *millijoules = ~0ULL;
        return OK;
    }
    if (!value_of(gpu, VALUE_energy, &on) || !value_of(gpu, VALUE_energy_start_j, &start))
        return NOT_SUPPORTED;
    double time = fmax(now, 0);
    if (value_of(gpu, VALUE_energy_tick, &tick) && tick > 0)
        time = floor(time / tick) * tick;
    double joules = start + timeline_integral(script, gpu->values[VALUE_power_w], time);
    *millijoules = (unsigned long long)llround(1000 * joules);
    return OK;
}

int nvmlDeviceGetTotalEnergyConsumption(device_t device, unsigned long long *millijoules)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetTotalEnergyConsumption, device, &gpu);
    if (code == OK)
        code = millijoules == NULL ? INVALID_ARGUMENT : energy_now(gpu, millijoules);
    return end(code);
}

struct field {
    unsigned id, scope;
    int64_t timestamp_us, latency_us;
    unsigned value_type;
    int code;
    union {
        unsigned number;
        unsigned long long long_number;
    } value;
};

enum { FIELD_ENERGY = 83, FIELD_POWER_AVERAGE = 185, FIELD_POWER_INSTANT = 186 };
enum { TYPE_NUMBER = 1, TYPE_LONG_NUMBER = 3 };

static void fill_field(const struct unit *gpu, struct field *field)
{
    struct timespec time;
    enum value power = field->id == FIELD_POWER_AVERAGE ? VALUE_power_average_w : VALUE_power_instant_w;
    clock_gettime(CLOCK_REALTIME, &time);
    field->timestamp_us = (int64_t)time.tv_sec * 1000000 + time.tv_nsec / 1000;
    field->latency_us = 0;
    if (gpu->mig < 0 && field->id == FIELD_ENERGY) {
        field->value_type = TYPE_LONG_NUMBER;
        field->code = energy_now(gpu, &field->value.long_number);
    } else if (gpu->mig < 0 && (field->id == FIELD_POWER_AVERAGE || field->id == FIELD_POWER_INSTANT)) {
        field->value_type = TYPE_NUMBER;
        bool scripted = gpu->values[power].count > 0;
        field->code = give_number(gpu, scripted ? power : VALUE_power_w, 1000, &field->value.number);
    } else {
        field->code = NOT_SUPPORTED;
    }
    double type;
    if (value_of(gpu, VALUE_field_type, &type))
        field->value_type = (unsigned)type;
    double stamp_s;
    if (value_of(gpu, VALUE_field_stamp_s, &stamp_s))
        field->timestamp_us = (int64_t)(1e6 * stamp_s);
}

int nvmlDeviceGetFieldValues(device_t device, int count, struct field *fields)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceGetFieldValues, device, &unit);
    if (code == OK && (fields == NULL || count < 1))
        code = INVALID_ARGUMENT;
    for (int i = 0; code == OK && i < count; i++)
        fill_field(unit, &fields[i]);
    return end(code);
}

int nvmlDeviceGetTemperature(device_t device, unsigned sensor, unsigned *celsius)
{
    return gpu_number(CALL_nvmlDeviceGetTemperature, device, VALUE_temperature_c, 1, sensor == 0 ? celsius : NULL);
}

struct temperature {
    unsigned version, sensor;
    int celsius;
};

int nvmlDeviceGetTemperatureV(device_t device, struct temperature *temperature)
{
    const struct unit *gpu;
    double celsius;
    int code = begin_gpu(CALL_nvmlDeviceGetTemperatureV, device, &gpu);
    if (code == OK && (temperature == NULL || temperature->sensor != 0))
        code = INVALID_ARGUMENT;
    if (code == OK && temperature->version != 0x100000C)
        code = VERSION_MISMATCH;
    bool none = code == OK && not_available(gpu, VALUE_temperature_c);
    if (none)
        celsius = -1;
    else if (code == OK && !value_of(gpu, VALUE_temperature_c, &celsius))
        code = NOT_SUPPORTED;
    if (code == OK)
        temperature->celsius = (int)lround(celsius);
    return end(code);
}

int nvmlDeviceGetTemperatureThreshold(device_t device, unsigned threshold, unsigned *celsius)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetTemperatureThreshold, device, &gpu);
    if (code == OK) /* 1: where the clocks are slowed down */
        code = threshold == 1 ? give_number(gpu, VALUE_slowdown_c, 1, celsius) : NOT_SUPPORTED;
    return end(code);
}

/* Clock types: 0 graphics, 1 SM, 2 memory, 3 video. */
static int clock_number(enum call call, device_t device, unsigned type, enum value sm, enum value mem, unsigned *mhz)
{
    const struct unit *gpu;
    int code = begin_gpu(call, device, &gpu);
    if (code == OK && type > 3)
        code = INVALID_ARGUMENT;
    if (code == OK)
        code = type == 3 ? NOT_SUPPORTED : give_number(gpu, type == 2 ? mem : sm, 1, mhz);
    return end(code);
}

int nvmlDeviceGetClockInfo(device_t device, unsigned type, unsigned *mhz)
{
    return clock_number(CALL_nvmlDeviceGetClockInfo, device, type, VALUE_sm_clock_mhz, VALUE_mem_clock_mhz, mhz);
}

int nvmlDeviceGetMaxClockInfo(device_t device, unsigned type, unsigned *mhz)
{
    enum value sm = VALUE_max_sm_clock_mhz, mem = VALUE_max_mem_clock_mhz;
    return clock_number(CALL_nvmlDeviceGetMaxClockInfo, device, type, sm, mem, mhz);
}

struct utilization {
    unsigned gpu, memory;
};

int nvmlDeviceGetUtilizationRates(device_t device, struct utilization *percent)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetUtilizationRates, device, &gpu);
    if (code == OK)
        code = give_number(gpu, VALUE_utilization, 1, percent == NULL ? NULL : &percent->gpu);
    if (code == OK)
        percent->memory = 0;
    return end(code);
}

static int event_reasons(enum call call, device_t device, unsigned long long *reasons)
{
    const struct unit *gpu;
    double bits;
    int code = begin_gpu(call, device, &gpu);
    if (code == OK && reasons == NULL)
        code = INVALID_ARGUMENT;
    bool none = code == OK && not_available(gpu, VALUE_event_reasons);
    if (code == OK && !none && !value_of(gpu, VALUE_event_reasons, &bits))
        code = NOT_SUPPORTED;
    if (code == OK)
        *reasons = none ? ~0ULL : (unsigned long long)bits;
    return end(code);
}

int nvmlDeviceGetCurrentClocksEventReasons(device_t device, unsigned long long *reasons)
{
    return event_reasons(CALL_nvmlDeviceGetCurrentClocksEventReasons, device, reasons);
}

int nvmlDeviceGetCurrentClocksThrottleReasons(device_t device, unsigned long long *reasons)
{
    return event_reasons(CALL_nvmlDeviceGetCurrentClocksThrottleReasons, device, reasons);
}

/* A mode that is now and the one after the next reboot, which is the same here. */
static int modes(enum call call, device_t device, enum value value, unsigned *current, unsigned *pending)
{
    const struct unit *gpu;
    int code = begin_gpu(call, device, &gpu);
    if (code == OK)
        code = give_number(gpu, value, 1, pending == NULL ? NULL : current);
    if (code == OK)
        *pending = *current;
    return end(code);
}

int nvmlDeviceGetEccMode(device_t device, unsigned *current, unsigned *pending)
{
    return modes(CALL_nvmlDeviceGetEccMode, device, VALUE_ecc, current, pending);
}

int nvmlDeviceGetMigMode(device_t device, unsigned *current, unsigned *pending)
{
    return modes(CALL_nvmlDeviceGetMigMode, device, VALUE_mig, current, pending);
}

int nvmlDeviceGetPersistenceMode(device_t device, unsigned *mode)
{
    return gpu_number(CALL_nvmlDeviceGetPersistenceMode, device, VALUE_persistence, 1, mode);
}

int nvmlDeviceGetPerformanceState(device_t device, unsigned *state)
{
    return gpu_number(CALL_nvmlDeviceGetPerformanceState, device, VALUE_pstate, 1, state);
}

int nvmlDeviceGetPowerState(device_t device, unsigned *state)
{
    return gpu_number(CALL_nvmlDeviceGetPowerState, device, VALUE_pstate, 1, state);
}

int nvmlDeviceGetCurrPcieLinkGeneration(device_t device, unsigned *generation)
{
    return gpu_number(CALL_nvmlDeviceGetCurrPcieLinkGeneration, device, VALUE_pcie_generation, 1, generation);
}

int nvmlDeviceGetCurrPcieLinkWidth(device_t device, unsigned *lanes)
{
    return gpu_number(CALL_nvmlDeviceGetCurrPcieLinkWidth, device, VALUE_pcie_width, 1, lanes);
}
