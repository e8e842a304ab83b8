/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What the files of the module share: an area, and who may touch which part of
 * it when.
 */
#ifndef VLLFREE_H
#define VLLFREE_H

#include <linux/atomic.h>
#include <linux/kref.h>
#include <linux/list.h>
#include <linux/list_lru.h>
#include <linux/mm.h>
#include <linux/mutex.h>
#include <linux/nodemask.h>
#include <linux/notifier.h>
#include <linux/shrinker.h>
#include <linux/workqueue.h>

#include "llfree.h"
#include "llfree_entry.h"
#include "patience.h"

#define HUGE_SHIFT		(PAGE_SHIFT + LLFREE_ORDER)
#define MAX_HUGE_FRAMES		(1U << 25)
/* Huge frames that are counted together, 256 MiB: what a count's look is at. */
#define CHUNK			128U
/* What one call may look at, however many areas and frames there are. */
#define CHUNKS_A_CALL		1024

/* A part of the process's memory that is pinned and mapped here. */
struct pinned {
	struct page **pages;
	unsigned long nr;
	void *mapping;
};

/* What was seen of CHUNK huge frames when they were looked at last. */
struct chunk {
	atomic_t free;		/* free, with memory */
	u16 skipped;		/* left alone until the next look; lock */
};

/* Of a huge frame, apart from its entry. Guarded by area->lock. */
struct note {
	u8 age;			/* looks in a row that found it free */
	u8 skip : 1;		/* leave it alone until the next look */
	u8 swapped : 1;		/* it has swap, which the next look lets go */
	u8 place;		/* all of it is on that one's node, from 1; or 0 */
};

/*
 * An area's place in the lists that reclaim walks: one a node, in the cgroup
 * that attached it.
 */
struct place {
	struct list_head spare;
	struct list_head headroom;	/* in its list only if there is any */
	struct area *area;
	int nid;
	/* Frames that were seen to be on this node, since the last look. */
	atomic_long_t here;
	struct asked asked;		/* lock of the headroom's list */
};

struct area {
	struct kref ref;
	/*
	 * Reclaim tries it, tick by tick for a while: never where `waits` says
	 * that whoever has it may wait for folios.
	 */
	struct mutex lock;
	bool waits;		/* changed with lock */
	bool reclaims;		/* changed with lock: a scan has it */
	struct waited waited;
	bool dead;		/* guarded by lock */
	u32 huge_frames;
	u32 nr_chunks;
	u32 headroom;		/* free frames that are not spare */
	struct file *memory;
	struct mm_struct *mm;	/* whose locked memory the pinned pages are */
	pid_t pid;

	/*
	 * The table, which the process writes at any time. Each word is read
	 * once, changed by one compare-and-exchange, and believed as far as
	 * that its owner has itself to thank.
	 */
	struct pinned pinned_entries, pinned_marks, pinned_epoch;
	u16 *entries;
	u8 *marks;
	atomic64_t *return_epoch;

	struct note *notes;
	struct chunk *chunks;
	/* Those with frames free for as long as `grace` says, a bit each; lock */
	unsigned long *old;
	atomic_long_t free;	/* sum of the chunks' */
	atomic_long_t located;	/* sum of the places' `here` */
	atomic_t look_at;	/* the chunk that a count looks at next */
	u32 cursor;		/* the chunk that a scan begins at; lock */
	bool has_swapped;	/* lock */

	struct delayed_work look;
	bool look_missed;	/* it found the area busy; changed by it alone */
	unsigned long aged_at;	/* lock */
	unsigned long kicked_at;
	struct list_head all;
	struct llfree_status stats;	/* lock, but read without */
	u64 spare_taken;	/* frames; lock, but read without */
	atomic64_t busy;
	int nr_places, max_places;
	struct place *places[];
};

static inline u32 chunk_frames(struct area *area, u32 chunk)
{
	return min(CHUNK, area->huge_frames - chunk * CHUNK);
}

/* places.c */
int places_init(void);
void places_exit(void);
bool places_are_ready(void);
int area_enlist(struct area *area);
void area_delist(struct area *area);
void area_release(struct kref *ref);

extern struct list_lru spare_places, headroom_places;
/* Listed ones with headroom. */
extern atomic_t areas_with_headroom;

/* reclaim.c */
unsigned long spare_count(struct shrinker *unused, struct shrink_control *sc);
unsigned long spare_scan(struct shrinker *unused, struct shrink_control *sc);
unsigned long headroom_count(struct shrinker *unused,
			     struct shrink_control *sc);
unsigned long headroom_scan(struct shrinker *unused, struct shrink_control *sc);
unsigned int area_reclaim(struct area *area, unsigned int want, u32 *chunks);

extern struct notifier_block last_resort;
extern unsigned int grace;
extern atomic64_t count_calls, count_ns, scan_calls, scan_ns;

/* look.c: with the area's lock, but for the first two. */
void chunk_recount(struct area *area, u32 chunk);
void area_look_for_more(struct area *area);
void area_look(struct area *area, bool aging);
void frame_locate(struct area *area, struct note *note, u8 place);
bool frame_is_elsewhere(struct area *area, u32 huge, struct place *place);

/* discard.c: with the area's lock. */
bool frame_change(struct area *area, u32 huge,
		  bool (*transition)(u16 entry, u16 *next));
unsigned int frames_discard(struct area *area, const u32 *frames,
			    unsigned int nr, unsigned long *freed);
void frame_let_swap_go(struct area *area, u32 huge);

#endif
