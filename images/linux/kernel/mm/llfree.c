// SPDX-License-Identifier: GPL-2.0
/*
 * Free memory that is shared with the hypervisor.
 *
 * The host has a table with one entry a huge frame, in memory that both sides
 * map. The entry of a huge frame all of which lies in free blocks says that it
 * is free, and then the host may take its memory away with one
 * compare-and-exchange, without any code running here: it *evicts* the frame,
 * which stays free and must get memory before it is used, or it *holds* it,
 * and then it is not ours until the host returns it. All other entries say
 * that the frame is in use.
 *
 * The page allocator stays as it is. It calls this file where a block of
 * LLFREE_ORDER or more enters or leaves a free list, which always happens
 * under zone->lock:
 *
 * - A block that enters is given: its entries say free.
 * - A block leaves for an allocation only if its entries could be taken, and
 *   if there is memory behind it. Held blocks that a search meets are set
 *   aside (see mm/llfree_aside.c). If it meets no others than evicted ones,
 *   the zone is *starved*, until one with memory is found:
 *   get_page_from_freelist() then has llfree_refill() take some of them off
 *   the list and ask the host for their memory without the lock.
 * - A block is claimed for another migratetype only if it has memory.
 *
 * Rules that keep this right:
 *
 * - Whatever is not in a free block of LLFREE_ORDER or more has an entry that
 *   says in use. Merging and splitting at or above that order need no hook.
 * - To give is idempotent, so blocks may go from list to list.
 * - A page leaves zone->lock only with memory behind it, so any device may
 *   write to it.
 * - Only the entry itself is shared. Everything else here is guarded by
 *   zone->lock.
 *
 * Nothing here trusts an entry to be sensible: one that is neither free nor
 * held where a block is free counts as held.
 */

#define pr_fmt(fmt) "llfree: " fmt

#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-flags.h>
#include <linux/processor.h>

#include "internal.h"
#include "llfree.h"

/* Blocks of one list that a search looks at for one with memory. */
#define LLFREE_LOOK		16
/* The most huge frames that are installed ahead of a request. */
#define LLFREE_AHEAD_MAX	32
/* Installs in such short order are a sign that more will follow. */
#define LLFREE_AHEAD_JIFFIES	max(HZ / 50, 1)
/* Failed installs in a row after which allocations look elsewhere, */
#define LLFREE_FAILURES		4
/* for this long, and twice as long after each that fails then, up to HZ. */
#define LLFREE_PAUSE_JIFFIES	max(HZ / 128, 1)
#define LLFREE_PAUSES		8
/* Attempts at an entry that the host keeps changing. It has no reason to. */
#define LLFREE_PATIENCE		8
/* The hole in physical memory ends here. */
#define LLFREE_HIGH_FRAME	((4UL << 30) >> (PAGE_SHIFT + LLFREE_ORDER))

DEFINE_STATIC_KEY_FALSE(llfree_key);

struct llfree_table llfree_table;

struct llfree_zone *llfree_zone(struct zone *zone)
{
	return &llfree_table.zones[zone_to_nid(zone) * MAX_NR_ZONES +
				   zone_idx(zone)];
}

/* The entry of the huge frame with this page; NULL if the table has none. */
u16 *llfree_entry(unsigned long pfn)
{
	unsigned long frame = pfn >> LLFREE_ORDER;

	if (frame >= llfree_table.low_frames) {
		if (frame < LLFREE_HIGH_FRAME)
			return NULL;
		frame -= LLFREE_HIGH_FRAME - llfree_table.low_frames;
	}
	if (frame >= llfree_table.huge_frames)
		return NULL;
	return &llfree_table.entries[frame];
}

/* The first page of a huge frame of the table. */
unsigned long llfree_frame_pfn(unsigned long frame)
{
	if (frame >= llfree_table.low_frames)
		frame += LLFREE_HIGH_FRAME - llfree_table.low_frames;
	return frame << LLFREE_ORDER;
}

/* Moves an entry from one state to another, and keeps whether it is evicted. */
static bool llfree_move(u16 *entry, u16 from, u16 to)
{
	u16 old = READ_ONCE(*entry);
	int tries;

	for (tries = 0; tries < LLFREE_PATIENCE; tries++) {
		u16 evicted = old & LLFREE_EVICTED;

		if ((old & ~LLFREE_EVICTED) != from)
			return false;
		if (try_cmpxchg(entry, &old, (u16)(to | evicted)))
			return true;
	}
	return false;
}

