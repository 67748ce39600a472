/* Finds the process that trains: a real GPU lists it only once TensorFlow holds a context, so that is looked for. */
#define _GNU_SOURCE
#include "stand_in.h"

#include <dirent.h>
#include <fcntl.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

static const char COMMAND[] = "mpscale.worker.__main__";
static const char THREAD[] = "tf_"; /* TensorFlow names its threads so, and starts them with its context */
static const double SCAN_EVERY_S = 0.02;

struct entry {
    long pid, parent;
    char state;
};

/* The start of a file of /proc; its length, or -1. */
static ssize_t slurp(const char *path, char *text, size_t size)
{
    int file = open(path, O_RDONLY | O_CLOEXEC);
    if (file < 0)
        return -1;
    ssize_t length = read(file, text, size - 1);
    close(file);
    if (length >= 0)
        text[length] = '\0';
    return length;
}

static bool read_entry(long pid, struct entry *entry)
{
    char path[64], text[512];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    if (slurp(path, text, sizeof text) <= 0)
        return false;
    char *after_name = strrchr(text, ')'); /* the name may itself hold spaces and brackets */
    entry->pid = pid;
    return after_name != NULL && sscanf(after_name + 1, " %c %ld", &entry->state, &entry->parent) == 2;
}

static bool alive(char state)
{
    return state != 'Z' && state != 'X';
}

static bool is_worker(long pid)
{
    char path[64], text[4096];
    snprintf(path, sizeof path, "/proc/%ld/cmdline", pid);
    ssize_t length = slurp(path, text, sizeof text);
    if (length <= 0 || memmem(text, (size_t)length, COMMAND, strlen(COMMAND)) == NULL)
        return false;

    snprintf(path, sizeof path, "/proc/%ld/task", pid);
    DIR *tasks = opendir(path);
    bool found = false;
    for (struct dirent *task; tasks != NULL && !found && (task = readdir(tasks)) != NULL;) {
        snprintf(path, sizeof path, "/proc/%ld/task/%.20s/comm", pid, task->d_name);
        found = slurp(path, text, sizeof text) > 0 && strncmp(text, THREAD, strlen(THREAD)) == 0;
    }
    if (tasks != NULL)
        closedir(tasks);
    return found;
}

static bool descends(const struct entry *entries, size_t count, long pid, long ancestor)
{
    /* A list that was read while processes came and went may hold a circle, so the steps are counted. */
    for (size_t steps = 0; steps < count; steps++) {
        size_t i = 0;
        while (i < count && entries[i].pid != pid)
            i++;
        if (i == count)
            return false;
        pid = entries[i].parent;
        if (pid == ancestor)
            return true;
    }
    return false;
}

static long scan(void)
{
    struct entry *entries = NULL;
    size_t count = 0;
    DIR *proc = opendir("/proc");
    for (struct dirent *file; proc != NULL && (file = readdir(proc)) != NULL;) {
        struct entry entry;
        long pid = atol(file->d_name);
        if (pid <= 0 || !read_entry(pid, &entry))
            continue;
        struct entry *more = realloc(entries, (count + 1) * sizeof *more);
        if (more == NULL)
            break;
        entries = more;
        entries[count++] = entry;
    }
    if (proc != NULL)
        closedir(proc);

    long found = 0;
    for (size_t i = 0; i < count && found == 0; i++)
        if (entries[i].pid != getpid() && alive(entries[i].state) && descends(entries, count, entries[i].pid, getppid())
            && is_worker(entries[i].pid))
            found = entries[i].pid;
    free(entries);
    return found;
}

long worker_find(double now, double *since)
{
    static long worker;
    static double first_seen, last_scan = -1;
    struct entry entry;
    if (worker != 0 && (!read_entry(worker, &entry) || !alive(entry.state)))
        worker = 0;
    if (worker == 0 && (last_scan < 0 || now - last_scan >= SCAN_EVERY_S)) {
        last_scan = now;
        worker = scan();
        first_seen = now;
    }
    *since = first_seen;
    return worker;
}
