/*
 * llfree: a lock-free page-frame allocator whose state two parties may share.
 *
 * Memory is counted in frames of 4 KiB from its own start; a block of order o is 2^o frames, o from
 * 0 to 10 (4 KiB to 4 MiB), and begins at a multiple of its size. 512 frames are a huge frame
 * (2 MiB), which is what a host reclaims and installs.
 *
 * The library allocates nothing and makes no system call: the caller provides the memory of a table
 * (llfree_region_bytes(), aligned to LLFREE_REGION_ALIGN) and of each handle. Both must stay where
 * they are for as long as they are used. No call waits for another party.
 *
 * Threads: a llfree_table may be used by any number of threads at once. A llfree_cpu belongs to one
 * thread at a time; an interrupt handler needs one of its own, or calls llfree_alloc() and
 * llfree_free(), which need none. A llfree_biased belongs to one thread at a time likewise, except that
 * any thread may drain it.
 *
 * Every call checks what it can: null and misaligned pointers, handles that were never initialised
 * or are destroyed, orders, ranges, double frees. A pointer to anything else cannot be checked.
 */
#ifndef LLFREE_H
#define LLFREE_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns: LLFREE_OK, LLFREE_EVICTED, or what is wrong (negative). */
typedef int32_t llfree_status;
#define LLFREE_OK 0
/* The block is the caller's, but no memory backs it yet: have the host install it, then
 * llfree_confirm(); or free it. It must not be touched before. */
#define LLFREE_EVICTED 1
/* No free block of this order is left. */
#define LLFREE_ERR_NO_MEMORY (-1)
/* The block does not lie in the table. */
#define LLFREE_ERR_RANGE (-2)
/* A block of this order cannot start at this frame. */
#define LLFREE_ERR_ALIGNMENT (-3)
/* Somebody owns a frame of the block, or the host holds it. */
#define LLFREE_ERR_NOT_FREE (-4)
/* No such block is allocated: a double free, or an order on the other side of 9. */
#define LLFREE_ERR_NOT_ALLOCATED (-5)
/* A huge frame's words contradict each other: something overwrote the table. */
#define LLFREE_ERR_CORRUPT (-6)
/* No order from 0 to LLFREE_MAX_ORDER, no class below LLFREE_CLASSES, no initial state. */
#define LLFREE_ERR_ARGUMENT (-7)
/* A pointer that is needed is null. */
#define LLFREE_ERR_NULL (-8)
/* A pointer is not aligned to its type, or the region not to LLFREE_REGION_ALIGN. */
#define LLFREE_ERR_POINTER (-9)
/* The number of huge frames is out of range: 1 to LLFREE_MAX_HUGE_FRAMES. */
#define LLFREE_ERR_HUGE_FRAMES (-10)
/* The region is shorter than llfree_region_bytes(), or there are too few bytes of residency. */
#define LLFREE_ERR_LENGTH (-11)
/* A table, handle or host that was not initialised, or is destroyed. */
#define LLFREE_ERR_HANDLE (-12)
/* Another thread of the host is at this huge frame: try again. */
#define LLFREE_ERR_BUSY (-13)
/* The huge frame is not in a state to do this: in use, held, not held, evicted already. */
#define LLFREE_ERR_REFUSED (-14)
/* The callback failed; the huge frame is as it was. */
#define LLFREE_ERR_CALLBACK (-15)

#define LLFREE_FRAME_SIZE 4096
#define LLFREE_HUGE_SIZE 2097152
#define LLFREE_FRAMES_PER_HUGE 512
#define LLFREE_HUGE_ORDER 9
#define LLFREE_MAX_ORDER 10
/* 64 TiB of memory. */
#define LLFREE_MAX_HUGE_FRAMES 33554432
#define LLFREE_REGION_ALIGN 64
/* Frames that a handle holds back at most; to everybody else they are allocated. */
#define LLFREE_HANDLE_FRAMES 192
/* Handles that llfree_biased_drain() drains for one fence. */
#define LLFREE_BIASED_TOGETHER 64

/* What a new table says (llfree_init). */
/* All memory is free, with memory behind it: a kernel's RAM. */
#define LLFREE_INIT_FREE 0
/* All memory is free, and nothing is behind it until a host installs it. */
#define LLFREE_INIT_EVICTED 1
/* All memory is allocated in blocks of order 9: free what may be used. */
#define LLFREE_INIT_ALLOCATED 2
/* What the region says, from whatever used it before and is gone by now. */
#define LLFREE_INIT_KEPT 3
/* What others made of it, who may be at work: nothing is written. */
#define LLFREE_INIT_JOINED 4

