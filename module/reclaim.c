// SPDX-License-Identifier: GPL-2.0
/*
 * What the shrinkers do: from whose areas memory is taken, in which cgroup and
 * on which node, how much there is (a count) and which frames go (a scan).
 *
 * Reclaim may come here from under any allocation. So an area is tried, and a
 * busy one passed over after a while; for what waits below see discard.c.
 */
#include <linux/bitmap.h>
#include <linux/fs.h>
#include <linux/list_lru.h>
#include <linux/notifier.h>
#include <linux/sched/signal.h>
#include <linux/shrinker.h>
#include <linux/swap.h>
#include <linux/timekeeping.h>
#include <linux/version.h>

#include "vllfree.h"

/* What one call may look at, however many areas and frames there are. */
#define AREAS_A_CALL		64
/*
 * A count's own looks, a chunk an area, and how soon it asks for a whole one.
 * Reclaim of a cgroup counts 13 times a round, and has 17 rounds in vain before
 * anybody is killed: by then 1300 chunks were looked at, whoever else runs.
 */
#define LOOKS_A_COUNT		6
#define KICK_INTERVAL		(HZ / 10)
/*
 * Chunks that a scan looks at to know what is beyond an area's headroom: of up
 * to 16 GiB all. What a batch takes is a hundred times of that.
 */
#define LOOKS_A_SCAN		64U
/* With less than this known to be free, a count looks for more. */
#define POOR			(BATCH * LLFREE_PAGES)

unsigned int grace = 2;
module_param(grace, uint, 0644);
MODULE_PARM_DESC(grace, "looks, one a second, for which a frame was free before it is taken first");
static bool timing;
module_param(timing, bool, 0644);
MODULE_PARM_DESC(timing, "count the time that it takes");

atomic64_t count_calls, count_ns, scan_calls, scan_ns;

/* Changed by the notifier alone, of which there is one call at a time. */
static struct alarms alarms;
static atomic64_t headroom_yielded;	/* frames, of all areas */

/* Progress that the kernel cannot see in its lists. */
static void account_reclaimed(unsigned long pages)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 4, 0)
	if (current->reclaim_state)
		current->reclaim_state->reclaimed_slab += pages;
#else
	mm_account_reclaimed_pages(pages);
#endif
}

static u64 now(void)
{
	return timing ? ktime_get_mono_fast_ns() : 0;
}

/* --- A scan of an area --- */

/* What a scan may take: also headroom if the process itself asks for it. */
enum part { SPARE, HEADROOM, ANY };

/* What a scan may do yet, and has done. */
struct scan {
	enum part of;
	struct place *place;	/* NULL: any node */
	unsigned int want;	/* frames */
	unsigned int chunks;	/* to look at */
	unsigned int evicted;	/* frames */
	unsigned long freed;	/* pages */
	u32 frames[BATCH];
	unsigned int held;
	struct patience patience;
	unsigned long freed_by_others;	/* pages, while it waited */
};

static void settle(struct area *area, struct scan *scan)
{
	u64 start = now();

	if (!scan->held)
		return;
	scan->evicted += frames_discard(area, scan->frames, scan->held,
					&scan->freed);
	scan->held = 0;
	if (start)
		area->stats.discard_ns += now() - start;
}

static void scan_chunk(struct area *area, u32 chunk, unsigned int age,
		       struct scan *scan)
{
	u32 first = chunk * CHUNK, nr = chunk_frames(area, chunk), i;

	for (i = first; i < first + nr && scan->want; i++) {
		struct note *note = &area->notes[i];

		if (!llfree_is_resident(READ_ONCE(area->entries[i]))) {
			frame_locate(area, note, 0);
			continue;
		}
		if (note->skip || note->age < age)
			continue;
		if (scan->place && area->nr_places > 1 &&
		    frame_is_elsewhere(area, i, scan->place))
			continue;
		if (!frame_change(area, i, llfree_hold))
			continue;
		scan->want--;
		scan->frames[scan->held++] = i;
		if (scan->held == BATCH)
			settle(area, scan);
	}
}

/*
 * The first chunk with old frames of those that are `i` or more behind `start`,
 * around the end, as the number that it is behind it. nr_chunks: there is none.
 */
static u32 next_old(struct area *area, u32 start, u32 i)
{
	u32 nr = area->nr_chunks, before_end = nr - start, chunk;

	if (i < before_end) {
		chunk = find_next_bit(area->old, nr, start + i);
		if (chunk < nr)
			return chunk - start;
		i = before_end;
	}
	chunk = find_next_bit(area->old, start, i - before_end);
	return chunk < start ? chunk + before_end : nr;
}

