// SPDX-License-Identifier: GPL-2.0
/*
 * Huge frames that cannot be had now: the host holds them, or had no memory
 * for them. They are set aside, which takes them out of the free lists and out
 * of MemTotal, and go back when the host has returned them, or to be tried
 * again.
 *
 * A large grow returns many at once. Each goes back with zone->lock held and
 * interrupts off, so this is done in batches. Who may sleep walks the whole
 * list, one at a time; an allocation, which may come from anywhere, has one
 * batch, and a worker does the rest.
 */

#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/mutex.h>
#include <linux/page-flags.h>
#include <linux/sched.h>

#include "internal.h"
#include "llfree.h"
#include "llfree_host.h"

/* Blocks that are looked at, and may go back, with zone->lock held. */
#define LLFREE_BATCH		32
/* The same for those who may not sleep, if few of what they see goes back. */
#define LLFREE_GLANCES		256

/* The last return of the host after which all was looked at. */
static u64 llfree_seen_epoch;

/*
 * Puts a huge frame that is in no list aside, until the host returns it. Its
 * pages are offline as those that a balloon or virtio-mem gave away: nobody
 * reads them for a dump, and they do not count as the guest's memory.
 */
void llfree_put_aside(struct llfree_zone *lz, struct page *page)
{
	unsigned long i;

	for (i = 0; i < LLFREE_PAGES; i++)
		__SetPageOffline(page + i);
	list_add_tail(&page->lru, &lz->aside);
	lz->nr_aside++;
	lz->asides++;
	adjust_managed_page_count(page, -(long)LLFREE_PAGES);
}

/*
 * Takes a block off its list, splits it into huge frames, and puts those aside
 * that cannot be had. The others go back, to be judged one by one.
 */
void llfree_sort_out(struct zone *zone, struct page *page, unsigned int order)
{
	struct page *end = page + (1UL << order);

	llfree_unlink(zone, page, order);
	for (; page < end; page += LLFREE_PAGES) {
		enum llfree_state state = llfree_look(page_to_pfn(page));

		if (state == LLFREE_AWAY)
			llfree_put_aside(llfree_zone(zone), page);
		else
			llfree_link(zone, page, LLFREE_ORDER,
				    state == LLFREE_NO_MEMORY);
	}
}

/* The block in a free list with this huge frame; NULL if there is none. */
static struct page *llfree_block_of(struct zone *zone, unsigned long pfn)
{
	unsigned int order;

	for (order = LLFREE_ORDER; order < NR_PAGE_ORDERS; order++) {
		struct page *page;

		page = pfn_to_online_page(pfn & ~((1UL << order) - 1));
		if (page && page_zone(page) == zone && PageBuddy(page) &&
		    buddy_order(page) == order)
			return page;
	}
	return NULL;
}

/*
 * Sets all held blocks aside. Searches would do that one by one as they meet
 * them; until then MemTotal and MemFree count what is not there.
 */
void llfree_set_held_aside(void)
{
	unsigned long frame, flags;

	for (frame = 0; frame < llfree_table.huge_frames; frame++) {
		unsigned long pfn;
		struct page *page;
		struct zone *zone;

		if (!(READ_ONCE(llfree_table.entries[frame]) & LLFREE_HELD))
			continue;
		pfn = llfree_frame_pfn(frame);
		page = pfn_to_online_page(pfn);
		if (!page)
			continue;
		zone = page_zone(page);
		spin_lock_irqsave(&zone->lock, flags);
		page = llfree_block_of(zone, pfn);
		if (page && llfree_look(pfn) == LLFREE_AWAY)
			llfree_sort_out(zone, page, buddy_order(page));
		spin_unlock_irqrestore(&zone->lock, flags);
		cond_resched();
	}
}

/* Whether the host has returned a block; or if its install @failed, any time. */
static bool llfree_is_back(struct page *page, bool failed)
{
	u16 now = READ_ONCE(*llfree_entry(page_to_pfn(page))) & ~LLFREE_EVICTED;

	return now == LLFREE_FREE || (failed && now == LLFREE_HUGE);
}

/* A block that is set aside goes back to the free lists. */
static void llfree_return(struct zone *zone, struct page *page)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned long i;

	list_del(&page->lru);
	for (i = 0; i < LLFREE_PAGES; i++)
		__ClearPageOffline(page + i);
	lz->nr_aside--;
	lz->returns++;
	/* Not one whose install failed. */
	if (llfree_is_back(page, false))
		lz->host_returns++;
	adjust_managed_page_count(page, LLFREE_PAGES);
	llfree_free(zone, page, LLFREE_ORDER);
}