/* What an allocation is for: classes are kept apart, so that huge frames come free again. Others up
 * to LLFREE_CLASSES - 1 are the caller's own. */
#define LLFREE_CLASS_IMMOVABLE 0
#define LLFREE_CLASS_MOVABLE 1
#define LLFREE_CLASS_HUGE 2
#define LLFREE_CLASSES 7

#define LLFREE_TABLE_WORDS 32
#define LLFREE_CPU_WORDS 256
#define LLFREE_BIASED_WORDS 320
#define LLFREE_HOST_WORDS 32

/* A table, seen from this address space. Its contents are the library's. */
typedef struct llfree_table { uint64_t words[LLFREE_TABLE_WORDS]; } llfree_table;
/* One CPU's handle. */
typedef struct llfree_cpu { uint64_t words[LLFREE_CPU_WORDS]; } llfree_cpu;
/* One CPU's handle that others may drain. */
typedef struct llfree_biased { uint64_t words[LLFREE_BIASED_WORDS]; } llfree_biased;
/* The side that takes memory back. */
typedef struct llfree_host { uint64_t words[LLFREE_HOST_WORDS]; } llfree_host;

/* A table added up. Exact when nobody is at work; frames that handles hold back count as allocated. */
typedef struct llfree_stats_t {
    uint64_t frames;            /* frames in the table */
    uint64_t free_frames;       /* free ones, evicted included, held not */
    uint64_t free_huge;         /* huge frames that are wholly free */
    uint64_t free_evicted_huge; /* of those, with nothing behind them */
    uint64_t allocated_huge;    /* huge frames allocated as a whole */
    uint64_t partial_huge;      /* huge frames with both free and allocated frames */
    uint64_t evicted_huge;      /* huge frames with nothing behind them, held included */
    uint64_t held_huge;         /* huge frames that the host took */
} llfree_stats_t;

/* ---- The table ---------------------------------------------------------------------------- */

/* Bytes of a region for this many huge frames (some 33 KiB per GiB); 0 if the number is out of range. */
size_t llfree_region_bytes(uint32_t huge_frames);

/* Lays a table of huge_frames out in the first llfree_region_bytes() bytes of region and brings it
 * into a state (LLFREE_INIT_*). Unless that is LLFREE_INIT_JOINED, nobody else may use the region
 * meanwhile. The region must outlive the table; there is nothing to destroy. */
llfree_status llfree_init(llfree_table *table, void *region, size_t bytes, uint32_t huge_frames, uint32_t initial);

/* Allocates a block without a handle. *frame is its first frame, for LLFREE_OK and LLFREE_EVICTED. */
llfree_status llfree_alloc(const llfree_table *table, uint32_t order, uint64_t *frame);

/* Allocates the block that starts at frame: LLFREE_OK or LLFREE_EVICTED. */
llfree_status llfree_alloc_at(const llfree_table *table, uint64_t frame, uint32_t order);

/* Allocates exactly these frames, or none: holes in RAM, an image, a tail that is not whole. They are
 * freed in parts: whole huge frames with order 9, what is around them with smaller orders. */
llfree_status llfree_reserve(const llfree_table *table, uint64_t first, uint64_t frames);

/* Frees a block without a handle. */
llfree_status llfree_free(const llfree_table *table, uint64_t frame, uint32_t order);

/* After an install: LLFREE_OK if memory is behind all of a block that the caller owns, else
 * LLFREE_EVICTED. The host's writes to that memory are visible by then. */
llfree_status llfree_confirm(const llfree_table *table, uint64_t frame, uint32_t order);

/* Adds the table up. */
llfree_status llfree_stats(const llfree_table *table, llfree_stats_t *stats);

/* Checks every huge frame while nobody is at work: LLFREE_OK or LLFREE_ERR_CORRUPT, and then *huge,
 * unless it is null, is the first one that is wrong. */
llfree_status llfree_validate(const llfree_table *table, uint32_t *huge);

/* ---- A CPU's handle: the fast way ---------------------------------------------------------- */

/* Makes a handle. Any number may exist, each works best on one CPU. One that was initialised before
 * is overwritten: destroy it first, or the frames it has reserved stay taken. */
llfree_status llfree_cpu_init(llfree_cpu *cpu, const llfree_table *table);

/* Allocates a block in the usual class of its order: LLFREE_OK or LLFREE_EVICTED. */
llfree_status llfree_cpu_alloc(llfree_cpu *cpu, uint32_t order, uint64_t *frame);

/* The same for a class (LLFREE_CLASS_*). A class decides where to look, never whether there is memory. */
llfree_status llfree_cpu_alloc_class(llfree_cpu *cpu, uint32_t order, uint32_t class_number, uint64_t *frame);

