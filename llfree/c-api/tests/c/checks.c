/* Every function of the header, right and wrong, from C; ends with the first line that does not hold. */
#include "check.h"
#include <llfree.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define HUGE_FRAMES 40u
#define FRAMES (HUGE_FRAMES * 512ull)

static uint64_t free_frames(const llfree_table *table)
{
    llfree_stats_t stats;
    CHECK(llfree_stats(table, &stats) == LLFREE_OK);
    CHECK(stats.frames == FRAMES);
    return stats.free_frames;
}

static void *new_region(void)
{
    size_t bytes = llfree_region_bytes(HUGE_FRAMES);
    void *region = aligned_alloc(LLFREE_REGION_ALIGN, bytes);
    CHECK(bytes % LLFREE_REGION_ALIGN == 0 && region);
    memset(region, 0xa5, bytes);
    return region;
}

static void blocks_come_and_go(void)
{
    llfree_table table;
    llfree_cpu cpu;
    uint64_t frame, other;
    uint32_t order, huge = 7;
    void *region = new_region();

    CHECK(llfree_init(&table, region, llfree_region_bytes(HUGE_FRAMES), HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_OK);
    CHECK(llfree_cpu_init(&cpu, &table) == LLFREE_OK);
    for (order = 0; order <= LLFREE_MAX_ORDER; order++) {
        CHECK(llfree_cpu_alloc(&cpu, order, &frame) == LLFREE_OK);
        CHECK(frame % (1ull << order) == 0 && frame + (1ull << order) <= FRAMES);
        CHECK(llfree_cpu_free(&cpu, frame, order) == LLFREE_OK);
        CHECK(llfree_cpu_free(&cpu, frame, order) == LLFREE_ERR_NOT_ALLOCATED);
        CHECK(llfree_alloc(&table, order, &frame) == LLFREE_OK);
        CHECK(llfree_confirm(&table, frame, order) == LLFREE_OK);
        CHECK(llfree_free(&table, frame, order) == LLFREE_OK);
    }
    CHECK(llfree_cpu_alloc_class(&cpu, 0, LLFREE_CLASS_IMMOVABLE, &frame) == LLFREE_OK);
    CHECK(llfree_cpu_alloc_class(&cpu, 0, LLFREE_CLASS_MOVABLE, &other) == LLFREE_OK);
    CHECK(frame / 512 != other / 512);
    CHECK(free_frames(&table) < FRAMES - 2);
    CHECK(llfree_cpu_drain(&cpu) == LLFREE_OK);
    CHECK(free_frames(&table) == FRAMES - 2);
    CHECK(llfree_alloc_at(&table, frame, 0) == LLFREE_ERR_NOT_FREE);
    CHECK(llfree_cpu_free(&cpu, frame, 0) == LLFREE_OK);
    CHECK(llfree_cpu_free(&cpu, other, 0) == LLFREE_OK);
    CHECK(llfree_cpu_destroy(&cpu) == LLFREE_OK);

    CHECK(llfree_reserve(&table, 700, 2000) == LLFREE_OK);
    CHECK(llfree_reserve(&table, 0, 701) == LLFREE_ERR_NOT_FREE);
    CHECK(free_frames(&table) == FRAMES - 2000);
    CHECK(llfree_alloc_at(&table, 4096, 10) == LLFREE_OK);
    while (llfree_alloc(&table, 0, &frame) == LLFREE_OK) {
    }
    CHECK(llfree_alloc(&table, 0, &frame) == LLFREE_ERR_NO_MEMORY);
    CHECK(free_frames(&table) == 0);
    CHECK(llfree_validate(&table, NULL) == LLFREE_OK);

    /* Somebody overwrites the first entry. */
    memset((char *)region + 64, 0x7f, 2);
    CHECK(llfree_validate(&table, &huge) == LLFREE_ERR_CORRUPT && huge == 0);
    free(region);
}

static int calls;

static int count(void *context, uint32_t huge)
{
    calls++;
    *(uint32_t *)context = huge;
    return 0;
}

static int fail(void *context, uint32_t huge)
{
    (void)context, (void)huge;
    return -1;
}

static void evicted_blocks_wait_for_their_host(void)
{
    llfree_table table, other;
    llfree_host host;
    uint8_t residency[HUGE_FRAMES] = {0};
    uint64_t frame;
    uint32_t seen = 99, huge;
    size_t bytes = llfree_region_bytes(HUGE_FRAMES);
    void *region = new_region();

    CHECK(llfree_init(&table, region, bytes, HUGE_FRAMES, LLFREE_INIT_EVICTED) == LLFREE_OK);
    CHECK(llfree_host_init(&host, &table, residency, sizeof residency - 1) == LLFREE_ERR_LENGTH);
    CHECK(llfree_host_init(&host, &table, residency, sizeof residency) == LLFREE_OK);

    CHECK(llfree_alloc(&table, 10, &frame) == LLFREE_EVICTED);
    CHECK(llfree_confirm(&table, frame, 10) == LLFREE_EVICTED);
    huge = (uint32_t)(frame / LLFREE_FRAMES_PER_HUGE);
    CHECK(llfree_host_install(&host, huge, fail, NULL) == LLFREE_ERR_CALLBACK);
    CHECK(llfree_host_install(&host, huge, count, &seen) == LLFREE_OK && seen == huge && calls == 1);
    CHECK(llfree_confirm(&table, frame, 10) == LLFREE_EVICTED);
    CHECK(llfree_host_install(&host, huge + 1, count, &seen) == LLFREE_OK && calls == 2);
    CHECK(llfree_host_install(&host, huge + 1, fail, NULL) == LLFREE_OK); /* there already */
    CHECK(llfree_confirm(&table, frame, 10) == LLFREE_OK);
    CHECK(llfree_host_reclaim(&host, huge, 1, count, &seen) == LLFREE_ERR_REFUSED);

    /* Another view of the same table, as another process has it. */
    CHECK(llfree_init(&other, region, bytes, HUGE_FRAMES, LLFREE_INIT_JOINED) == LLFREE_OK);
    CHECK(llfree_free(&other, frame, 10) == LLFREE_OK);
    CHECK(llfree_host_reclaim(&host, huge, 0, fail, NULL) == LLFREE_ERR_CALLBACK);
    CHECK(llfree_confirm(&table, frame, 9) == LLFREE_OK);
    CHECK(llfree_host_reclaim(&host, huge, 0, count, &seen) == LLFREE_OK && calls == 3);
    CHECK(llfree_alloc_at(&table, frame, 9) == LLFREE_EVICTED);
    CHECK(llfree_host_reclaim(&host, huge + 1, 1, count, &seen) == LLFREE_OK && calls == 4);
    CHECK(llfree_alloc_at(&table, frame + 512, 9) == LLFREE_ERR_NOT_FREE);
    CHECK(llfree_host_install(&host, huge + 1, NULL, NULL) == LLFREE_ERR_REFUSED);
    CHECK(llfree_host_release(&host, huge + 1) == LLFREE_OK);
    CHECK(llfree_host_release(&host, huge + 1) == LLFREE_ERR_REFUSED);
    CHECK(llfree_alloc_at(&table, frame + 512, 9) == LLFREE_EVICTED);
    CHECK(llfree_host_release(&host, HUGE_FRAMES) == LLFREE_ERR_RANGE);
    CHECK(llfree_validate(&table, NULL) == LLFREE_OK);
    free(region);
}

/* Refused while the host has the last free huge frame in hand, twice. */
static int ask_and_fail(void *context, uint32_t huge)
{
    uint64_t frame;

    (void)huge;
    CHECK(llfree_alloc(context, 3, &frame) == LLFREE_ERR_NO_MEMORY);
    CHECK(llfree_alloc(context, 3, &frame) == LLFREE_ERR_NO_MEMORY);
    return -1;
}

static void what_a_failed_discard_gives_back_is_found(void)
{
    llfree_table table;
    llfree_host host;
    uint8_t residency[HUGE_FRAMES] = {0};
    uint64_t frame, first;
    uint32_t huge, seen;
    void *region = new_region();

    CHECK(llfree_init(&table, region, llfree_region_bytes(HUGE_FRAMES), HUGE_FRAMES, LLFREE_INIT_EVICTED) == LLFREE_OK);
    CHECK(llfree_host_init(&host, &table, residency, sizeof residency) == LLFREE_OK);
    CHECK(llfree_alloc(&table, 9, &first) == LLFREE_EVICTED);
    while (llfree_alloc(&table, 9, &frame) == LLFREE_EVICTED) {
    }
    huge = (uint32_t)(first / LLFREE_FRAMES_PER_HUGE);
    CHECK(llfree_host_install(&host, huge, count, &seen) == LLFREE_OK);
    CHECK(llfree_free(&table, first, 9) == LLFREE_OK);
    CHECK(llfree_host_reclaim(&host, huge, 1, ask_and_fail, &table) == LLFREE_ERR_CALLBACK);
    CHECK(llfree_alloc(&table, 3, &frame) == LLFREE_OK && frame == first);
    free(region);
}

static void mistakes_are_named(void)
{
    llfree_table table, zero;
    llfree_cpu cpu, none;
    llfree_host host;
    uint64_t frame = 0;
    size_t bytes = llfree_region_bytes(HUGE_FRAMES);
    unsigned char *region = new_region();

    memset(&zero, 0, sizeof zero);
    memset(&none, 0, sizeof none);
    memset(&host, 0, sizeof host);
    CHECK(llfree_region_bytes(0) == 0 && llfree_region_bytes(LLFREE_MAX_HUGE_FRAMES + 1u) == 0);
    CHECK(llfree_init(&table, NULL, bytes, HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_ERR_NULL);
    CHECK(llfree_init(NULL, region, bytes, HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_ERR_NULL);
    CHECK(llfree_init(&table, region + 8, bytes, HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_ERR_POINTER);
    CHECK(llfree_init((llfree_table *)((char *)&table + 1), region, bytes, HUGE_FRAMES, 0) == LLFREE_ERR_POINTER);
    CHECK(llfree_init(&table, region, bytes - 1, HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_ERR_LENGTH);
    CHECK(llfree_init(&table, region, bytes, 0, LLFREE_INIT_FREE) == LLFREE_ERR_HUGE_FRAMES);
    CHECK(llfree_init(&table, region, bytes, HUGE_FRAMES, LLFREE_INIT_JOINED + 1) == LLFREE_ERR_ARGUMENT);
    CHECK(region[0] == 0xa5 && region[bytes - 1] == 0xa5);
    CHECK(llfree_init(&table, region, bytes, HUGE_FRAMES, LLFREE_INIT_ALLOCATED) == LLFREE_OK);
    CHECK(free_frames(&table) == 0);
    CHECK(llfree_free(&table, 512, 9) == LLFREE_OK);

    CHECK(llfree_alloc(&zero, 0, &frame) == LLFREE_ERR_HANDLE);
    CHECK(llfree_alloc(NULL, 0, &frame) == LLFREE_ERR_NULL);
    CHECK(llfree_alloc(&table, 0, NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_alloc(&table, LLFREE_MAX_ORDER + 1, &frame) == LLFREE_ERR_ARGUMENT);
    CHECK(llfree_alloc_at(&table, FRAMES, 0) == LLFREE_ERR_RANGE);
    CHECK(llfree_alloc_at(&table, 1, 1) == LLFREE_ERR_ALIGNMENT);
    CHECK(llfree_free(&table, UINT64_MAX, 0) == LLFREE_ERR_RANGE);
    CHECK(llfree_confirm(&table, FRAMES, 0) == LLFREE_ERR_RANGE);
    CHECK(llfree_confirm(&table, 1, 9) == LLFREE_ERR_ALIGNMENT);
    CHECK(llfree_stats(&table, NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_reserve(&table, 0, UINT64_MAX) == LLFREE_ERR_NOT_FREE);

    CHECK(llfree_cpu_init(&cpu, &zero) == LLFREE_ERR_HANDLE);
    CHECK(llfree_cpu_alloc(&none, 0, &frame) == LLFREE_ERR_HANDLE);
    CHECK(llfree_cpu_drain(NULL) == LLFREE_ERR_NULL);
    CHECK(llfree_cpu_init(&cpu, &table) == LLFREE_OK);
    CHECK(llfree_cpu_alloc_class(&cpu, 0, LLFREE_CLASSES, &frame) == LLFREE_ERR_ARGUMENT);
    CHECK(llfree_cpu_alloc(&cpu, 0, &frame) == LLFREE_OK);
    CHECK(llfree_cpu_destroy(&cpu) == LLFREE_OK);
    CHECK(llfree_cpu_destroy(&cpu) == LLFREE_ERR_HANDLE);
    CHECK(llfree_cpu_free(&cpu, frame, 0) == LLFREE_ERR_HANDLE);
    CHECK(free_frames(&table) == 511);
    CHECK(llfree_host_release(&host, 0) == LLFREE_ERR_HANDLE);
    CHECK(llfree_host_init(&host, &table, NULL, HUGE_FRAMES) == LLFREE_ERR_NULL);
    CHECK(strcmp(llfree_strerror(LLFREE_OK), "success") == 0);
    CHECK(strstr(llfree_strerror(12345), "no status"));
    free(region);
}

static void *work(void *argument)
{
    const llfree_table *table = argument;
    llfree_cpu cpu;
    uint64_t frames[200];
    int round, i;

    CHECK(llfree_cpu_init(&cpu, table) == LLFREE_OK);
    for (round = 0; round < 300; round++) {
        for (i = 0; i < 200; i++) {
            CHECK(llfree_cpu_alloc(&cpu, (uint32_t)(i % 4), &frames[i]) == LLFREE_OK);
        }
        for (i = 0; i < 200; i++) {
            CHECK(llfree_cpu_free(&cpu, frames[i], (uint32_t)(i % 4)) == LLFREE_OK);
        }
    }
    CHECK(llfree_cpu_destroy(&cpu) == LLFREE_OK);
    return NULL;
}

static void threads_share_a_table(void)
{
    llfree_table table;
    pthread_t threads[3];
    int i;
    void *region = new_region();

    CHECK(llfree_init(&table, region, llfree_region_bytes(HUGE_FRAMES), HUGE_FRAMES, LLFREE_INIT_FREE) == LLFREE_OK);
    for (i = 0; i < 3; i++) {
        CHECK(pthread_create(&threads[i], NULL, work, &table) == 0);
    }
    for (i = 0; i < 3; i++) {
        CHECK(pthread_join(threads[i], NULL) == 0);
    }
    CHECK(free_frames(&table) == FRAMES);
    CHECK(llfree_validate(&table, NULL) == LLFREE_OK);
    free(region);
}

int main(void)
{
    blocks_come_and_go();
    evicted_blocks_wait_for_their_host();
    what_a_failed_discard_gives_back_is_found();
    mistakes_are_named();
    threads_share_a_table();
    return 0;
}