/* Frames that are free beyond the headroom, as the table has it now. */
static unsigned int spare_frames(struct area *area)
{
	unsigned int i;

	for (i = 0; i < min(area->nr_chunks, LOOKS_A_SCAN); i++)
		area_look_for_more(area);
	return max(atomic_long_read(&area->free) - (long)area->headroom, 0L);
}

/*
 * First what was free for long, then all: with little pressure only the former
 * is ever reached. Bounded by the chunks that may be looked at, and by a bit
 * for each of the others. Whether it is the shrinker's or the device was asked
 * for it, other reclaim waits for it.
 */
static void scan_area(struct area *area, struct scan *scan)
{
	unsigned int before = scan->evicted, left = 0, pass, i;

	WRITE_ONCE(area->reclaims, true);
	if (scan->of == SPARE && area->headroom) {
		unsigned int most = min(scan->want, spare_frames(area));

		left = scan->want - most;
		scan->want = most;
	}
	for (pass = 0; pass < 2; pass++) {
		u32 start = area->cursor;

		for (i = 0; scan->want && scan->chunks; i++) {
			u32 chunk;

			if (!pass)
				i = next_old(area, start, i);
			if (i >= area->nr_chunks)
				break;
			chunk = (start + i) % area->nr_chunks;
			scan->chunks--;
			area->cursor = chunk;
			scan_chunk(area, chunk, pass ? 0 : grace, scan);
			if (!pass && scan->want)
				__clear_bit(chunk, area->old);
			chunk_recount(area, chunk);
		}
		settle(area, scan);
	}
	scan->want += left;
	if (scan->of == HEADROOM) {
		area->stats.yielded += scan->evicted - before;
		atomic64_add(scan->evicted - before, &headroom_yielded);
	} else {
		WRITE_ONCE(area->spare_taken, area->spare_taken +
			   scan->evicted - before);
	}
	WRITE_ONCE(area->reclaims, false);
}

/* --- The shrinker --- */

/* Pages that a reclaim would gain: no more than the file has. */
static long free_pages_of(struct area *area)
{
	long pages = atomic_long_read(&area->free) << LLFREE_ORDER;

	return min_t(long, pages,
		     READ_ONCE(area->memory->f_mapping->nrpages));
}

/* The same without what is known to be on another node. */
static long free_pages_here(struct place *place)
{
	struct area *area = place->area;

	return free_pages_of(area) - ((atomic_long_read(&area->located) -
		atomic_long_read(&place->here)) << LLFREE_ORDER);
}

static long headroom_pages(struct area *area)
{
	return (long)area->headroom << LLFREE_ORDER;
}

struct tally {
	unsigned long pages;
	unsigned long areas;
	unsigned int looks;
	unsigned int weight;	/* listed ones that each stands for */
	bool kicked;
	bool rotate;		/* there are more than it walks */
};

/*
 * Has all of an area looked at soon. The area is listed, and the list locked: it
 * does not end before this.
 */
static bool kick(struct area *area)
{
	unsigned long before = READ_ONCE(area->kicked_at);

	/* One chunk was looked at just now, but for what was kept. */
	if (area->nr_chunks == 1 && !READ_ONCE(area->chunks[0].skipped))
		return false;
	if (!time_after(jiffies, before + KICK_INTERVAL) ||
	    cmpxchg(&area->kicked_at, before, jiffies) != before)
		return false;
	mod_delayed_work(system_unbound_wq, &area->look, 0);
	return true;
}

/* Whether an area may have more than is known, and it is worth a look. */
static bool seems_poor(struct area *area)
{
	long pages = free_pages_of(area);

	return pages - headroom_pages(area) < POOR &&
	       READ_ONCE(area->memory->f_mapping->nrpages) > pages;
}

static enum lru_status add_spare(struct list_head *item,
				 struct list_lru_one *list, spinlock_t *lock,
				 void *arg)
{
	struct place *place = container_of(item, struct place, spare);
	struct tally *tally = arg;
	struct area *area = place->area;
	bool rotate = tally->rotate;

	if (seems_poor(area) && tally->looks < LOOKS_A_COUNT) {
		tally->looks++;
		area_look_for_more(area);
		/* Others are first the next time. */
		rotate = true;
		/* It wakes somebody: one a count. */
		if (!tally->kicked && seems_poor(area))
			tally->kicked = kick(area);
	}
	tally->pages += max(free_pages_here(place) - headroom_pages(area), 0L);
	tally->areas++;
	/* The walk ends before it comes to one that it rotated. */
	return rotate ? LRU_ROTATE : LRU_SKIP;
}