/* Frees a block, whoever allocated it. */
llfree_status llfree_cpu_free(llfree_cpu *cpu, uint64_t frame, uint32_t order);

/* Gives the frames back that the handle caches: before a CPU sleeps, or when memory is short. */
llfree_status llfree_cpu_drain(llfree_cpu *cpu);

/* Drains the handle and ends it; its memory is the caller's again. */
llfree_status llfree_cpu_destroy(llfree_cpu *cpu);

/* ---- A CPU's handle that others drain while its CPU sleeps --------------------------------- */

/* What a sleeping CPU's handle caches is out of everybody's reach, as only its owner may use a
 * llfree_cpu. Any thread may drain a llfree_biased: its owner says in each call that it is at work, which
 * costs it next to nothing if others have a heavy fence, and goes without the handle while others drain
 * it. Nobody waits for anybody. */

/* Has every other thread or CPU that uses a handle made with this function and context pass a full memory
 * fence: membarrier() with MEMBARRIER_CMD_PRIVATE_EXPEDITED in a process that has registered for it, an
 * interrupt of the other CPUs in a kernel. Anything but 0 if it did not: then nothing is drained. It may
 * be called by any thread that drains, by several at once, and calls nothing of this library. */
typedef int (*llfree_fence_fn)(void *context);

/* Makes a handle. Without heavy (NULL) each call of its owner has a full fence, which is all that drains
 * need then. One that was initialised before is overwritten, as with llfree_cpu_init(). */
llfree_status llfree_biased_init(llfree_biased *biased, const llfree_table *table, llfree_fence_fn heavy,
                                 void *context);

/* What llfree_cpu_alloc(), _alloc_class() and _free() do, for the owner: one thread at a time, and no
 * interrupt handler on top of it. While others drain the handle they are llfree_alloc() and llfree_free(),
 * which find no frame that it caches, and leave the class to the order. */
llfree_status llfree_biased_alloc(llfree_biased *biased, uint32_t order, uint64_t *frame);
llfree_status llfree_biased_alloc_class(llfree_biased *biased, uint32_t order, uint32_t class_number, uint64_t *frame);
llfree_status llfree_biased_free(llfree_biased *biased, uint64_t frame, uint32_t order);

/* Has count handles give the frames back that they cache, from any thread: each that its owner and others
 * do not use at this moment, while the rest are left as they are. With only_idle only those that were not
 * used since the last such call, once until they are used again: called every second it drains what slept
 * for so long. Calls heavy once for LLFREE_BIASED_TOGETHER handles side by side that have the same function
 * and context. *drained, unless it is null, is how many were drained, which may be none for LLFREE_OK.
 * LLFREE_ERR_NULL, _POINTER or _HANDLE if handles or one of them is none: then nothing is drained. Nobody
 * may destroy one of them meanwhile. */
llfree_status llfree_biased_drain(llfree_biased *const *handles, size_t count, int only_idle, size_t *drained);

/* Drains the handle and ends it, when nobody uses or drains it any more; its memory is the caller's again. */
llfree_status llfree_biased_destroy(llfree_biased *biased);

/* ---- The host: takes memory back ----------------------------------------------------------- */

/* Changes the memory behind a huge frame; anything but 0 is a failure. */
typedef int (*llfree_memory_fn)(void *context, uint32_t huge);

/* Makes the host's side of a table. residency has a byte a huge frame, is the host's alone, and says
 * what the host knows: zero for a table that began as LLFREE_INIT_EVICTED, one in each byte if as
 * LLFREE_INIT_FREE or LLFREE_INIT_ALLOCATED. It must outlive the host; there is nothing to destroy. */
llfree_status llfree_host_init(llfree_host *host, const llfree_table *table, uint8_t *residency, size_t bytes);

/* Takes a free huge frame's memory: evicts it, or with hold holds it too, so that the tenant cannot
 * have it. discard is called if there is memory behind it, and while nobody else can get there. */
llfree_status llfree_host_reclaim(const llfree_host *host, uint32_t huge, int hold, llfree_memory_fn discard,
                                  void *context);

/* Gives a held huge frame back to the tenant, evicted. */
llfree_status llfree_host_release(const llfree_host *host, uint32_t huge);

/* Puts memory behind a huge frame: populate is called unless there is some already, and has to leave
 * zeroed memory. LLFREE_ERR_REFUSED for a held one. */
llfree_status llfree_host_install(const llfree_host *host, uint32_t huge, llfree_memory_fn populate, void *context);

/* ---- Text ---------------------------------------------------------------------------------- */

/* What a status means, in a sentence that is never null and never freed. */
const char *llfree_strerror(llfree_status status);

#ifdef __cplusplus
}
#endif

#endif
