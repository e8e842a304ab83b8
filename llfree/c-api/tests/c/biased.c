/* Handles that others drain while their threads sleep, from C; ends with the first line that does not hold. */
#define _GNU_SOURCE
#include "check.h"
#include <linux/membarrier.h>
#include <llfree.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <unistd.h>

#define HUGE_FRAMES 40u
#define FRAMES (HUGE_FRAMES * 512ull)
#define SLEEPERS (LLFREE_BIASED_TOGETHER + 6)

static llfree_table table;
static llfree_biased handles[SLEEPERS];
static llfree_biased *all[SLEEPERS];

static uint64_t free_frames(void)
{
    llfree_stats_t stats;
    CHECK(llfree_stats(&table, &stats) == LLFREE_OK);
    return stats.free_frames;
}

static size_t drain(size_t count, int only_idle)
{
    size_t drained = 999;
    CHECK(llfree_biased_drain(all, count, only_idle, &drained) == LLFREE_OK);
    return drained;
}

/* Fences that count, and one that there is none of. */
static int own_fence(void *context)
{
    atomic_fetch_add((atomic_uint *)context, 1);
    return syscall(SYS_membarrier, MEMBARRIER_CMD_PRIVATE_EXPEDITED, 0, 0) == 0 ? 0 : -1;
}

static int no_fence(void *context)
{
    atomic_fetch_add((atomic_uint *)context, 1);
    return -1;
}

static void use(llfree_biased *handle, uint32_t order)
{
    uint64_t frame;
    CHECK(llfree_biased_alloc(handle, order, &frame) == LLFREE_OK);
    CHECK(frame % (1ull << order) == 0 && frame + (1ull << order) <= FRAMES);
    CHECK(llfree_biased_free(handle, frame, order) == LLFREE_OK);
    CHECK(llfree_biased_free(handle, frame, order) == LLFREE_ERR_NOT_ALLOCATED);
}

/* A thread that worked, sleeps in the middle, and goes on afterwards. */
static pthread_barrier_t asleep, awake;
static atomic_int over;

static void *sleep_and_go_on(void *argument)
{
    llfree_biased *handle = argument;
    use(handle, 0);
    pthread_barrier_wait(&asleep);
    pthread_barrier_wait(&awake);
    use(handle, 0);
    return NULL;
}

/* One that works all the time. */
static void *work(void *argument)
{
    llfree_biased *handle = argument;
    uint64_t frames[100];
    int i;
    do {
        for (i = 0; i < 100; i++) {
            CHECK(llfree_biased_alloc(handle, (uint32_t)(i % 3), &frames[i]) == LLFREE_OK);
        }
        for (i = 0; i < 100; i++) {
            CHECK(llfree_biased_free(handle, frames[i], (uint32_t)(i % 3)) == LLFREE_OK);
        }
    } while (!atomic_load(&over));
    return NULL;
}

static void what_sleeps_is_drained_while_others_work(llfree_fence_fn fence, atomic_uint *fences)
{
    pthread_t sleeper, worker;
    size_t drained = 0;
    int i;

    for (i = 0; i < 2; i++) {
        CHECK(llfree_biased_init(&handles[i], &table, fence, fences) == LLFREE_OK);
    }
    CHECK(pthread_barrier_init(&asleep, NULL, 2) == 0 && pthread_barrier_init(&awake, NULL, 2) == 0);
    CHECK(pthread_create(&sleeper, NULL, sleep_and_go_on, &handles[0]) == 0);
    pthread_barrier_wait(&asleep);
    CHECK(free_frames() < FRAMES); /* what it caches */
    atomic_store(&over, 0);
    CHECK(pthread_create(&worker, NULL, work, &handles[1]) == 0);
    CHECK(drain(1, 0) == 1);
    CHECK(drain(1, 1) == 0); /* takes note */
    CHECK(drain(1, 1) == 1 && drain(1, 1) == 0);
    /* The one at work loses nothing by it, whenever that is. */
    for (i = 0; i < 5000; i++) {
        drained += drain(2, 0);
    }
    CHECK(drained >= 5000);
    atomic_store(&over, 1);
    CHECK(pthread_join(worker, NULL) == 0);
    CHECK(drain(2, 0) == 2);
    CHECK(free_frames() == FRAMES);
    pthread_barrier_wait(&awake);
    CHECK(pthread_join(sleeper, NULL) == 0);
    CHECK(free_frames() < FRAMES);
    for (i = 0; i < 2; i++) {
        CHECK(llfree_biased_destroy(&handles[i]) == LLFREE_OK);
    }
    CHECK(free_frames() == FRAMES);
}

