/* Reads a script; its grammar is described in __init__.py. */
#define _GNU_SOURCE
#include "stand_in.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

static const char *const call_names[] = {
#define X(name) #name,
    CALLS(X)
#undef X
};

static const char *const value_names[] = {
#define X(name) #name,
    VALUES(X)
#undef X
};

static const char SPACE[] = " \t\r\n";

struct reader {
    struct script *script;
    struct unit *unit; /* whom the lines belong to; NULL before the first `device` */
    const char *wrong; /* what is wrong with the line, once something is */
};

static bool fail(struct reader *reader, const char *what)
{
    if (reader->wrong == NULL)
        reader->wrong = what;
    return false;
}

static bool read_number(const char *word, double *number)
{
    char *end;
    if (word == NULL)
        return false;
    *number = strtod(word, &end); /* decimal, or hexadecimal after 0x */
    return end != word && *end == '\0' && isfinite(*number);
}

static bool read_count(const char *word, unsigned long *count)
{
    double number;
    if (!read_number(word, &number) || number < 0 || number != floor(number))
        return false;
    *count = (unsigned long)number;
    return true;
}

static int find_name(const char *word, const char *const *names, int count)
{
    for (int i = 0; word != NULL && i < count; i++)
        if (strcmp(word, names[i]) == 0)
            return i;
    return -1;
}

/* `-`, `n/a`, a number, and for processes also `n/a(MIB)` and `LISTED(ACTUAL)`. Writes into the word. */
static bool read_value(char *word, bool of_process, struct point *point)
{
    size_t length = strlen(word);
    char *open = strchr(word, '(');
    point->kind = KNOWN;
    if (strcmp(word, "-") == 0) {
        point->kind = UNKNOWN;
        return true;
    }
    if (open != NULL) {
        if (!of_process || word[length - 1] != ')')
            return false;
        word[length - 1] = *open = '\0';
        if (!read_number(open + 1, &point->actual))
            return false;
    }
    if (strcmp(word, "n/a") == 0) {
        point->kind = NOT_AVAILABLE;
        return true;
    }
    if (!read_number(word, &point->value))
        return false;
    if (open == NULL)
        point->actual = point->value;
    return true;
}

static bool add_point(struct script *script, struct timeline *timeline, struct point point)
{
    struct point *more = realloc(script->points, (script->point_count + 1) * sizeof *more);
    if (more == NULL)
        return false;
    script->points = more;
    script->points[script->point_count++] = point;
    timeline->count++;
    return true;
}

/* All words that are left: `t:value` pairs, or one bare value. */
static bool read_timeline(struct reader *reader, char **rest, bool of_process, struct timeline *timeline)
{
    struct script *script = reader->script;
    double last = -INFINITY;
    *timeline = (struct timeline){.first = script->point_count};
    for (char *word = strtok_r(NULL, SPACE, rest); word != NULL; word = strtok_r(NULL, SPACE, rest)) {
        struct point point = {.at = 0};
        char *colon = strchr(word, ':'), *value = word;
        if (colon != NULL) {
            *colon = '\0';
            value = colon + 1;
            if (!read_number(word, &point.at))
                return fail(reader, "not a time before the colon");
        }
        if (point.at <= last || (colon == NULL && timeline->count > 0))
            return fail(reader, "a timeline is one bare value, or t:value pairs with rising t");
        last = colon == NULL ? INFINITY : point.at;
        if (!read_value(value, of_process, &point))
            return fail(reader, "not a value");
        if (!add_point(script, timeline, point))
            return fail(reader, "out of memory");
    }
    return timeline->count > 0 || fail(reader, "a value is missing");
}

/* The rest of the line as it stands; `-` is unknown and stored as nothing. */
static bool read_text(struct reader *reader, char **rest, char text[TEXT_SIZE])
{
    char *from = *rest + strspn(*rest, SPACE);
    size_t length = strlen(from);
    while (length > 0 && strchr(SPACE, from[length - 1]) != NULL)
        length--;
    if (length == 0 || length >= TEXT_SIZE)
        return fail(reader, "a text is missing or too long");
    snprintf(text, TEXT_SIZE, "%.*s", (int)length, from);
    if (strcmp(text, "-") == 0)
        text[0] = '\0';
    *rest = from + strlen(from);
    return true;
}

/* So many numbers, or `-` for all of them. */
static bool read_numbers(struct reader *reader, char **rest, double *numbers, int count)
{
    for (int i = 0; i < count; i++) {
        char *word = strtok_r(NULL, SPACE, rest);
        if (i == 0 && word != NULL && strcmp(word, "-") == 0) {
            for (int j = 0; j < count; j++)
                numbers[j] = NAN;
            return true;
        }
        if (!read_number(word, &numbers[i]))
            return fail(reader, "a number is missing");
    }
    return true;
}

