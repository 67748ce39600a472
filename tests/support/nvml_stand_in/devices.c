/* The calls that tell which driver and which devices there are, and what they are; MIG among them. */
#include "calls.h"

#include <math.h>
#include <string.h>

/* nvidia-ml-py has words of its own for most codes and asks only for the others. */
const char *nvmlErrorString(int code)
{
    static _Thread_local char text[40];
    snprintf(text, sizeof text, "error %d of the stand-in", code);
    return text;
}

int nvmlSystemGetDriverVersion(char *version, unsigned length)
{
    int code = begin(CALL_nvmlSystemGetDriverVersion);
    return end(code == OK ? give_text(script->driver, version, length) : code);
}

/* The three below need no nvmlInit, as NVIDIA documents them. */
int nvmlSystemGetNVMLVersion(char *version, unsigned length)
{
    int code = begin_uninitialized(CALL_nvmlSystemGetNVMLVersion);
    if (code == OK) {
        char text[TEXT_SIZE + 16] = "";
        if (script->driver[0] != '\0' && script->cuda > 0)
            snprintf(text, sizeof text, "%d.%s", script->cuda / 1000, script->driver);
        code = give_text(text, version, length);
    }
    return end(code);
}

static int cuda_version(enum call call, int *version)
{
    int code = begin_uninitialized(call);
    if (code == OK && version == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && script->cuda == 0)
        code = NOT_SUPPORTED;
    if (code == OK)
        *version = script->cuda;
    return end(code);
}

int nvmlSystemGetCudaDriverVersion(int *version)
{
    return cuda_version(CALL_nvmlSystemGetCudaDriverVersion, version);
}

int nvmlSystemGetCudaDriverVersion_v2(int *version)
{
    return cuda_version(CALL_nvmlSystemGetCudaDriverVersion_v2, version);
}

int nvmlDeviceGetCount_v2(unsigned *count)
{
    int code = begin(CALL_nvmlDeviceGetCount_v2);
    if (code == OK && count == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK) {
        *count = 0;
        while (*count < MAX_DEVICES && find_unit((int)*count, -1) != NULL)
            ++*count;
    }
    return end(code);
}

int nvmlDeviceGetHandleByIndex_v2(unsigned index, device_t *device)
{
    int code = begin(CALL_nvmlDeviceGetHandleByIndex_v2);
    if (code == OK) {
        const struct unit *gpu = index < MAX_DEVICES ? find_unit((int)index, -1) : NULL;
        code = gpu == NULL ? INVALID_ARGUMENT : give_handle(gpu, device);
    }
    return end(code);
}

int nvmlDeviceGetHandleByUUID(const char *uuid, device_t *device)
{
    int code = begin(CALL_nvmlDeviceGetHandleByUUID);
    if (code == OK) {
        const struct unit *unit = NULL;
        for (size_t i = 0; uuid != NULL && i < script->unit_count && unit == NULL; i++)
            if (script->units[i].uuid[0] != '\0' && strcmp(script->units[i].uuid, uuid) == 0)
                unit = &script->units[i];
        code = uuid == NULL ? INVALID_ARGUMENT : give_handle(unit, device);
    }
    return end(code);
}

static bool parse_pci(const char *text, unsigned place[3])
{
    return text != NULL && sscanf(text, "%x:%x:%x", &place[0], &place[1], &place[2]) == 3;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, device_t *device)
{
    int code = begin(CALL_nvmlDeviceGetHandleByPciBusId_v2);
    if (code == OK) {
        unsigned asked[3], has[3]; /* numbers, because the domain is written with four digits and with eight */
        const struct unit *gpu = NULL;
        bool good = parse_pci(bus_id, asked);
        for (size_t i = 0; good && i < script->unit_count && gpu == NULL; i++)
            if (parse_pci(script->units[i].pci, has) && memcmp(asked, has, sizeof has) == 0)
                gpu = &script->units[i];
        code = good ? give_handle(gpu, device) : INVALID_ARGUMENT;
    }
    return end(code);
}

int nvmlDeviceGetName(device_t device, char *name, unsigned length)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceGetName, device, &unit);
    return end(code == OK ? give_text(unit->name, name, length) : code);
}

int nvmlDeviceGetUUID(device_t device, char *uuid, unsigned length)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceGetUUID, device, &unit);
    return end(code == OK ? give_text(unit->uuid, uuid, length) : code);
}

int nvmlDeviceGetIndex(device_t device, unsigned *index)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceGetIndex, device, &unit);
    if (code == OK && index == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK)
        *index = (unsigned)(unit->mig >= 0 ? unit->mig : unit->device);
    return end(code);
}

struct pci_info {
    char bus_id_legacy[16];
    unsigned domain, bus, device, device_id, subsystem_id;
    char bus_id[32];
};

