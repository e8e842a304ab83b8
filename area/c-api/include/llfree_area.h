/*
 * Large objects of a process whose free memory goes back to the system by itself.
 *
 * An llfree_objects is an area of memory of a size that is chosen once; objects of 64 KiB and more are
 * allocated in it and freed by any thread, without a system call. What stays free for some tenths of a
 * second goes back, unless LLFREE_AREA_KEEP says otherwise. Who frees an object or
 * resizes it says what it was allocated with, as with C++'s sized delete.
 *
 * Threads: every function may be called by any number of threads at once, except for
 * llfree_objects_destroy(), after which nobody may use the objects or what was allocated in them.
 *
 * A null llfree_objects, sizes of 0 and alignments that are none are errors, not crashes. A pointer
 * that was not allocated here, or was freed, cannot always be told: that is undefined, as with free().
 *
 * Link with libllfree_area_c.a -lpthread -ldl -lm.
 */
#ifndef LLFREE_AREA_H
#define LLFREE_AREA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

/* What a call returns: LLFREE_AREA_OK, or what is wrong. */
typedef int32_t llfree_area_status;
#define LLFREE_AREA_OK 0
/* Nothing as large is free, side by side; or the system has no memory or address space. */
#define LLFREE_AREA_ERR_NO_MEMORY (-1)
/* A null pointer, a size of 0, an alignment that is no power of two or above 2 MiB, no such flag. */
#define LLFREE_AREA_ERR_ARGUMENT (-2)
/* The pointer is none of these objects. */
#define LLFREE_AREA_ERR_FOREIGN (-3)
/* A forked child, which has a copy of private memory and nothing of a memory file. */
#define LLFREE_AREA_ERR_FORKED (-4)
/* A keeper has the area. */
#define LLFREE_AREA_ERR_REGISTERED (-5)
/* There is no keeper, or it refused. */
#define LLFREE_AREA_ERR_KEEPER (-6)
/* The kernel refused, or the table says otherwise: somebody wrote to it. */
#define LLFREE_AREA_ERR_SYSTEM (-7)
/* The file cannot be made, opened or brought to the disk; or it is no area, or one of another version. */
#define LLFREE_AREA_ERR_FILE (-8)
/* There is no such file, or no such directory. */
#define LLFREE_AREA_ERR_ABSENT (-9)
/* There is such a file already. */
#define LLFREE_AREA_ERR_EXISTS (-10)
/* This or another process has it open as an area. */
#define LLFREE_AREA_ERR_IN_USE (-11)
/* The machine went down while it was open, or before it was on the disk: nothing in it can be relied on. */
#define LLFREE_AREA_ERR_TORN (-12)

/* Private memory, which a forked child has a copy of; the default. */
#define LLFREE_AREA_PRIVATE 0
/* A memory file, which a keeper can take memory from. A forked child does not have it. */
#define LLFREE_AREA_FILE 1
/* Added to one of these: nothing goes back by itself. */
#define LLFREE_AREA_KEEP 16

/* Large objects in an area of their own. */
typedef struct llfree_objects llfree_objects;
/* The right to have an area registered with a keeper. */
typedef struct llfree_registration llfree_registration;

/* Bytes. */
typedef struct {
	uint64_t size;
	/* What may be used; less than the size after llfree_objects_limit(). */
	uint64_t limit;
	/* Memory behind it, by the kernel's account. */
	uint64_t resident;
	/* Allocated, what threads keep for their next allocation included. */
	uint64_t used;
	/* Free memory that llfree_objects_reclaim() would give back. */
	uint64_t reclaimable;
} llfree_area_stats;

/* Objects in a new area of at least this size; address space only. */
llfree_area_status llfree_objects_create(uint64_t size, uint32_t flags, llfree_objects **objects);
/* The end of the objects and of all that was allocated in them. Null is none. */
void llfree_objects_destroy(llfree_objects *objects);

/* Memory of this size and alignment, which is a power of two up to 2 MiB; null if there is none. */
void *llfree_objects_alloc(const llfree_objects *objects, size_t size, size_t align);
/* The same, all of it zero; what comes from the kernel is not written. */
void *llfree_objects_alloc_zeroed(const llfree_objects *objects, size_t size, size_t align);
/* Another size for memory of this size: where it is if that can be, else elsewhere, with what it held.
 * Null if there is no memory; then it is as it was. */
void *llfree_objects_realloc(const llfree_objects *objects, void *start, size_t size, size_t align, size_t new_size);
/* Frees what was allocated with this size and alignment. Null is nothing. */
llfree_area_status llfree_objects_free(const llfree_objects *objects, void *start, size_t size, size_t align);

/* Gives at most this much free memory back now; how much it was goes to `freed` unless that is null. */
llfree_area_status llfree_objects_reclaim(const llfree_objects *objects, uint64_t bytes, uint64_t *freed);
/* Moves the limit; the one that was reached goes to `actual` unless that is null. */
llfree_area_status llfree_objects_limit(const llfree_objects *objects, uint64_t bytes, uint64_t *actual);
/* What there is. */
llfree_area_status llfree_objects_stats(const llfree_objects *objects, llfree_area_stats *stats);

/* Lets the keeper at this socket take memory back, under a name. */
llfree_area_status llfree_objects_register(const llfree_objects *objects, const char *path, const char *name,
					   llfree_registration **registration);
/* The end of it: the process takes its memory back by itself again. Null is none. */
void llfree_registration_end(llfree_registration *registration);

/*
 * Areas in named files, which are there when their process has ended, in whichever way. Addresses are others each
 * time; offsets stay. The root is a number of the user's, 0 in a new file, where its records begin.
 *
 * Write an object's contents, then the record of it; clear the record, then free the object. After a kill
 * something may be allocated that no record names: llfree_objects_open_at() frees that if it is given a function that
 * says what is owned. `flags` is 0 or LLFREE_AREA_KEEP.
 */

/* Whether what is allocated at this offset has an owner. `memory` is where the area begins: read there, write nothing.
 * `bytes` is 4096 or 2 MiB, a part of an object. It may not call functions of this header. */
typedef int llfree_area_owned(void *context, const void *memory, uint64_t root, uint64_t offset, uint64_t bytes);

/* Objects in a new file, of its own area of at least this size. */
llfree_area_status llfree_objects_create_at(const char *path, uint64_t size, uint32_t flags, llfree_objects **objects);
/* Those in a file that is there. `owned`, unless it is null, is called for all that is allocated. */
llfree_area_status llfree_objects_open_at(const char *path, uint32_t flags, llfree_area_owned *owned, void *context,
					  llfree_objects **objects);
/* The end of the objects, all of them on the disk: the file can be opened when the machine was down meanwhile. After
 * llfree_objects_destroy(), or a kill, it can be as long as the machine stays up. Null is none. Whatever this
 * returns, they are not to be used any more. */
llfree_area_status llfree_objects_close(llfree_objects *objects);
/* The root; 0 where there is no file. */
uint64_t llfree_objects_root(const llfree_objects *objects);
/* Sets it; all that was written before is in the file before it is. */
llfree_area_status llfree_objects_set_root(const llfree_objects *objects, uint64_t root);
/* The address of an offset; null outside the area. */
void *llfree_objects_at(const llfree_objects *objects, uint64_t offset);
/* The offset of an address; UINT64_MAX outside the area. */
uint64_t llfree_objects_offset(const llfree_objects *objects, const void *start);

/* What a status means; never null. */
const char *llfree_area_strerror(llfree_area_status status);

#ifdef __cplusplus
}
#endif

#endif
