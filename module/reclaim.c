// SPDX-License-Identifier: GPL-2.0
/*
 * The shrinker: takes the memory of huge frames that a process has free.
 *
 * A frame is held while its memory goes: free -> held, unmap, remove its
 * folios from the file, held -> free and evicted. The process, which waits for
 * nobody, cannot have it meanwhile, and knows afterwards that it reads zeroes.
 *
 * Reclaim may come here from under any allocation. So nothing here waits for a
 * lock that somebody may hold who allocates: the area, and each folio, is only
 * ever tried, and what is busy is left as it is. What may wait is
 * i_mmap_rwsem, for which the kernel has said that it is never held around
 * such an allocation (see dma_resv_lockdep()), and which any reclaim takes.
 * shmem_truncate_range() is not called on memory, for it waits for folios that
 * somebody may hold who is in reclaim himself, such as one that splits them.
 */
#include <linux/list_lru.h>
#include <linux/memcontrol.h>
#include <linux/pagemap.h>
#include <linux/pagevec.h>
#include <linux/sched/mm.h>
#include <linux/shmem_fs.h>
#include <linux/shrinker.h>
#include <linux/slab.h>
#include <linux/swap.h>
#include <linux/timekeeping.h>
#include <linux/version.h>
#include <linux/xarray.h>

#include "vllfree.h"

/* Frames that are held at once. */
#define BATCH			16
/* What one call may look at, however many areas and frames there are. */
#define AREAS_A_CALL		64
/* A count's own looks, a chunk an area, and how soon it asks for a whole one. */
#define LOOKS_A_COUNT		4
#define KICK_INTERVAL		(HZ / 10)
/* Frames in a look, which has the area's lock. */
#define FRAMES_A_TURN		(256 * CHUNK)
/* The same of frames whose swap is let go. */
#define SWAPPED_A_TURN		4
/* With less than this known to be free, a count looks for more. */
#define POOR			(BATCH * LLFREE_PAGES)

static unsigned int grace = 2;
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

static int remove_folio(struct address_space *mapping, struct folio *folio)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
	return generic_error_remove_page(mapping, &folio->page);
#else
	return generic_error_remove_folio(mapping, folio);
#endif
}

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

/* One attempt: an entry that changed meanwhile is the process's. */
static bool change(struct area *area, u32 huge,
		   bool (*transition)(u16 entry, u16 *next))
{
	u16 entry = READ_ONCE(area->entries[huge]), next;

	return transition(entry, &next) &&
	       cmpxchg(&area->entries[huge], entry, next) == entry;
}

/* For a process that found nothing: some of what was held is free again. */
static void raise_epoch(struct area *area)
{
	atomic64_inc(area->return_epoch);
}

/* --- What an area has free --- */

static u32 chunk_frames(struct area *area, u32 chunk)
{
	return min(CHUNK, area->huge_frames - chunk * CHUNK);
}

static void set_chunk_free(struct area *area, u32 chunk, int free)
{
	atomic_long_add(free - atomic_xchg(&area->chunks[chunk].free, free),
			&area->free);
}

/* Frames of a chunk that are free and have memory, four at a time. */
static unsigned int count_free(struct area *area, u32 chunk)
{
	const u64 low = 0x7fff7fff7fff7fffULL;
	const u64 free = LLFREE_FREE * 0x0001000100010001ULL;
	const u16 *entries = area->entries + chunk * CHUNK;
	u32 nr = chunk_frames(area, chunk), i = 0;
	unsigned int used = 0;

	if (IS_ALIGNED((unsigned long)entries, 8)) {
		for (; i + 4 <= nr; i += 4) {
			u64 word = READ_ONCE(*(const u64 *)(entries + i)) ^ free;

			/* The highest bit of each that is not zero. */
			used += hweight64((((word & low) + low) | word) & ~low);
		}
	}
	for (; i < nr; i++)
		used += !llfree_is_resident(READ_ONCE(entries[i]));
	return nr - used;
}

/* Without those that were kept, which nobody tries again so soon. */
static void recount(struct area *area, u32 chunk)
{
	int free = count_free(area, chunk) -
		   READ_ONCE(area->chunks[chunk].skipped);

	set_chunk_free(area, chunk, max(free, 0));
}

/* Where a frame's memory is; by the caller with the area's lock. */
static void locate(struct area *area, struct note *note, u8 place)
{
	if (note->place == place)
		return;
	if (note->place) {
		atomic_long_dec(&area->places[note->place - 1]->here);
		atomic_long_dec(&area->located);
	}
	if (place) {
		atomic_long_inc(&area->places[place - 1]->here);
		atomic_long_inc(&area->located);
	}
	note->place = place;
}