static void many_are_drained_for_one_fence(atomic_uint *fences)
{
    atomic_uint others = 0;
    int i;

    for (i = 0; i < SLEEPERS; i++) {
        CHECK(llfree_biased_init(&handles[i], &table, own_fence, fences) == LLFREE_OK);
        use(&handles[i], 0);
    }
    atomic_store(fences, 0);
    CHECK(free_frames() < FRAMES);
    CHECK(drain(LLFREE_BIASED_TOGETHER, 0) == LLFREE_BIASED_TOGETHER && atomic_load(fences) == 1);
    CHECK(drain(SLEEPERS, 0) == SLEEPERS && atomic_load(fences) == 3);
    CHECK(free_frames() == FRAMES);

    /* One whose fence fails, in the middle. */
    CHECK(llfree_biased_destroy(&handles[3]) == LLFREE_OK);
    CHECK(llfree_biased_init(&handles[3], &table, no_fence, &others) == LLFREE_OK);
    use(&handles[3], 0);
    atomic_store(fences, 0);
    CHECK(drain(6, 0) == 5 && atomic_load(fences) == 2 && atomic_load(&others) == 1);
    CHECK(free_frames() < FRAMES);
    use(&handles[3], 9); /* its owner goes on */
    for (i = 0; i < SLEEPERS; i++) {
        CHECK(llfree_biased_destroy(&handles[i]) == LLFREE_OK);
    }
    CHECK(free_frames() == FRAMES);
}

static void mistakes_are_named(void)
{
    static llfree_biased none;
    llfree_biased *two[2] = {&handles[0], &none};
    llfree_table zero;
    uint64_t frame;
    size_t drained = 7;

    memset(&zero, 0, sizeof zero);
    CHECK(llfree_biased_init(&handles[0], &zero, NULL, NULL) == LLFREE_ERR_HANDLE);
    CHECK(llfree_biased_init(NULL, &table, NULL, NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_biased_init(&handles[0], &table, NULL, NULL) == LLFREE_OK);
    use(&handles[0], LLFREE_MAX_ORDER);
    CHECK(llfree_biased_alloc_class(&handles[0], 0, LLFREE_CLASS_MOVABLE, &frame) == LLFREE_OK);
    CHECK(llfree_biased_alloc_class(&handles[0], 0, LLFREE_CLASSES, &frame) == LLFREE_ERR_ARGUMENT);
    CHECK(llfree_biased_alloc(&handles[0], LLFREE_MAX_ORDER + 1, &frame) == LLFREE_ERR_ARGUMENT);
    CHECK(llfree_biased_alloc(&handles[0], 0, NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_biased_alloc(&none, 0, &frame) == LLFREE_ERR_HANDLE);
    CHECK(llfree_biased_free(&handles[0], FRAMES, 0) == LLFREE_ERR_RANGE);
    CHECK(llfree_biased_free(&none, frame, 0) == LLFREE_ERR_HANDLE);

    CHECK(llfree_biased_drain(NULL, 1, 0, NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_biased_drain(two, 2, 0, &drained) == LLFREE_ERR_HANDLE && drained == 7);
    CHECK(free_frames() < FRAMES - 1); /* not even the first */
    two[1] = NULL;
    CHECK(llfree_biased_drain(two, 2, 0, &drained) == LLFREE_ERR_NULL && drained == 7);
    CHECK(llfree_biased_drain(two, 1, 0, (size_t *)((char *)&drained + 1)) == LLFREE_ERR_POINTER);
    CHECK(free_frames() < FRAMES - 1);
    CHECK(llfree_biased_drain(two, 0, 0, &drained) == LLFREE_OK && drained == 0);
    CHECK(llfree_biased_drain(two, 1, 0, NULL) == LLFREE_OK);
    CHECK(free_frames() == FRAMES - 1);
    CHECK(llfree_biased_free(&handles[0], frame, 0) == LLFREE_OK);
    CHECK(llfree_biased_destroy(&handles[0]) == LLFREE_OK);
    CHECK(llfree_biased_destroy(&handles[0]) == LLFREE_ERR_HANDLE);
    CHECK(free_frames() == FRAMES);
}

int main(void)
{
    size_t bytes = llfree_region_bytes(HUGE_FRAMES);
    void *region = aligned_alloc(LLFREE_REGION_ALIGN, bytes);
    atomic_uint fences = 0;
    int i;

    CHECK(region && llfree_init(&table, region, bytes, HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_OK);
    for (i = 0; i < SLEEPERS; i++) {
        all[i] = &handles[i];
    }
    mistakes_are_named();
    what_sleeps_is_drained_while_others_work(NULL, NULL);
    if (syscall(SYS_membarrier, MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED, 0, 0) == 0) {
        what_sleeps_is_drained_while_others_work(own_fence, &fences);
        CHECK(atomic_load(&fences) > 5000);
        many_are_drained_for_one_fence(&fences);
    } else {
        puts("no membarrier");
    }
    CHECK(llfree_validate(&table, NULL) == LLFREE_OK);
    free(region);
    return 0;
}