int nvmlDeviceGetPciInfo_v3(device_t device, struct pci_info *info)
{
    const struct unit *gpu;
    unsigned place[3];
    int code = begin_gpu(CALL_nvmlDeviceGetPciInfo_v3, device, &gpu);
    if (code == OK && info == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && !parse_pci(gpu->pci, place))
        code = NOT_SUPPORTED;
    if (code == OK) {
        *info = (struct pci_info){.domain = place[0], .bus = place[1], .device = place[2], .device_id = 0x20B010DE};
        snprintf(info->bus_id_legacy, sizeof info->bus_id_legacy, "%04X:%02X:%02X.0", place[0] & 0xFFFF,
                 place[1] & 0xFF, place[2] & 0xFF);
        snprintf(info->bus_id, sizeof info->bus_id, "%08X:%02X:%02X.0", place[0], place[1], place[2]);
    }
    return end(code);
}

int nvmlDeviceGetCudaComputeCapability(device_t device, int *major, int *minor)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetCudaComputeCapability, device, &gpu);
    if (code == OK && (major == NULL || minor == NULL))
        code = INVALID_ARGUMENT;
    if (code == OK && isnan(gpu->capability[0]))
        code = NOT_SUPPORTED;
    if (code == OK) {
        *major = (int)gpu->capability[0];
        *minor = (int)gpu->capability[1];
    }
    return end(code);
}

int nvmlDeviceGetVbiosVersion(device_t device, char *version, unsigned length)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetVbiosVersion, device, &gpu);
    return end(code == OK ? give_text(gpu->vbios, version, length) : code);
}

int nvmlDeviceGetMaxMigDeviceCount(device_t device, unsigned *count)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetMaxMigDeviceCount, device, &gpu);
    if (code == OK) /* 7 is what all GPUs with MIG allow; 0 where it is off or unknown */
        code = give_number(gpu, VALUE_mig, 7, count) == INVALID_ARGUMENT ? INVALID_ARGUMENT : OK;
    if (code == OK && timeline_at(script, gpu->values[VALUE_mig], now).kind != KNOWN)
        *count = 0;
    return end(code);
}

int nvmlDeviceGetMigDeviceHandleByIndex(device_t device, unsigned index, device_t *instance)
{
    const struct unit *gpu;
    int code = begin_gpu(CALL_nvmlDeviceGetMigDeviceHandleByIndex, device, &gpu);
    if (code == OK)
        code = give_handle(index < MAX_MIG ? find_unit(gpu->device, (int)index) : NULL, instance);
    return end(code);
}

int nvmlDeviceGetDeviceHandleFromMigDeviceHandle(device_t instance, device_t *device)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceGetDeviceHandleFromMigDeviceHandle, instance, &unit);
    if (code == OK)
        code = unit->mig < 0 ? INVALID_ARGUMENT : give_handle(find_unit(unit->device, -1), device);
    return end(code);
}

int nvmlDeviceIsMigDeviceHandle(device_t device, unsigned *is_mig)
{
    const struct unit *unit;
    int code = begin_unit(CALL_nvmlDeviceIsMigDeviceHandle, device, &unit);
    if (code == OK && is_mig == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK)
        *is_mig = unit->mig >= 0;
    return end(code);
}

static int mig_id(enum call call, device_t device, enum value value, unsigned *id)
{
    const struct unit *unit;
    int code = begin_unit(call, device, &unit);
    if (code == OK)
        code = unit->mig < 0 ? INVALID_ARGUMENT : give_number(unit, value, 1, id);
    return end(code);
}

int nvmlDeviceGetGpuInstanceId(device_t device, unsigned *id)
{
    return mig_id(CALL_nvmlDeviceGetGpuInstanceId, device, VALUE_gi, id);
}

int nvmlDeviceGetComputeInstanceId(device_t device, unsigned *id)
{
    return mig_id(CALL_nvmlDeviceGetComputeInstanceId, device, VALUE_ci, id);
}

struct attributes {
    unsigned multiprocessors, copy_engines, decoders, encoders, jpegs, ofas, gpu_slices, compute_slices;
    unsigned long long memory_mib;
};

int nvmlDeviceGetAttributes_v2(device_t device, struct attributes *attributes)
{
    const struct unit *unit;
    double memory_mib;
    int code = begin_unit(CALL_nvmlDeviceGetAttributes_v2, device, &unit);
    if (code == OK && attributes == NULL)
        code = INVALID_ARGUMENT;
    if (code == OK && (unit->mig < 0 || !value_of(unit, VALUE_memory_mib, &memory_mib)))
        code = NOT_SUPPORTED;
    if (code == OK) {
        *attributes = (struct attributes){.memory_mib = (unsigned long long)memory_mib};
        (void)give_number(unit, VALUE_multiprocessors, 1, &attributes->multiprocessors); /* stays 0 if unknown */
    }
    return end(code);
}