/* Pages that a reclaim would gain: no more than the file has. */
static long free_pages_of(struct area *area)
{
	long pages = atomic_long_read(&area->free) << LLFREE_ORDER;

	return min_t(long, pages,
		     READ_ONCE(area->memory->f_mapping->nrpages));
}

/*
 * With an area that seems to have little, one chunk is looked at: what a
 * process has freed is found before anybody is killed, and a count of many
 * areas costs no more than that of one.
 */
static void look_for_more(struct area *area)
{
	u32 chunk = (u32)atomic_inc_return(&area->look_at) % area->nr_chunks;

	recount(area, chunk);
}

static void look_at_chunk(struct area *area, u32 chunk, bool aging)
{
	u32 first = chunk * CHUNK, nr = chunk_frames(area, chunk), i;
	unsigned int free = 0, old = 0;

	for (i = first; i < first + nr; i++) {
		struct note *note = &area->notes[i];

		note->skip = 0;
		if (aging)
			locate(area, note, 0);
		if (!llfree_is_resident(READ_ONCE(area->entries[i]))) {
			locate(area, note, 0);
			note->age = 0;
			continue;
		}
		free++;
		if (area->marks && READ_ONCE(area->marks[i])) {
			WRITE_ONCE(area->marks[i], 0);
			note->age = 0;
		} else if (aging && note->age < U8_MAX) {
			note->age++;
		}
		old += note->age >= grace;
	}
	WRITE_ONCE(area->chunks[chunk].skipped, 0);
	area->chunks[chunk].old = old;
	set_chunk_free(area, chunk, free);
}

static bool has_entries(struct address_space *mapping, u32 huge)
{
	XA_STATE(xas, &mapping->i_pages, (pgoff_t)huge << LLFREE_ORDER);
	pgoff_t last = ((pgoff_t)huge << LLFREE_ORDER) + LLFREE_PAGES - 1;
	void *entry;

	rcu_read_lock();
	do {
		entry = xas_find(&xas, last);
	} while (xas_retry(&xas, entry));
	rcu_read_unlock();
	return entry;
}

/* --- Taking it --- */

enum emptied { KEPT, SWAPPED, EMPTY };

/* Locked memory, or pages that a device or a ring has for good. */
static bool is_needed(struct folio *folio)
{
	return folio_test_mlocked(folio) || folio_maybe_dma_pinned(folio);
}

/* Before a frame is unmapped, for that unlocks its memory. */
static bool has_needed(struct address_space *mapping, u32 huge)
{
	pgoff_t next = (pgoff_t)huge << LLFREE_ORDER;
	pgoff_t last = next + LLFREE_PAGES - 1;
	struct folio_batch batch;
	bool needed = false;
	unsigned int i;

	folio_batch_init(&batch);
	while (next <= last && !needed &&
	       filemap_get_folios(mapping, &next, last, &batch)) {
		for (i = 0; i < folio_batch_count(&batch); i++)
			needed |= is_needed(batch.folios[i]);
		folio_batch_release(&batch);
	}
	return needed;
}

/* A folio that is busy, or that somebody counts on by now, stays. */
static bool take_folio(struct address_space *mapping, struct folio *folio,
		       pgoff_t first, pgoff_t last)
{
	bool taken = false;

	if (!folio_trylock(folio))
		return false;
	if (folio->mapping == mapping && !folio_test_writeback(folio) &&
	    !is_needed(folio) && folio->index >= first &&
	    folio->index + folio_nr_pages(folio) - 1 <= last)
		taken = !remove_folio(mapping, folio);
	folio_unlock(folio);
	return taken;
}

/* Each round of the loop begins further on: it ends whoever adds folios. */
static enum emptied empty(struct address_space *mapping, u32 huge,
			  unsigned long *freed)
{
	pgoff_t first = (pgoff_t)huge << LLFREE_ORDER;
	pgoff_t last = first + LLFREE_PAGES - 1, next = first;
	struct folio_batch batch;
	bool kept = false;
	unsigned int i;

	folio_batch_init(&batch);
	while (next <= last && filemap_get_folios(mapping, &next, last, &batch)) {
		for (i = 0; i < folio_batch_count(&batch); i++) {
			struct folio *folio = batch.folios[i];

			if (take_folio(mapping, folio, first, last))
				*freed += folio_nr_pages(folio);
			else
				kept = true;
		}
		folio_batch_release(&batch);
	}
	if (kept)
		return KEPT;
	return has_entries(mapping, huge) ? SWAPPED : EMPTY;
}

