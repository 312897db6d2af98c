// Reads of the clocks without a system call, preloaded into every program of the guest: its kernel has no vDSO, and a
// system call takes about twenty microseconds there.

#define _GNU_SOURCE
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>
#include <x86intrin.h>

#define NS_PER_S 1000000000ull
#define TRIES 5

// Nanoseconds per tick of the time stamp counter, times 2^32.
#ifndef NS_PER_TICK_32
#define NS_PER_TICK_32 0ull
#endif

// What the clock showed at a tick, for CLOCK_REALTIME and CLOCK_MONOTONIC.
static struct {
    unsigned long long ticks, ns;
} known[2];

unsigned long long ticks(void) {
    _mm_lfence();
    return __rdtsc();
}

__attribute__((constructor)) static void begin(void) {
    for (clockid_t id = CLOCK_REALTIME; id <= CLOCK_MONOTONIC; id++) {
        unsigned long long shortest = ~0ull;
        for (int i = 0; i < TRIES; i++) {
            struct timespec now;
            unsigned long long before = ticks();
            syscall(SYS_clock_gettime, id, &now);
            unsigned long long took = ticks() - before;
            if (took < shortest) {
                shortest = took;
                known[id].ticks = before + took / 2;
                known[id].ns = now.tv_sec * NS_PER_S + now.tv_nsec;
            }
        }
    }
}

int clock_gettime(clockid_t id, struct timespec *now) {
    if (id < CLOCK_REALTIME || id > CLOCK_MONOTONIC || NS_PER_TICK_32 == 0 || known[id].ticks == 0) {
        return syscall(SYS_clock_gettime, id, now);
    }
    unsigned __int128 passed = ticks() - known[id].ticks;
    unsigned long long ns = known[id].ns + (unsigned long long)(passed * NS_PER_TICK_32 >> 32);
    now->tv_sec = ns / NS_PER_S;
    now->tv_nsec = ns % NS_PER_S;
    return 0;
}