/* What can be had of a huge frame in a free block. */
enum llfree_state llfree_look(unsigned long pfn)
{
	u16 *entry = llfree_entry(pfn);

	/* Memory that the table does not describe is just memory. */
	if (!entry)
		return LLFREE_READY;
	switch (READ_ONCE(*entry)) {
	case LLFREE_FREE:
		return LLFREE_READY;
	case LLFREE_FREE | LLFREE_EVICTED:
		return LLFREE_NO_MEMORY;
	default:
		return LLFREE_AWAY;
	}
}

static bool llfree_give_entry(unsigned long pfn)
{
	u16 *entry = llfree_entry(pfn);

	return entry && llfree_move(entry, LLFREE_HUGE, LLFREE_FREE);
}

/* Takes an entry if memory is behind its huge frame. */
static bool llfree_take_entry(unsigned long pfn)
{
	u16 *entry = llfree_entry(pfn);
	u16 old = LLFREE_FREE;

	return !entry || try_cmpxchg(entry, &old, (u16)LLFREE_HUGE);
}

/* Takes an entry, be it evicted or not. */
static bool llfree_take_entry_any(unsigned long pfn)
{
	u16 *entry = llfree_entry(pfn);

	return !entry || llfree_move(entry, LLFREE_FREE, LLFREE_HUGE);
}

static bool llfree_is_evicted(unsigned long pfn)
{
	u16 *entry = llfree_entry(pfn);

	return entry && (READ_ONCE(*entry) & LLFREE_EVICTED);
}

bool __llfree_give(struct zone *zone, unsigned long pfn, unsigned int order)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned long end = pfn + (1UL << order);
	bool evicted = false;

	if (!lz->on)
		return false;
	/* Of a block that merged, the other half was given before. */
	for (; pfn < end; pfn += LLFREE_PAGES) {
		lz->gives += llfree_give_entry(pfn);
		evicted |= llfree_look(pfn) != LLFREE_READY;
	}
	return evicted;
}

/* The free blocks of a zone become the host's to take. Returns huge frames. */
unsigned long llfree_give_zone(struct zone *zone)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned long before, flags;
	unsigned int order, type;
	struct page *page;

	spin_lock_irqsave(&zone->lock, flags);
	before = lz->gives;
	lz->on = true;
	for (order = LLFREE_ORDER; order < NR_PAGE_ORDERS; order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			list_for_each_entry(page,
					    &zone->free_area[order].free_list[type],
					    buddy_list)
				__llfree_give(zone, page_to_pfn(page), order);
	before = lz->gives - before;
	spin_unlock_irqrestore(&zone->lock, flags);
	return before;
}

/* Takes what a request needs of a block, if all of it is there. */
static enum llfree_state llfree_take(struct llfree_zone *lz, unsigned long pfn,
				     unsigned int order)
{
	unsigned long i, pages = 1UL << max_t(unsigned int, order, LLFREE_ORDER);
	enum llfree_state state = LLFREE_READY;

	for (i = 0; i < pages; i += LLFREE_PAGES)
		state = max(state, llfree_look(pfn + i));
	if (state != LLFREE_READY)
		return state;
	for (i = 0; i < pages; i += LLFREE_PAGES) {
		if (llfree_take_entry(pfn + i)) {
			lz->takes++;
			continue;
		}
		/* The host was faster. */
		while (i) {
			i -= LLFREE_PAGES;
			llfree_give_entry(pfn + i);
			lz->takes--;
		}
		return LLFREE_NO_MEMORY;
	}
	return LLFREE_READY;
}

struct page *__llfree_get_page(struct zone *zone, struct free_area *area,
			       int migratetype, unsigned int order,
			       unsigned int current_order)
{
	struct list_head *list = &area->free_list[migratetype];
	struct llfree_zone *lz = llfree_zone(zone);
	struct page *page, *first = NULL;
	int look;

	if (!lz->on)
		return list_first_entry_or_null(list, struct page, buddy_list);
	for (look = 0; look < LLFREE_LOOK; look++) {
		page = list_first_entry_or_null(list, struct page, buddy_list);
		if (!page || page == first)
			break;
		switch (llfree_take(lz, page_to_pfn(page), order)) {
		case LLFREE_READY:
			lz->starved = false;
			return page;
		case LLFREE_NO_MEMORY:
			list_move_tail(&page->buddy_list, list);
			if (!first)
				first = page;
			break;
		case LLFREE_AWAY:
			/* What is left of it is in a list that we passed. */
			if (current_order > LLFREE_ORDER)
				first = page;
			llfree_sort_out(zone, page, current_order);
			break;
		}
	}
	if (first || look == LLFREE_LOOK) {
		lz->starved = true;
		lz->migratetype = migratetype;
		lz->order = current_order;
	}
	return NULL;
}