/*
 * The file's account of its blocks follows its folios whenever it is asked to;
 * here, by the truncation of what lies behind its end, where nothing is, for
 * its size is sealed.
 */
static void settle_blocks(struct inode *inode)
{
	loff_t end = round_up(i_size_read(inode), 1UL << HUGE_SHIFT);

	shmem_truncate_range(inode, end, end + (1UL << HUGE_SHIFT) - 1);
}

/* Rows of neighbours at once: each has one flush of the TLBs. */
static void unmap(struct address_space *mapping, const u32 *frames,
		  const u8 *emptied, unsigned int nr)
{
	unsigned int i, run;

	for (i = 0; i < nr; i += run) {
		run = 1;
		if (emptied[i] == KEPT)
			continue;
		for (; i + run < nr && emptied[i + run] != KEPT; run++)
			if (frames[i + run] != frames[i] + run)
				break;
		unmap_mapping_range(mapping, (loff_t)frames[i] << HUGE_SHIFT,
				    (loff_t)run << HUGE_SHIFT, 0);
	}
}

/* Takes the memory of frames that are held, and lets go of these. */
static unsigned int discard(struct area *area, const u32 *frames,
			    unsigned int nr, unsigned long *freed)
{
	struct address_space *mapping = area->memory->f_mapping;
	struct llfree_status *stats = &area->stats;
	unsigned long before = *freed;
	unsigned int i, evicted = 0;
	u8 emptied[BATCH];

	/* While they are held: who saw none held before, and this, missed none. */
	raise_epoch(area);
	for (i = 0; i < nr; i++)
		emptied[i] = has_needed(mapping, frames[i]) ? KEPT : EMPTY;
	unmap(mapping, frames, emptied, nr);
	for (i = 0; i < nr; i++)
		if (emptied[i] != KEPT)
			emptied[i] = empty(mapping, frames[i], freed);
	if (*freed != before)
		settle_blocks(mapping->host);
	for (i = 0; i < nr; i++) {
		struct note *note = &area->notes[frames[i]];
		bool done;

		if (emptied[i] == EMPTY) {
			done = change(area, frames[i], llfree_release);
			evicted += done;
		} else {
			done = change(area, frames[i], llfree_keep);
			note->skip = 1;
			area->chunks[frames[i] / CHUNK].skipped++;
			note->swapped = emptied[i] == SWAPPED;
			area->has_swapped |= note->swapped;
			stats->kept++;
		}
		note->age = 0;
		locate(area, note, 0);
		stats->broken += !done;
	}
	raise_epoch(area);
	stats->evicted += evicted;
	stats->freed_pages += *freed - before;
	stats->batches++;
	return evicted;
}

static int page_node(struct area *area, pgoff_t index)
{
	struct folio *folio = filemap_get_folio(area->memory->f_mapping, index);
	int nid;

	if (IS_ERR_OR_NULL(folio))
		return NUMA_NO_NODE;
	nid = folio_nid(folio);
	folio_put(folio);
	return nid;
}

/*
 * The place of a frame's node, from 1. By its first pages, as many as there are
 * nodes: with pages in turns it is on all of them, which is 0.
 */
static u8 place_of(struct area *area, u32 huge)
{
	pgoff_t index = (pgoff_t)huge << LLFREE_ORDER;
	int nid = page_node(area, index), i;

	for (i = 1; i < area->nr_places && i < LLFREE_PAGES; i++)
		if (page_node(area, index + i) != nid)
			return 0;
	for (i = 0; i < area->nr_places && i < U8_MAX; i++)
		if (area->places[i]->nid == nid)
			return i + 1;
	return 0;
}

/* Whether all of a frame's memory is on another node. */
static bool is_elsewhere(struct area *area, u32 huge, struct place *place)
{
	struct note *note = &area->notes[huge];

	locate(area, note, place_of(area, huge));
	return note->place && area->places[note->place - 1] != place;
}

/* What a scan may do yet, and has done. */
struct scan {
	struct place *place;	/* NULL: any node */
	unsigned int want;	/* frames */
	unsigned int chunks;	/* to look at */
	unsigned int evicted;	/* frames */
	unsigned long freed;	/* pages */
	u32 frames[BATCH];
	unsigned int held;
};

