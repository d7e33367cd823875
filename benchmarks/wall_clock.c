/* A wall clock that jumps, for one process and its children: built as a shared library and named in LD_PRELOAD.

   WALL_CLOCK names a file of eight bytes, a native int64: the seconds by which CLOCK_REALTIME is shifted, read anew at
   every call. Monotonic clocks stay as they are. As in a kernel whose clock was set, a wait for a time of day ends
   when the shifted clock says so, even if it jumps meanwhile; waits are cut into slices for that, which callers see as
   the spurious wake-ups that they must expect anyhow. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/futex.h>
#include <pthread.h>
#include <semaphore.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <sys/time.h>
#include <time.h>
#include <unistd.h>

#define SLICE 50000000 /* ns */

static const volatile int64_t *offset;
static long (*real_syscall)(long, ...);

__attribute__((constructor)) static void begin(void) {
    const char *name = getenv("WALL_CLOCK");
    int file = name ? open(name, O_RDONLY | O_CLOEXEC) : -1;
    void *there = file < 0 ? MAP_FAILED : mmap(NULL, sizeof *offset, PROT_READ, MAP_SHARED, file, 0);
    if (there == MAP_FAILED) {
        static const char text[] = "wall_clock: WALL_CLOCK names no file of eight bytes\n";
        if (write(2, text, sizeof text - 1)) {}
        _exit(127);
    }
    close(file);
    offset = there;
    real_syscall = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
}

/* The kernel's own clock. Before `begin` the offset is 0. */
static struct timespec kernel_clock(clockid_t which) {
    static int (*real)(clockid_t, struct timespec *);
    struct timespec now;
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    real(which, &now);
    return now;
}

static int is_wall(clockid_t which) { return which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE; }

static struct timespec wall(void) {
    struct timespec now = kernel_clock(CLOCK_REALTIME);
    if (offset) now.tv_sec += *offset;
    return now;
}

int clock_gettime(clockid_t which, struct timespec *out) {
    static int (*real)(clockid_t, struct timespec *);
    if (is_wall(which)) {
        *out = wall();
        return 0;
    }
    if (!real) real = (int (*)(clockid_t, struct timespec *))dlsym(RTLD_NEXT, "clock_gettime");
    return real(which, out);
}

int gettimeofday(struct timeval *restrict out, void *restrict zone) {
    struct timespec now = wall();
    (void)zone;
    out->tv_sec = now.tv_sec;
    out->tv_usec = now.tv_nsec / 1000;
    return 0;
}

time_t time(time_t *out) {
    time_t now = wall().tv_sec;
    if (out) *out = now;
    return now;
}

/* Nanoseconds that the shifted clock has still to go, at most a slice; 0 if `until` is over. */
static int64_t slice(const struct timespec *until) {
    struct timespec now = wall();
    if (until->tv_sec - now.tv_sec > 1) return SLICE;
    int64_t left = (until->tv_sec - now.tv_sec) * 1000000000LL + until->tv_nsec - now.tv_nsec;
    return left < 0 ? 0 : left > SLICE ? SLICE : left;
}

static struct timespec kernel_time_in(int64_t ns) {
    struct timespec at = kernel_clock(CLOCK_REALTIME);
    at.tv_nsec += ns;
    at.tv_sec += at.tv_nsec / 1000000000;
    at.tv_nsec %= 1000000000;
    return at;
}

int pthread_cond_timedwait(pthread_cond_t *restrict cond, pthread_mutex_t *restrict mutex,
                           const struct timespec *restrict until) {
    static int (*real)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *);
    /* Without a version dlsym gives the condition variables of glibc 2.2. */
    if (!real) real = (int (*)(pthread_cond_t *, pthread_mutex_t *, const struct timespec *))
            dlvsym(RTLD_NEXT, "pthread_cond_timedwait", "GLIBC_2.3.2");
    /* Which clock it waits on, a condition variable does not tell; one that counts from the boot is decades behind. */
    if (until->tv_sec < 1000000000) return real(cond, mutex, until);
    int64_t ns = slice(until);
    struct timespec at = kernel_time_in(ns);
    int code = real(cond, mutex, &at);
    return code == ETIMEDOUT && slice(until) > 0 ? 0 : code;
}

int sem_timedwait(sem_t *restrict sem, const struct timespec *restrict until) {
    static int (*real)(sem_t *, const struct timespec *);
    if (!real) real = (int (*)(sem_t *, const struct timespec *))dlsym(RTLD_NEXT, "sem_timedwait");
    for (;;) {
        int64_t ns = slice(until);
        struct timespec at = kernel_time_in(ns);
        int code = real(sem, &at);
        if (code == 0 || errno != ETIMEDOUT || slice(until) == 0) return code;
    }
}

int clock_nanosleep(clockid_t which, int flags, const struct timespec *until, struct timespec *left) {
    static int (*real)(clockid_t, int, const struct timespec *, struct timespec *);
    if (!real) real = (int (*)(clockid_t, int, const struct timespec *, struct timespec *))
            dlsym(RTLD_NEXT, "clock_nanosleep");
    if (!is_wall(which) || !(flags & TIMER_ABSTIME)) return real(which, flags, until, left);
    for (int64_t ns; (ns = slice(until)) > 0;) {
        struct timespec nap = {0, ns};
        int code = real(CLOCK_MONOTONIC, 0, &nap, NULL);
        if (code) return code;
    }
    return 0;
}

/* Abseil, and with it gRPC and TensorStore, waits by the futex call itself. */
long syscall(long number, ...) {
    va_list list;
    long a[6];
    va_start(list, number);
    for (int i = 0; i < 6; i++) a[i] = va_arg(list, long);
    va_end(list);
    if (!real_syscall) real_syscall = (long (*)(long, ...))dlsym(RTLD_NEXT, "syscall");
    const struct timespec *until = (const struct timespec *)a[3];
    if (number == SYS_futex && (a[1] & FUTEX_CMD_MASK) == FUTEX_WAIT_BITSET && (a[1] & FUTEX_CLOCK_REALTIME) && until) {
        int64_t ns = slice(until);
        struct timespec at = kernel_time_in(ns);
        long code = real_syscall(number, a[0], a[1], a[2], (long)&at, a[4], a[5]);
        return code == -1 && errno == ETIMEDOUT && slice(until) > 0 ? 0 : code;
    }
    return real_syscall(number, a[0], a[1], a[2], a[3], a[4], a[5]);
}