static enum lru_status add_headroom(struct list_head *item,
				    struct list_lru_one *list, spinlock_t *lock,
				    void *arg)
{
	struct place *place = container_of(item, struct place, headroom);
	struct tally *tally = arg;
	struct area *area = place->area;

	if (headroom_yields(&place->asked, READ_ONCE(area->spare_taken),
			    tally->weight) ||
	    is_alarmed(&alarms, jiffies))
		tally->pages += clamp(free_pages_here(place), 0L,
				      headroom_pages(area));
	tally->areas++;
	return tally->rotate ? LRU_ROTATE : LRU_SKIP;
}

static unsigned long count(struct list_lru *list, list_lru_walk_cb add,
			   struct shrink_control *sc)
{
	struct tally tally = {};
	unsigned long nr, walk;
	u64 start;

	if (!places_are_ready())
		return 0;
	nr = list_lru_shrink_count(list, sc);
	if (!nr)
		return SHRINK_EMPTY;
	start = now();
	walk = min_t(unsigned long, nr, AREAS_A_CALL);
	tally.weight = DIV_ROUND_UP(nr, AREAS_A_CALL);
	tally.rotate = nr > walk;
	list_lru_walk_one(list, sc->nid, sc->memcg, add, &tally, &walk);
	/* Of more than it walks, those of this call stand for all. */
	if (tally.areas && nr > tally.areas)
		tally.pages = tally.pages / tally.areas * nr;
	if (start) {
		atomic64_inc(&count_calls);
		atomic64_add(now() - start, &count_ns);
	}
	return tally.pages;
}

unsigned long spare_count(struct shrinker *unused, struct shrink_control *sc)
{
	unsigned long pages = count(&spare_places, add_spare, sc);

	/*
	 * Reclaim asks for half of it, and calls nobody for less than a batch
	 * before it is desperate.
	 */
	if (pages && pages != SHRINK_EMPTY)
		pages = max(pages, 2UL * BATCH * LLFREE_PAGES);
	return pages;
}

unsigned long headroom_count(struct shrinker *unused, struct shrink_control *sc)
{
	return count(&headroom_places, add_headroom, sc);
}

static enum lru_status pick(struct place *place, struct place **picked)
{
	/* It is listed, so it has a reference. */
	kref_get(&place->area->ref);
	*picked = place;
	return LRU_ROTATE;
}

static enum lru_status pick_spare(struct list_head *item,
				  struct list_lru_one *list, spinlock_t *lock,
				  void *arg)
{
	return pick(container_of(item, struct place, spare), arg);
}

static enum lru_status pick_headroom(struct list_head *item,
				     struct list_lru_one *list,
				     spinlock_t *lock, void *arg)
{
	return pick(container_of(item, struct place, headroom), arg);
}

/* The next area in turn, with a reference. */
static struct place *next_place(enum part of, struct shrink_control *sc)
{
	struct place *place = NULL;
	unsigned long walk = 1;

	if (of == SPARE)
		list_lru_walk_one(&spare_places, sc->nid, sc->memcg, pick_spare,
				  &place, &walk);
	else
		list_lru_walk_one(&headroom_places, sc->nid, sc->memcg,
				  pick_headroom, &place, &walk);
	return place;
}

/* What was taken from the area, page by page; who has its lock changes it. */
static u64 progress(struct area *area)
{
	return READ_ONCE(area->stats.freed_pages);
}

/*
 * Whoever has the area takes memory from it or looks at it, and as a rule is
 * done soon: reclaim that finds all busy for that must not pass for one that
 * finds nothing, for next somebody is killed. What comes free while it waits
 * counts as its own: reclaim without progress does not even look whether there
 * is memory by now. With a batch it waits no longer. Another scan is waited
 * for also while it takes nothing yet: the process may have mapped its memory
 * at thousands of places, and who gives up early gives up again at once, and
 * has somebody killed before that one is done. Only who lets swap go may wait
 * for folios, and is never waited for.
 *
 * A call spends no more than its patience, whatever becomes of the areas that
 * it comes to. Where all of one limit was spent on one area in vain, others
 * pass that one over for a second: a process that keeps its area busy and
 * takes nothing, or cannot run while it has it, costs one wait a second.
 */
