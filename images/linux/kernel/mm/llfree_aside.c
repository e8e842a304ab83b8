// SPDX-License-Identifier: GPL-2.0
/*
 * Huge frames that cannot be had now: the host holds them, or had no memory
 * for them. They are set aside, which takes them out of the free lists and out
 * of MemTotal, and go back when the host has returned them, or to be tried
 * again.
 */

#include <linux/mm.h>
#include <linux/mmzone.h>
#include <linux/page-flags.h>
#include <linux/sched.h>

#include "internal.h"
#include "llfree.h"

/* Blocks that are given back with zone->lock held. */
#define LLFREE_BATCH		32

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

/*
 * The first block that is set aside goes back, or to the end: who does that for
 * as many as there are has looked at each, whatever others do meanwhile.
 */
static bool llfree_return_first(struct zone *zone, bool failed)
{
	struct llfree_zone *lz = llfree_zone(zone);
	struct page *page = list_first_entry(&lz->aside, struct page, lru);
	u16 now = READ_ONCE(*llfree_entry(page_to_pfn(page))) & ~LLFREE_EVICTED;
	unsigned long i;

	if (now != LLFREE_FREE && !(failed && now == LLFREE_HUGE)) {
		list_move_tail(&page->lru, &lz->aside);
		return false;
	}
	list_del(&page->lru);
	for (i = 0; i < LLFREE_PAGES; i++)
		__ClearPageOffline(page + i);
	lz->nr_aside--;
	lz->returns++;
	adjust_managed_page_count(page, LLFREE_PAGES);
	llfree_free(zone, page, LLFREE_ORDER);
	return true;
}

/*
 * Puts blocks that are set aside, and that the host has returned, back into
 * the free lists; also those whose install @failed, to try again at once.
 * Returns huge frames.
 */
unsigned long llfree_return_blocks(bool failed)
{
	unsigned long flags, returned = 0;
	struct zone *zone;

	for_each_populated_zone(zone) {
		struct llfree_zone *lz = llfree_zone(zone);
		unsigned long left;

		if (!READ_ONCE(lz->nr_aside) && !READ_ONCE(lz->failures))
			continue;
		spin_lock_irqsave(&zone->lock, flags);
		if (failed)
			llfree_end_pause(lz);
		for (left = lz->nr_aside; left && lz->nr_aside; left--) {
			/* There may be many, and interrupts are off. */
			if (left % LLFREE_BATCH == 0) {
				spin_unlock_irqrestore(&zone->lock, flags);
				spin_lock_irqsave(&zone->lock, flags);
				if (!lz->nr_aside)
					break;
			}
			returned += llfree_return_first(zone, failed);
		}
		spin_unlock_irqrestore(&zone->lock, flags);
	}
	return returned;
}
