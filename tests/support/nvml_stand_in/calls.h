/* What every call of the library is made of. */
#ifndef CALLS_H
#define CALLS_H

#include "stand_in.h"

/* Of NVIDIA's nvmlReturn_t. */
enum {
    OK = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    DRIVER_NOT_LOADED = 9,
    GPU_IS_LOST = 15,
    VERSION_MISMATCH = 25,
    WRONG_SCRIPT = 999,
};

typedef char *device_t;

/* Both only between begin() and end(), which hold a mutex. */
extern struct script *script;
extern double now; /* seconds since the script's epoch, at the call that is being answered */

/* Every call begins with one of these, and ends with end() whatever they returned. They read the script again if it
   changed, and obey its rules for the call. */
int begin_uninitialized(enum call call);
int begin(enum call call);
int begin_unit(enum call call, device_t device, const struct unit **unit);
int begin_gpu(enum call call, device_t device, const struct unit **gpu); /* knows no MIG instances */
int end(int code);

/* A whole call that gives one number of a GPU. */
int gpu_number(enum call call, device_t device, enum value value, double scale, unsigned *answer);

/* A value now; false where it is unknown. */
bool value_of(const struct unit *unit, enum value value, double *answer);
/* Whether a script says n/a: the call answers with all bits one. */
bool not_available(const struct unit *unit, enum value value);
/* NULL if there is none; a GPU is its own instance -1. */
const struct unit *find_unit(int device, int mig);

/* These check what the caller handed over, write the answer, and return the code. */
int give_handle(const struct unit *unit, device_t *device);
int give_text(const char *text, char *answer, unsigned length);
int give_number(const struct unit *unit, enum value value, double scale, unsigned *answer);

#endif
