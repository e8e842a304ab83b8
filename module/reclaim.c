// SPDX-License-Identifier: GPL-2.0
/*
 * The shrinker: from whose areas memory is taken, in which cgroup and on which
 * node, how much there is (a count) and which frames go (a scan).
 *
 * Reclaim may come here from under any allocation. So an area is tried, and a
 * busy one passed over after a while; for what waits below see discard.c.
 */
#include <linux/bitmap.h>
#include <linux/fs.h>
#include <linux/list_lru.h>
#include <linux/memcontrol.h>
#include <linux/sched/mm.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
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
 * How long a call waits for others, in sleeps of a tick, which last up to two:
 * for those that take nothing meanwhile and are no reclaim, and in all.
 */
#define PATIENCE		(HZ / 10)
#define LONG_PATIENCE		HZ
/* With less than this known to be free, a count looks for more. */
#define POOR			(BATCH * LLFREE_PAGES)

unsigned int grace = 2;
module_param(grace, uint, 0644);
MODULE_PARM_DESC(grace, "looks, one a second, for which a frame was free before it is taken first");
static bool timing;
module_param(timing, bool, 0644);
MODULE_PARM_DESC(timing, "count the time that it takes");

atomic64_t count_calls, count_ns, scan_calls, scan_ns;

static struct list_lru places;
static struct kmem_cache *place_cache;
/* The lists are there: stored with release, loaded with acquire. */
static bool ready;

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
static struct shrinker the_shrinker;
#else
static struct shrinker *the_shrinker;
#endif
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
#define lru_add(place)	list_lru_add(&places, &(place)->lru)
#define lru_del(place)	list_lru_del(&places, &(place)->lru)
#else
#define lru_add(place)	list_lru_add_obj(&places, &(place)->lru)
#define lru_del(place)	list_lru_del_obj(&places, &(place)->lru)
#endif

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

