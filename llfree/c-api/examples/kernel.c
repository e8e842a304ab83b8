/* A kernel's use: a table in static memory, one handle, holes in RAM set aside.
 *
 *     cargo build --release -p llfree-c
 *     cc -Illfree/c-api/include llfree/c-api/examples/kernel.c target/release/libllfree_c.a -lpthread -ldl -lm
 */
#include <llfree.h>
#include <stdio.h>
#include <stdlib.h>

enum { HUGE_FRAMES = 128 }; /* 256 MiB of RAM */

static _Alignas(LLFREE_REGION_ALIGN) unsigned char region[64 * 1024];

static void must(llfree_status status)
{
    if (status != LLFREE_OK) {
        fprintf(stderr, "error: %s\n", llfree_strerror(status));
        exit(1);
    }
}

int main(void)
{
    llfree_table table;
    llfree_cpu cpu;
    llfree_stats_t stats;
    uint64_t page, huge;

    must(llfree_init(&table, region, sizeof region, HUGE_FRAMES, LLFREE_INIT_FREE));
    must(llfree_reserve(&table, 512, 1300)); /* the kernel's image, from 2 MiB on */

    must(llfree_cpu_init(&cpu, &table));
    must(llfree_cpu_alloc(&cpu, 0, &page));
    must(llfree_cpu_alloc(&cpu, LLFREE_HUGE_ORDER, &huge));
    printf("a page at %#llx, 2 MiB at %#llx\n", (unsigned long long)(page * LLFREE_FRAME_SIZE),
           (unsigned long long)(huge * LLFREE_FRAME_SIZE));
    must(llfree_cpu_free(&cpu, page, 0));
    must(llfree_cpu_free(&cpu, huge, LLFREE_HUGE_ORDER));
    must(llfree_cpu_destroy(&cpu));

    must(llfree_stats(&table, &stats));
    printf("%llu of %llu frames free\n", (unsigned long long)stats.free_frames, (unsigned long long)stats.frames);
    return stats.frames - stats.free_frames == 1300 ? 0 : 1;
}