/*
 * The same, for a fallback that moves a block to the list of another type
 * before it is searched: it is not taken yet, and is the first of its list.
 */
bool __llfree_has_page(struct zone *zone, struct free_area *area,
		       int migratetype, unsigned int order,
		       unsigned int current_order)
{
	unsigned long i, pages = 1UL << max_t(unsigned int, order, LLFREE_ORDER);
	struct llfree_zone *lz = llfree_zone(zone);
	struct page *page;

	page = __llfree_get_page(zone, area, migratetype, order, current_order);
	if (!page)
		return false;
	if (!lz->on)
		return true;
	for (i = 0; i < pages; i += LLFREE_PAGES) {
		llfree_give_entry(page_to_pfn(page) + i);
		lz->takes--;
	}
	return true;
}

/* The host has had no memory for us lately. */
static bool llfree_failing(struct llfree_zone *lz)
{
	unsigned long pause;

	if (lz->failures < LLFREE_FAILURES)
		return false;
	pause = LLFREE_PAUSE_JIFFIES << (lz->failures - LLFREE_FAILURES);
	pause = min_t(unsigned long, pause, HZ);
	return time_before(jiffies, lz->last_install + pause);
}

/* The host has memory again; or it must be asked once more. */
void llfree_end_pause(struct llfree_zone *lz)
{
	lz->failures = min_t(u8, lz->failures, LLFREE_FAILURES - 1);
}

bool __llfree_starved(struct zone *zone)
{
	struct llfree_zone *lz = llfree_zone(zone);

	/* If nothing can be installed, blocks of other types may do. */
	return lz->starved && !llfree_failing(lz);
}

/*
 * Chooses an evicted block of this type for a request of @order, takes it and
 * its free and evicted neighbours, and has them out of their lists. Returns the
 * number of huge frames, 0 if there is nothing to install; @again if a block
 * with memory turned up instead.
 */
static unsigned int llfree_choose(struct zone *zone, unsigned int order,
				  int migratetype, struct page **first,
				  bool *again)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned int size, count, least;
	struct page *page;
	unsigned long pfn;

	least = max_t(unsigned int, order, LLFREE_ORDER);
	for (size = least; size < NR_PAGE_ORDERS; size++) {
		struct list_head *list;
		enum llfree_state state;

		list = &zone->free_area[size].free_list[migratetype];
		/* Evicted blocks are at the tail. */
		if (list_empty(list))
			continue;
		page = list_last_entry(list, struct page, buddy_list);
		if (size > least) {
			/* Its halves may be in different states. */
			llfree_sort_out(zone, page, size);
			size = least - 1;
			continue;
		}
		pfn = page_to_pfn(page);
		state = llfree_look(pfn);
		if (size > LLFREE_ORDER)
			state = max(state, llfree_look(pfn + LLFREE_PAGES));
		if (state == LLFREE_AWAY) {
			llfree_sort_out(zone, page, size);
			size = least - 1;
			continue;
		}
		if (state == LLFREE_READY) {
			list_move(&page->buddy_list, list);
			*again = true;
			return 0;
		}
		goto found;
	}
	return 0;

found:
	*first = page;
	for (count = 0; count < 1U << (size - LLFREE_ORDER); count++) {
		if (llfree_take_entry_any(pfn + count * LLFREE_PAGES)) {
			lz->takes++;
			continue;
		}
		/* The host was faster. */
		while (count--) {
			llfree_give_entry(pfn + count * LLFREE_PAGES);
			lz->takes--;
		}
		*again = true;
		return 0;
	}
	llfree_unlink(zone, page, size);
	if (size > LLFREE_ORDER)
		return count;

	/* One call for a run of neighbours costs little more than for one. */
	if (time_before(jiffies, lz->last_install + LLFREE_AHEAD_JIFFIES))
		lz->ahead = min(2 * lz->ahead, (unsigned int)LLFREE_AHEAD_MAX);
	else
		lz->ahead = 1;
	for (; count < lz->ahead; count++) {
		pfn += LLFREE_PAGES;
		page = pfn_to_online_page(pfn);
		if (!page || page_zone(page) != zone || !PageBuddy(page) ||
		    buddy_order(page) != LLFREE_ORDER ||
		    llfree_look(pfn) != LLFREE_NO_MEMORY ||
		    !llfree_take_entry_any(pfn))
			break;
		lz->takes++;
		llfree_unlink(zone, page, LLFREE_ORDER);
	}
	return count;
}