/* SYMBOL [AMOUNT] [after N] [for M] */
static bool read_rule(struct reader *reader, char **rest, int kind)
{
    struct script *script = reader->script;
    struct rule rule = {.kind = kind, .times = (unsigned long)-1};
    int call = find_name(strtok_r(NULL, SPACE, rest), call_names, CALL_COUNT);
    if (call < 0)
        return fail(reader, "no such call");
    rule.call = (enum call)call;
    if (kind != CRASH && !read_number(strtok_r(NULL, SPACE, rest), &rule.amount))
        return fail(reader, "a code or a number of seconds is missing");
    for (char *word = strtok_r(NULL, SPACE, rest); word != NULL; word = strtok_r(NULL, SPACE, rest)) {
        unsigned long *count = strcmp(word, "after") == 0 ? &rule.after : strcmp(word, "for") == 0 ? &rule.times : NULL;
        if (count == NULL || !read_count(strtok_r(NULL, SPACE, rest), count))
            return fail(reader, "after N or for M was expected");
    }
    if (script->rule_count == MAX_RULES)
        return fail(reader, "too many rules");
    script->rules[script->rule_count++] = rule;
    return true;
}

/* KIND PID TIMELINE */
static bool read_process(struct reader *reader, char **rest)
{
    static const char *const lists[] = {[COMPUTE] = "compute", [GRAPHICS] = "graphics", [MPS] = "mps"};
    int list = find_name(strtok_r(NULL, SPACE, rest), lists, 3);
    const char *pid = strtok_r(NULL, SPACE, rest);
    unsigned long number = 0;
    if (list < 0)
        return fail(reader, "compute, graphics or mps was expected");
    bool worker = pid != NULL && strcmp(pid, "@worker") == 0;
    if (!worker && !read_count(pid, &number))
        return fail(reader, "a process id or @worker was expected");
    if (reader->unit->process_count == MAX_PROCESSES)
        return fail(reader, "too many processes");
    struct process *process = &reader->unit->processes[reader->unit->process_count++];
    *process = (struct process){.list = (enum process_list)list, .pid = worker ? WORKER : (long)number};
    return read_timeline(reader, rest, true, &process->memory_mib);
}

static bool read_counts_reserved(struct reader *reader, char **rest, bool *includes)
{
    static const char *const choices[] = {"excludes_reserved", "includes_reserved"};
    int choice = find_name(strtok_r(NULL, SPACE, rest), choices, 2);
    *includes = choice == 1;
    return choice >= 0 || fail(reader, "includes_reserved or excludes_reserved was expected");
}

/* The values that hold where a script says nothing; all others are then unknown. */
static bool set_defaults(struct script *script, struct unit *unit)
{
    static const struct { enum value value; double is; } defaults[] = {
        {VALUE_reserved_mib, 0}, {VALUE_energy, 1}, {VALUE_energy_tick, 0.1}, {VALUE_energy_start_j, 1000},
        {VALUE_mig, 0},          {VALUE_gi, 0},     {VALUE_ci, 0},
    };
    for (size_t i = 0; i < sizeof defaults / sizeof *defaults; i++) {
        struct timeline *timeline = &unit->values[defaults[i].value];
        timeline->first = script->point_count;
        if (!add_point(script, timeline, (struct point){.kind = KNOWN, .value = defaults[i].is}))
            return false;
    }
    return true;
}

/* `device N` and `mig_device N`: in order and without gaps, so that N is the index that NVML gives. */
static bool begin_unit(struct reader *reader, char **rest, bool mig)
{
    struct script *script = reader->script;
    unsigned long index;
    int device = 0, instance = 0;
    for (size_t i = 0; i < script->unit_count; i++)
        device += script->units[i].mig < 0;
    if (mig) {
        if (device == 0)
            return fail(reader, "mig_device before the first device");
        instance = script->units[script->unit_count - 1].mig + 1;
    }
    if (!read_count(strtok_r(NULL, SPACE, rest), &index) || index != (unsigned long)(mig ? instance : device))
        return fail(reader, "devices are numbered from 0 in order");
    if (script->unit_count == MAX_UNITS || (mig ? instance >= MAX_MIG : device >= MAX_DEVICES))
        return fail(reader, "too many devices");
    reader->unit = &script->units[script->unit_count++];
    *reader->unit = (struct unit){
        .device = mig ? device - 1 : device,
        .mig = mig ? instance : -1,
        .capability = {NAN, NAN},
        .power_limits_w = {NAN, NAN, NAN},
        .v1_includes_reserved = true,
    };
    return set_defaults(script, reader->unit) || fail(reader, "out of memory");
}