static void settle(struct area *area, struct scan *scan)
{
	u64 start = now();

	if (!scan->held)
		return;
	scan->evicted += discard(area, scan->frames, scan->held, &scan->freed);
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
			locate(area, note, 0);
			continue;
		}
		if (note->skip || note->age < age)
			continue;
		if (scan->place && area->nr_places > 1 &&
		    is_elsewhere(area, i, scan->place))
			continue;
		if (!change(area, i, llfree_hold))
			continue;
		scan->want--;
		scan->frames[scan->held++] = i;
		if (scan->held == BATCH)
			settle(area, scan);
	}
}

/*
 * First what was free for long, then all: with little pressure only the former
 * is ever reached. Bounded by the chunks that may be looked at.
 */
static void scan_area(struct area *area, struct scan *scan)
{
	unsigned int pass, i;

	for (pass = 0; pass < 2; pass++) {
		u32 start = area->cursor;

		for (i = 0; i < area->nr_chunks && scan->want; i++) {
			u32 chunk = (start + i) % area->nr_chunks;

			if (!pass && !READ_ONCE(area->chunks[chunk].old))
				continue;
			if (!scan->chunks)
				break;
			scan->chunks--;
			area->cursor = chunk;
			scan_chunk(area, chunk, pass ? 0 : grace, scan);
			if (!pass && scan->want)
				area->chunks[chunk].old = 0;
			recount(area, chunk);
		}
		settle(area, scan);
	}
}

/* --- The shrinker --- */

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

	if (area->nr_chunks == 1 || !time_after(jiffies, before + KICK_INTERVAL) ||
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
			look_for_more(area);
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

static unsigned long scan(struct shrinker *unused, struct shrink_control *sc)
{
	unsigned long nr;
	struct scan scan = {
		.want = max_t(unsigned long, sc->nr_to_scan >> LLFREE_ORDER, 1),
		.chunks = CHUNKS_A_CALL,
	};
	bool busy = false;
	u64 start = now();

	if (!(sc->gfp_mask & __GFP_FS) || !smp_load_acquire(&ready))
		return SHRINK_STOP;
	nr = min_t(unsigned long, list_lru_shrink_count(&places, sc),
		   AREAS_A_CALL);
	while (nr-- && scan.want && scan.chunks) {
		struct place *place = next_place(sc);
		struct area *area;

		if (!place)
			break;
		area = place->area;
		if (mutex_trylock(&area->lock)) {
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
	account_reclaimed(scan.freed);
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

/*
 * Lets go of the swap of frames that are free. Not in reclaim: this may wait
 * for folios that the process brings in meanwhile.
 */
static void let_swap_go(struct area *area, u32 huge)
{
	struct inode *inode = file_inode(area->memory);
	loff_t start = (loff_t)huge << HUGE_SHIFT;
	bool done;

	area->notes[huge].swapped = 0;
	if (!llfree_is_resident(READ_ONCE(area->entries[huge])) ||
	    !change(area, huge, llfree_hold))
		return;
	raise_epoch(area);
	unmap_mapping_range(inode->i_mapping, start, 1L << HUGE_SHIFT, 0);
	shmem_truncate_range(inode, start, start + (1L << HUGE_SHIFT) - 1);
	if (has_entries(inode->i_mapping, huge)) {
		done = change(area, huge, llfree_keep);
	} else {
		done = change(area, huge, llfree_release);
		area->stats.swapped += done;
	}
	area->stats.broken += !done;
	raise_epoch(area);
}

/* Reclaim has a chance at it; false if the area is over. */
static bool step_aside(struct area *area)
{
	mutex_unlock(&area->lock);
	cond_resched();
	mutex_lock(&area->lock);
	return !area->dead;
}

/* How many frames are free and, once a second, for how long. */
void area_look(struct area *area, bool aging)
{
	u32 chunk, i, turn = 0;

	for (chunk = 0; chunk < area->nr_chunks; chunk++) {
		look_at_chunk(area, chunk, aging);
		turn += CHUNK;
		if (turn >= FRAMES_A_TURN) {
			turn = 0;
			if (!step_aside(area))
				return;
		}
	}
	if (!area->has_swapped)
		return;
	area->has_swapped = false;
	for (i = 0; i < area->huge_frames; i++) {
		turn++;
		if (area->notes[i].swapped) {
			let_swap_go(area, i);
			turn += FRAMES_A_TURN / SWAPPED_A_TURN;
		}
		if (turn >= FRAMES_A_TURN) {
			turn = 0;
			if (!step_aside(area))
				return;
		}
	}
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