/*
 * What does not go back goes to the end of the list. New blocks do, too, and
 * others only take blocks off it. So when as many were looked at as there were
 * at first, each of those was, though the lock was dropped meanwhile.
 */
static unsigned long llfree_return_zone(struct zone *zone, bool failed)
{
	struct llfree_zone *lz = llfree_zone(zone);
	unsigned long flags, left, returned = 0;

	spin_lock_irqsave(&zone->lock, flags);
	if (failed)
		llfree_end_pause(lz);
	for (left = lz->nr_aside; left && lz->nr_aside; left--) {
		struct page *page;

		page = list_first_entry(&lz->aside, struct page, lru);
		if (llfree_is_back(page, failed)) {
			llfree_return(zone, page);
			returned++;
		} else {
			list_move_tail(&page->lru, &lz->aside);
		}
		if (left % LLFREE_BATCH == 1) {
			spin_unlock_irqrestore(&zone->lock, flags);
			cond_resched();
			spin_lock_irqsave(&zone->lock, flags);
		}
	}
	spin_unlock_irqrestore(&zone->lock, flags);
	return returned;
}

/*
 * Puts all blocks that are set aside, and that the host has returned, back into
 * the free lists; also those whose install @failed, to try again at once, as a
 * host that has returned some may have memory for them. Returns huge frames.
 * May sleep.
 *
 * The epoch is read once, before the walk: what comes after that is for the next
 * one. No zone is passed over without its lock, for a search that has it may be
 * about to set aside what was returned.
 */
unsigned long llfree_return_blocks(bool failed)
{
	/*
	 * Of two, each would find but what the other one has left; and one that
	 * began earlier could forget an epoch that the other one has seen.
	 */
	static DEFINE_MUTEX(alone);
	unsigned long returned = 0;
	struct zone *zone;
	u64 epoch;

	mutex_lock(&alone);
	epoch = llfree_word(LLFREE_RETURN_EPOCH);
	failed |= epoch != llfree_seen_epoch;
	for_each_populated_zone(zone)
		returned += llfree_return_zone(zone, failed);
	WRITE_ONCE(llfree_seen_epoch, epoch);
	mutex_unlock(&alone);
	return returned;
}

/*
 * The same for one batch a zone, from any context. The order of the list stays,
 * for the sake of who walks it.
 */
unsigned long llfree_return_some(bool failed)
{
	unsigned long flags, returned = 0;
	struct page *page, *next;
	struct zone *zone;

	for_each_populated_zone(zone) {
		struct llfree_zone *lz = llfree_zone(zone);
		unsigned int looks = 0, batch = 0;

		/* Whoever comes to have some meanwhile is for the worker. */
		if (!READ_ONCE(lz->nr_aside) && !READ_ONCE(lz->failures))
			continue;
		spin_lock_irqsave(&zone->lock, flags);
		if (failed)
			llfree_end_pause(lz);
		list_for_each_entry_safe(page, next, &lz->aside, lru) {
			if (looks++ == LLFREE_GLANCES || batch == LLFREE_BATCH)
				break;
			if (!llfree_is_back(page, failed))
				continue;
			llfree_return(zone, page);
			batch++;
		}
		spin_unlock_irqrestore(&zone->lock, flags);
		returned += batch;
	}
	return returned;
}

/*
 * For an allocation, from any context: takes back some of what the host has
 * returned. The first one after a return also has what failed before tried
 * again, and has a worker look at the rest; only then is the epoch seen. The
 * others do not call the worker, which each call would put last in its queue.
 */
void __llfree_check_returned(void)
{
	static u64 tried;
	u64 epoch = llfree_word(LLFREE_RETURN_EPOCH);
	bool first = READ_ONCE(tried) != epoch;

	if (likely(epoch == READ_ONCE(llfree_seen_epoch)))
		return;
	WRITE_ONCE(tried, epoch);
	llfree_return_some(first);
	if (first)
		llfree_try_soon();
}

/*
 * Looks what the host has returned, and what it holds. Its limit is no sign of
 * the latter by itself: between two looks it may have returned some and held
 * others, and is what it was. One caller at a time.
 */
void llfree_follow_host(bool failed)
{
	static u64 seen_limit, seen_epoch;
	u64 epoch = llfree_word(LLFREE_RETURN_EPOCH);
	u64 limit = llfree_word(LLFREE_LIMIT);

	llfree_return_blocks(failed);
	if (limit == seen_limit && epoch == seen_epoch)
		return;
	seen_limit = limit;
	seen_epoch = epoch;
	llfree_set_held_aside();
}