static bool read_unit_line(struct reader *reader, const char *key, char **rest)
{
    struct unit *unit = reader->unit;
    if (unit == NULL)
        return fail(reader, "unknown, or of a device and before the first one");
    int value = find_name(key, value_names, VALUE_COUNT);
    if (value >= 0)
        return read_timeline(reader, rest, false, &unit->values[value]);
    if (strcmp(key, "name") == 0)
        return read_text(reader, rest, unit->name);
    if (strcmp(key, "uuid") == 0)
        return read_text(reader, rest, unit->uuid);
    if (strcmp(key, "pci") == 0)
        return read_text(reader, rest, unit->pci);
    if (strcmp(key, "vbios") == 0)
        return read_text(reader, rest, unit->vbios);
    if (strcmp(key, "capability") == 0)
        return read_numbers(reader, rest, unit->capability, 2);
    if (strcmp(key, "power_limits_w") == 0)
        return read_numbers(reader, rest, unit->power_limits_w, 3);
    if (strcmp(key, "v1_used") == 0)
        return read_counts_reserved(reader, rest, &unit->v1_includes_reserved);
    if (strcmp(key, "v2_used") == 0)
        return read_counts_reserved(reader, rest, &unit->v2_includes_reserved);
    if (strcmp(key, "process") == 0)
        return read_process(reader, rest);
    return fail(reader, "unknown");
}

static bool read_line(struct reader *reader, char *line)
{
    struct script *script = reader->script;
    double number;
    char *rest;
    line[strcspn(line, "#")] = '\0';
    const char *key = strtok_r(line, SPACE, &rest);
    if (key == NULL)
        return true;

    bool good;
    if (strcmp(key, "driver") == 0) {
        good = read_text(reader, &rest, script->driver);
    } else if (strcmp(key, "epoch") == 0) {
        good = read_numbers(reader, &rest, &script->epoch, 1)
               && (isfinite(script->epoch) || fail(reader, "a time is missing"));
    } else if (strcmp(key, "cuda") == 0) {
        good = read_numbers(reader, &rest, &number, 1);
        script->cuda = good && isfinite(number) ? (int)number : 0;
    } else if (strcmp(key, "init_error") == 0) {
        good = read_numbers(reader, &rest, &number, 1);
        script->init_error = good && isfinite(number) ? (int)number : 0;
    } else if (strcmp(key, "offset_pid") == 0) {
        good = read_numbers(reader, &rest, &number, 1);
        script->offset_pid = good && isfinite(number) ? (long)number : 0;
    } else if (strcmp(key, "entry_bytes") == 0) {
        good = read_numbers(reader, &rest, &number, 1);
        if (good && number != 24 && number != 32)
            good = fail(reader, "entries of 24 and of 32 bytes exist");
        script->entry_bytes = good ? (size_t)number : 24;
    } else if (strcmp(key, "fail") == 0) {
        good = read_rule(reader, &rest, FAIL);
    } else if (strcmp(key, "latency") == 0) {
        good = read_rule(reader, &rest, LATENCY);
    } else if (strcmp(key, "crash") == 0) {
        good = read_rule(reader, &rest, CRASH);
    } else if (strcmp(key, "device") == 0) {
        good = begin_unit(reader, &rest, false);
    } else if (strcmp(key, "mig_device") == 0) {
        good = begin_unit(reader, &rest, true);
    } else {
        good = read_unit_line(reader, key, &rest);
    }
    if (good && strtok_r(NULL, SPACE, &rest) != NULL)
        return fail(reader, "too much on one line");
    return good;
}

struct script *script_read(FILE *file, const char *path)
{
    struct reader reader = {.script = calloc(1, sizeof *reader.script)};
    char *line = NULL, *copy = NULL;
    size_t size = 0, number = 0;
    bool good = reader.script != NULL;
    if (good)
        reader.script->entry_bytes = 24;
    while (good && getline(&line, &size, file) >= 0) {
        number++;
        free(copy);
        copy = strdup(line); /* reading takes the line apart, and the message shows it whole */
        if (copy == NULL || !read_line(&reader, line)) {
            good = false;
            fprintf(stderr, "stand-in for NVML: %s, line %zu: %s: %s", path, number,
                    reader.wrong != NULL ? reader.wrong : "out of memory", copy != NULL ? copy : "\n");
            fflush(stderr);
        }
    }
    free(line);
    free(copy);
    if (!good) {
        script_free(reader.script);
        return NULL;
    }
    return reader.script;
}

void script_free(struct script *script)
{
    if (script != NULL)
        free(script->points);
    free(script);
}

struct point timeline_at(const struct script *script, struct timeline timeline, double time)
{
    if (timeline.count == 0)
        return (struct point){.kind = UNKNOWN};
    const struct point *found = &script->points[timeline.first];
    for (size_t i = 1; i < timeline.count && script->points[timeline.first + i].at <= time; i++)
        found = &script->points[timeline.first + i];
    return *found;
}

double timeline_integral(const struct script *script, struct timeline timeline, double time)
{
    const struct point *points = &script->points[timeline.first];
    double sum = 0;
    for (size_t i = 0; i < timeline.count; i++) {
        double from = i == 0 ? 0 : fmax(0, points[i].at);
        double to = i + 1 < timeline.count ? fmin(time, points[i + 1].at) : time;
        if (points[i].kind == KNOWN && to > from)
            sum += points[i].value * (to - from);
    }
    return sum;
}