static bool lock_area(struct area *area, struct scan *scan)
{
	u64 first = progress(area);
	struct wait wait = { .first = first, .before = first };
	bool locked;

	while (!(locked = mutex_trylock(&area->lock))) {
		if (READ_ONCE(area->waits) || fatal_signal_pending(current) ||
		    !wait_goes_on(&wait, &scan->patience, &area->waited,
				  READ_ONCE(area->reclaims), jiffies))
			break;
		schedule_timeout_uninterruptible(1);
		wait_saw(&wait, &scan->patience, progress(area));
	}
	if (!locked)
		wait_failed(&wait, &area->waited, jiffies);
	scan->freed_by_others += wait.before - wait.first;
	return locked;
}

static unsigned long scan(struct list_lru *list, enum part of,
			  struct shrink_control *sc)
{
	unsigned long nr;
	struct scan scan = {
		.of = of,
		.want = max_t(unsigned long, sc->nr_to_scan >> LLFREE_ORDER, 1),
		.chunks = CHUNKS_A_CALL,
		.patience.all = LONG_PATIENCE,
	};
	bool busy = false;
	u64 start = now();

	/*
	 * Also without __GFP_FS, with which a cgroup has somebody killed as
	 * well: nothing here waits for a file system, see discard.c.
	 */
	if (!places_are_ready())
		return SHRINK_STOP;
	/* Those kill nobody. */
	if (!current_is_kswapd() && !(sc->gfp_mask & __GFP_NORETRY))
		scan.patience.idle = PATIENCE;
	nr = min_t(unsigned long, list_lru_shrink_count(list, sc),
		   AREAS_A_CALL);
	while (nr-- && scan.want && scan.chunks) {
		struct place *place = next_place(of, sc);
		struct area *area;

		if (!place)
			break;
		area = place->area;
		if (lock_area(area, &scan)) {
			scan.place = place;
			if (!area->dead)
				scan_area(area, &scan);
			mutex_unlock(&area->lock);
		} else {
			atomic64_inc(&area->busy);
			busy = true;
		}
		kref_put(&area->ref, area_release);
	}
	account_reclaimed(scan.freed + scan.freed_by_others);
	if (start) {
		atomic64_inc(&scan_calls);
		atomic64_add(now() - start, &scan_ns);
	}
	/* With nothing to be had in all that there is, or for now, no more calls. */
	if (!scan.evicted && (busy || (scan.want && scan.chunks)))
		return SHRINK_STOP;
	return scan.freed;
}

unsigned long spare_scan(struct shrinker *unused, struct shrink_control *sc)
{
	return scan(&spare_places, SPARE, sc);
}

unsigned long headroom_scan(struct shrinker *unused, struct shrink_control *sc)
{
	return scan(&headroom_places, HEADROOM, sc);
}

/* --- The last resort --- */

/*
 * The machine is out of memory. That is said after a single round of reclaim if
 * all that the kernel's own lists have would not do, whatever counts have found
 * until then. Nothing is taken here, under the lock that all have who are out of
 * memory: the round that follows finds headroom at its first count, on the nodes
 * and in the groups that the allocation may use, and takes it when all else was
 * in vain.
 */
static int out_of_memory_is_said(struct notifier_block *unused,
				 unsigned long unused_too, void *arg)
{
	unsigned long *freed = arg;

	/* Where others freed something there is another round anyway. */
	if (!*freed && atomic_read(&areas_with_headroom) &&
	    alarm_is_raised(&alarms, atomic64_read(&headroom_yielded), jiffies))
		*freed = 1;
	return NOTIFY_OK;
}

/* The last one asked. */
struct notifier_block last_resort = {
	.notifier_call = out_of_memory_is_said,
	.priority = INT_MIN,
};

/* --- What the device asks for --- */

/*
 * Takes some frames now. Returns how many, and the chunks that were looked at:
 * with CHUNKS_A_CALL of them there may be more. The caller has the area's lock.
 */
unsigned int area_reclaim(struct area *area, unsigned int want, u32 *chunks)
{
	struct scan scan = {
		.of = ANY,
		.want = want,
		.chunks = CHUNKS_A_CALL,
	};

	scan_area(area, &scan);
	*chunks = CHUNKS_A_CALL - scan.chunks;
	return scan.evicted;
}