/* The frame of a page in the table; only for those that are in it. */
static unsigned long llfree_frame(unsigned long pfn)
{
	return llfree_entry(pfn) - llfree_table.entries;
}

/*
 * Interrupts are off while the host is asked, so that no interrupt on this CPU
 * waits for the blocks that it has out of the lists, and because the mailbox is
 * the CPU's. They would not be served meanwhile anyway: the virtual CPU stands
 * still in its call. All others go on, which they could not with the lock held.
 */
bool __llfree_refill(struct zone *zone, unsigned int order, int migratetype)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned int i, count, size;
	bool again = false, some = false, missing = false;
	struct page *first;
	unsigned long flags;

	spin_lock_irqsave(&zone->lock, flags);
	if (!lz->on || llfree_failing(lz)) {
		spin_unlock_irqrestore(&zone->lock, flags);
		return false;
	}
	if (lz->installing) {
		spin_unlock_irqrestore(&zone->lock, flags);
		/* Pairs with the release below: we see its blocks. */
		while (smp_load_acquire(&lz->installing))
			cpu_relax();
		return true;
	}
	count = llfree_choose(zone, order, migratetype, &first, &again);
	/*
	 * The search may have met them in the list of another type. It takes
	 * such a block in one piece: for a smaller one it may not look at all.
	 */
	if (!count && !again && lz->starved && lz->migratetype != migratetype) {
		order = max(order, lz->order);
		count = llfree_choose(zone, order, lz->migratetype, &first,
				      &again);
	}
	/* If what it met is gone, the next search looks at other types. */
	again |= lz->starved;
	lz->starved = false;
	if (!count) {
		spin_unlock_irqrestore(&zone->lock, flags);
		return again;
	}
	lz->installing = true;
	spin_unlock(&zone->lock);

	llfree_install(llfree_frame(page_to_pfn(first)), count);

	spin_lock(&zone->lock);
	/* An order above that of a huge frame stays in one piece. */
	size = order > LLFREE_ORDER ? order : LLFREE_ORDER;
	for (i = 0; i < count; i++) {
		/* The entries say what came of it. */
		if (llfree_is_evicted(page_to_pfn(first) + i * LLFREE_PAGES))
			size = LLFREE_ORDER;
		else
			some = true;
	}
	for (i = 0; i < count; i += 1U << (size - LLFREE_ORDER)) {
		struct page *page = first + i * LLFREE_PAGES;

		if (llfree_is_evicted(page_to_pfn(page))) {
			llfree_put_aside(lz, page);
			missing = true;
			continue;
		}
		/* Not merged with neighbours that may have no memory. */
		llfree_link(zone, page, size, false);
		__llfree_give(zone, page_to_pfn(page), size);
	}
	if (some)
		lz->failures = 0;
	else if (lz->failures < LLFREE_FAILURES + LLFREE_PAUSES)
		lz->failures++;
	lz->last_install = jiffies;
	/* Pairs with the acquire above. */
	smp_store_release(&lz->installing, false);
	spin_unlock_irqrestore(&zone->lock, flags);
	if (missing)
		llfree_try_later();
	/* After a failure, another block may have more luck. */
	return true;
}

/*
 * For those who want this very block, for a contiguous range or because it is
 * broken. They are rare and hold the lock anyway, so the host is asked with it.
 */
bool __llfree_take_block(struct zone *zone, struct page *page,
			 unsigned int order)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned long i, pfn = page_to_pfn(page);

	if (!lz->on)
		return true;
	for (i = 0; i < 1UL << order; i += LLFREE_PAGES) {
		if (!llfree_take_entry_any(pfn + i))
			goto undo;
		lz->takes++;
		if (llfree_is_evicted(pfn + i) &&
		    !llfree_install(llfree_frame(pfn + i), 1)) {
			i += LLFREE_PAGES;
			goto undo;
		}
	}
	return true;

undo:
	while (i) {
		i -= LLFREE_PAGES;
		llfree_give_entry(pfn + i);
		lz->takes--;
	}
	return false;
}

/* Free pages of a zone that are in no block of LLFREE_ORDER or more. */
unsigned long llfree_fragmented(struct zone *zone)
{
	unsigned long pages = 0;
	unsigned int order;

	for (order = 0; order < LLFREE_ORDER; order++)
		pages += READ_ONCE(zone->free_area[order].nr_free) << order;
	return pages;
}