/* What a scan may do yet, and has done. */
struct scan {
	struct place *place;	/* NULL: any node */
	unsigned int want;	/* frames */
	unsigned int chunks;	/* to look at */
	unsigned int evicted;	/* frames */
	unsigned long freed;	/* pages */
	u32 frames[BATCH];
	unsigned int held;
	unsigned int patience, long_patience;	/* sleeps, of all areas */
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

/*
 * First what was free for long, then all: with little pressure only the former
 * is ever reached. Bounded by the chunks that may be looked at, and by a bit
 * for each of the others. Whether it is the shrinker's or the device was asked
 * for it, other reclaim waits for it.
 */
static void scan_area(struct area *area, struct scan *scan)
{
	unsigned int pass, i;

	WRITE_ONCE(area->reclaims, true);
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

struct tally {
	unsigned long pages;
	unsigned long areas;
	unsigned int looks;
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

static enum lru_status add_up(struct list_head *item, struct list_lru_one *list,
			      spinlock_t *lock, void *arg)
{
	struct place *place = container_of(item, struct place, lru);
	struct tally *tally = arg;
	struct area *area = place->area;
	long pages = free_pages_of(area);
	bool rotate = tally->rotate;

	if (pages < POOR && READ_ONCE(area->memory->f_mapping->nrpages) > pages) {
		if (tally->looks < LOOKS_A_COUNT) {
			tally->looks++;
			area_look_for_more(area);
			pages = free_pages_of(area);
			/* Others are first the next time. */
			rotate = true;
			/* It wakes somebody: one a count. */
			if (pages < POOR && !tally->kicked)
				tally->kicked = kick(area);
		}
	}
	pages -= (atomic_long_read(&area->located) -
		  atomic_long_read(&place->here)) << LLFREE_ORDER;
	tally->pages += max(pages, 0L);
	tally->areas++;
	/* The walk ends before it comes to one that it rotated. */
	return rotate ? LRU_ROTATE : LRU_SKIP;
}

static unsigned long count(struct shrinker *unused, struct shrink_control *sc)
{
	struct tally tally = {};
	unsigned long nr, walk;
	u64 start;

	if (!smp_load_acquire(&ready))
		return 0;
	nr = list_lru_shrink_count(&places, sc);
	if (!nr)
		return SHRINK_EMPTY;
	start = now();
	walk = min_t(unsigned long, nr, AREAS_A_CALL);
	tally.rotate = nr > walk;
	list_lru_walk_one(&places, sc->nid, sc->memcg, add_up, &tally, &walk);
	/* Of more than it walks, those of this call stand for all. */
	if (tally.areas && nr > tally.areas)
		tally.pages = tally.pages / tally.areas * nr;
	if (start) {
		atomic64_inc(&count_calls);
		atomic64_add(now() - start, &count_ns);
	}
	/*
	 * Reclaim asks for half of it, and calls nobody for less than a batch
	 * before it is desperate.
	 */
	if (tally.pages)
		tally.pages = max(tally.pages, 2UL * BATCH * LLFREE_PAGES);
	return tally.pages;
}

static enum lru_status pick(struct list_head *item, struct list_lru_one *list,
			    spinlock_t *lock, void *arg)
{
	struct place *place = container_of(item, struct place, lru);
	struct place **picked = arg;

	/* It is listed, so it has a reference. */
	kref_get(&place->area->ref);
	*picked = place;
	return LRU_ROTATE;
}

/* The next area in turn, with a reference. */
static struct place *next_place(struct shrink_control *sc)
{
	struct place *place = NULL;
	unsigned long walk = 1;

	list_lru_walk_one(&places, sc->nid, sc->memcg, pick, &place, &walk);
	return place;
}

/* What was taken from the area, page by page; who has its lock changes it. */
static u64 progress(struct area *area)
{
	return READ_ONCE(area->stats.freed_pages);
}

/* A moment ago, and nothing was taken since. */
static bool was_in_vain(struct area *area, const struct in_vain *wait)
{
	return time_before(jiffies, READ_ONCE(wait->at) + HZ) &&
	       READ_ONCE(wait->progress) == progress(area);
}

static void note_in_vain(struct in_vain *wait, u64 progress)
{
	WRITE_ONCE(wait->progress, progress);
	WRITE_ONCE(wait->at, jiffies);
}

/* Who waited in vain for a look says nothing of a scan that is there by now. */
static bool is_hopeless(struct area *area)
{
	return was_in_vain(area, &area->for_scan) ||
	       (!READ_ONCE(area->reclaims) &&
		was_in_vain(area, &area->for_look));
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
	u64 first = progress(area), before = first, after;
	/* Sleeps here: in a row for no scan and without progress, and all. */
	unsigned int idle = 0, all = 0;
	bool locked;

	while (!(locked = mutex_trylock(&area->lock))) {
		if (!scan->patience || !scan->long_patience ||
		    READ_ONCE(area->waits) || fatal_signal_pending(current) ||
		    before - first >= BATCH * LLFREE_PAGES ||
		    (!all && is_hopeless(area)))
			break;
		/* While it unmaps a batch nothing comes free yet. */
		if (!READ_ONCE(area->reclaims)) {
			scan->patience--;
			idle++;
		}
		scan->long_patience--;
		all++;
		schedule_timeout_uninterruptible(1);
		after = progress(area);
		if (after != before) {
			scan->patience = PATIENCE;
			idle = 0;
		}
		before = after;
	}
	if (!locked && idle == PATIENCE)
		note_in_vain(&area->for_look, before);
	if (!locked && all == LONG_PATIENCE && before == first)
		note_in_vain(&area->for_scan, before);
	scan->freed_by_others += before - first;
	return locked;
}

static unsigned long scan(struct shrinker *unused, struct shrink_control *sc)
{
	unsigned long nr;
	struct scan scan = {
		.want = max_t(unsigned long, sc->nr_to_scan >> LLFREE_ORDER, 1),
		.chunks = CHUNKS_A_CALL,
		.long_patience = LONG_PATIENCE,
	};
	bool busy = false;
	u64 start = now();

	if (!(sc->gfp_mask & __GFP_FS) || !smp_load_acquire(&ready))
		return SHRINK_STOP;
	/* Those kill nobody. */
	if (!current_is_kswapd() && !(sc->gfp_mask & __GFP_NORETRY))
		scan.patience = PATIENCE;
	nr = min_t(unsigned long, list_lru_shrink_count(&places, sc),
		   AREAS_A_CALL);
	while (nr-- && scan.want && scan.chunks) {
		struct place *place = next_place(sc);
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

/* --- What the device asks for --- */

/*
 * Takes some frames now. Returns how many, and the chunks that were looked at:
 * with CHUNKS_A_CALL of them there may be more. The caller has the area's lock.
 */
unsigned int area_reclaim(struct area *area, unsigned int want, u32 *chunks)
{
	struct scan scan = { .want = want, .chunks = CHUNKS_A_CALL };

	scan_area(area, &scan);
	*chunks = CHUNKS_A_CALL - scan.chunks;
	return scan.evicted;
}

void area_delist(struct area *area)
{
	int i;

	for (i = 0; i < area->nr_places; i++)
		lru_del(area->places[i]);
}

/* With the last reference: reclaim may have had one. */
void area_release(struct kref *ref)
{
	struct area *area = container_of(ref, struct area, ref);
	int i;

	for (i = 0; i < area->nr_places; i++)
		kmem_cache_free(place_cache, area->places[i]);
	kfree(area);
}

static struct place *new_place(int nid, bool first)
{
	struct place *place;

	if (first) {
		/* With the lists of the cgroup, and of those above it. */
		place = kmem_cache_alloc_lru(place_cache, &places, GFP_KERNEL);
		if (!place || num_node_state(N_MEMORY) == 1)
			return place;
		kmem_cache_free(place_cache, place);
	}
	return kmem_cache_alloc_node(place_cache, GFP_KERNEL | __GFP_THISNODE,
				     nid);
}

/*
 * A place is listed under the cgroup and the node that its own memory is of:
 * all under one cgroup, wherever the process is moved meanwhile, for that one
 * has lists.
 */
int area_enlist(struct area *area)
{
	struct mem_cgroup *memcg = get_mem_cgroup_from_mm(current->mm);
	struct mem_cgroup *before = set_active_memcg(memcg);
	int nid, i, ret = 0;

	for_each_node_state(nid, N_MEMORY) {
		struct place *place;

		/* A node that has come since has none. */
		if (area->nr_places == area->max_places)
			break;
		place = new_place(nid, !area->nr_places);
		if (!place) {
			ret = -ENOMEM;
			break;
		}
		INIT_LIST_HEAD(&place->lru);
		atomic_long_set(&place->here, 0);
		place->area = area;
		place->nid = page_to_nid(virt_to_page(place));
		area->places[area->nr_places++] = place;
	}
	set_active_memcg(before);
	mem_cgroup_put(memcg);
	for (i = 0; !ret && i < area->nr_places; i++)
		lru_add(area->places[i]);
	return ret;
}

/* --- Start and end --- */

static void set_up(struct shrinker *s)
{
	s->count_objects = count;
	s->scan_objects = scan;
	/*
	 * Nothing is lost with it and nothing has to be read again: before
	 * anything goes to swap, half of what is free is asked for, whatever
	 * the priority.
	 */
	s->seeks = 0;
	/* In pages, as the count. */
	s->batch = BATCH * LLFREE_PAGES;
}

int reclaim_init(void)
{
	unsigned int flags = SHRINKER_NUMA_AWARE | SHRINKER_MEMCG_AWARE;
	int ret = -ENOMEM;

	place_cache = KMEM_CACHE(place, SLAB_ACCOUNT);
	if (!place_cache)
		return ret;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	/* The lists need the number that the shrinker gets here: `ready`. */
	set_up(&the_shrinker);
	the_shrinker.flags = flags;
	ret = register_shrinker(&the_shrinker, "llfree");
	if (ret)
		goto no_shrinker;
	ret = list_lru_init_memcg(&places, &the_shrinker);
	if (ret) {
		unregister_shrinker(&the_shrinker);
		goto no_shrinker;
	}
#else
	the_shrinker = shrinker_alloc(flags, "llfree");
	if (!the_shrinker)
		goto no_shrinker;
	ret = list_lru_init_memcg(&places, the_shrinker);
	if (ret) {
		shrinker_free(the_shrinker);
		goto no_shrinker;
	}
	set_up(the_shrinker);
	shrinker_register(the_shrinker);
#endif
	smp_store_release(&ready, true);
	return 0;

no_shrinker:
	kmem_cache_destroy(place_cache);
	return ret;
}

void reclaim_exit(void)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	unregister_shrinker(&the_shrinker);
#else
	shrinker_free(the_shrinker);
#endif
	list_lru_destroy(&places);
	kmem_cache_destroy(place_cache);
}
