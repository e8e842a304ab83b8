/* SPDX-License-Identifier: GPL-2.0 */
/*
 * Free memory that is shared with the hypervisor: what the page allocator
 * calls, and the words of the table. See mm/llfree.c.
 */
#ifndef _MM_LLFREE_H
#define _MM_LLFREE_H

#include <linux/jump_label.h>
#include <linux/mmzone.h>

#include "internal.h"

/* The unit of sharing: a huge frame of 2 MiB, with one entry in the table. */
#define LLFREE_ORDER		9
#define LLFREE_PAGES		(1UL << LLFREE_ORDER)

/* Before 6.7. */
#ifndef NR_PAGE_ORDERS
#define NR_PAGE_ORDERS		MAX_ORDER
#endif

#ifdef CONFIG_LLFREE

DECLARE_STATIC_KEY_FALSE(llfree_key);

/* In page_alloc.c, for mm/llfree.c; zone->lock must be held. */
void llfree_unlink(struct zone *zone, struct page *page, unsigned int order);
void llfree_link(struct zone *zone, struct page *page, unsigned int order,
		 bool tail);
void llfree_free(struct zone *zone, struct page *page, unsigned int order);

bool __llfree_give(struct zone *zone, unsigned long pfn, unsigned int order);
struct page *__llfree_get_page(struct zone *zone, struct free_area *area,
			       int migratetype, unsigned int order,
			       unsigned int current_order);
bool __llfree_has_page(struct zone *zone, struct free_area *area,
		       int migratetype, unsigned int order,
		       unsigned int current_order);
bool __llfree_starved(struct zone *zone);
bool __llfree_refill(struct zone *zone, unsigned int order, int migratetype);
bool __llfree_take_block(struct zone *zone, struct page *page,
			 unsigned int order);
void __llfree_check_returned(void);

static inline bool llfree_enabled(void)
{
	return static_branch_unlikely(&llfree_key);
}

/*
 * A block of @order at @pfn is about to enter a free list: the host may have
 * the huge frames in it. Returns true if it belongs at the tail of its list,
 * since no memory is behind it. zone->lock must be held.
 */
static inline bool llfree_give(struct zone *zone, unsigned long pfn,
			       unsigned int order)
{
	return llfree_enabled() && order >= LLFREE_ORDER &&
	       __llfree_give(zone, pfn, order);
}

/*
 * The block of @current_order that serves a request of @order, still in its
 * free list, and out of the host's reach. zone->lock must be held.
 */
static inline struct page *llfree_get_page(struct zone *zone,
					   struct free_area *area,
					   int migratetype, unsigned int order,
					   unsigned int current_order)
{
	if (llfree_enabled() && current_order >= LLFREE_ORDER)
		return __llfree_get_page(zone, area, migratetype, order,
					 current_order);
	return list_first_entry_or_null(&area->free_list[migratetype],
					struct page, buddy_list);
}

/*
 * Whether llfree_get_page() would find one, which then is the first block of
 * its list. zone->lock must be held.
 */
static inline bool llfree_has_page(struct zone *zone, struct free_area *area,
				   int migratetype, unsigned int order,
				   unsigned int current_order)
{
	return !llfree_enabled() || current_order < LLFREE_ORDER ||
	       __llfree_has_page(zone, area, migratetype, order, current_order);
}

/*
 * Whether the last search saw free blocks without memory, and none with: then
 * llfree_refill() helps, and no block of another type has to be stolen.
 * zone->lock must be held.
 */
static inline bool llfree_starved(struct zone *zone)
{
	return llfree_enabled() && __llfree_starved(zone);
}

/*
 * After a search that found nothing, without the lock: has memory put behind
 * free blocks. True if another search may succeed.
 */
static inline bool llfree_refill(struct zone *zone, unsigned int order,
				 int migratetype)
{
	return llfree_enabled() && __llfree_refill(zone, order, migratetype);
}

/*
 * Takes a whole block that is in a free list out of the host's reach; false
 * if that cannot be had. zone->lock must be held.
 */
static inline bool llfree_take_block(struct zone *zone, struct page *page,
				     unsigned int order)
{
	return !llfree_enabled() || order < LLFREE_ORDER ||
	       __llfree_take_block(zone, page, order);
}

/* The same for the huge frame with this page, in a block of @order. */
static inline bool llfree_take_page(struct zone *zone, struct page *page,
				    unsigned int order)
{
	page -= page_to_pfn(page) % LLFREE_PAGES;
	return order < LLFREE_ORDER ||
	       llfree_take_block(zone, page, LLFREE_ORDER);
}

/* Before memory is reclaimed for want of it: has the host returned some? */
static inline void llfree_check_returned(void)
{
	if (llfree_enabled())
		__llfree_check_returned();
}

/*
 * What follows is for mm/llfree*.c.
 *
 * An entry of the table: 16 bits a huge frame, changed by both sides with
 * compare-and-exchange. Bits 9 to 0 count its free pages, 0 or 512 here.
 */
#define LLFREE_FREE		0x0200
#define LLFREE_HUGE		0x2000	/* in use as a whole */
#define LLFREE_EVICTED		0x4000	/* no memory behind it */
#define LLFREE_HELD		0x8000	/* the host's */

enum llfree_state {
	LLFREE_READY,		/* free, with memory */
	LLFREE_NO_MEMORY,	/* free, evicted */
	LLFREE_AWAY,		/* held, or nonsense */
};

/* The part of a zone that the table is about. Guarded by its lock. */
struct llfree_zone {
	bool on;			/* its free blocks were given */
	bool starved;			/* see llfree_starved() */
	bool installing;		/* one CPU has blocks out of the lists */
	u8 failures;			/* of installs, in a row */
	int migratetype;		/* the list that starved, */
	unsigned int order;		/* and of which order */
	unsigned int ahead;		/* huge frames of the next install */
	unsigned long last_install;	/* in jiffies */
	struct list_head aside;		/* blocks that cannot be had now */
	unsigned long nr_aside;		/* huge frames */
	unsigned long host_returns;	/* of these, that the host gave back */
	/* For /sys/kernel/mm/llfree */
	unsigned long takes;
	unsigned long gives;
	unsigned long asides;
	unsigned long returns;
};

/* The table, as this kernel maps it. Set once, before the first hook runs. */
struct llfree_table {
	u16 *entries;
	unsigned long huge_frames;
	unsigned long low_frames;	/* of these, below the hole */
	struct llfree_zone *zones;	/* MAX_NR_ZONES a node */
};

extern struct llfree_table llfree_table;

struct llfree_zone *llfree_zone(struct zone *zone);
u16 *llfree_entry(unsigned long pfn);
enum llfree_state llfree_look(unsigned long pfn);
unsigned long llfree_frame_pfn(unsigned long frame);
unsigned long llfree_give_zone(struct zone *zone);
unsigned long llfree_fragmented(struct zone *zone);
void llfree_end_pause(struct llfree_zone *lz);

/* In mm/llfree_aside.c. For the first two, zone->lock must be held. */
void llfree_put_aside(struct llfree_zone *lz, struct page *page);
void llfree_sort_out(struct zone *zone, struct page *page, unsigned int order);
void llfree_set_held_aside(void);
unsigned long llfree_return_blocks(bool failed);
unsigned long llfree_return_some(bool failed);
void llfree_follow_host(bool failed);

/* In mm/llfree_guest.c: has memory put behind huge frames; interrupts off. */
bool llfree_install(unsigned long frame, unsigned int count);
/*
 * Has what is set aside for want of memory tried again, in a second; or looks
 * at once what the host has returned. From any context.
 */
void llfree_try_later(void);
void llfree_try_soon(void);

#else

static inline bool llfree_give(struct zone *zone, unsigned long pfn,
			       unsigned int order)
{
	return false;
}

static inline struct page *llfree_get_page(struct zone *zone,
					   struct free_area *area,
					   int migratetype, unsigned int order,
					   unsigned int current_order)
{
	return list_first_entry_or_null(&area->free_list[migratetype],
					struct page, buddy_list);
}

static inline bool llfree_has_page(struct zone *zone, struct free_area *area,
				   int migratetype, unsigned int order,
				   unsigned int current_order)
{
	return true;
}

static inline bool llfree_starved(struct zone *zone)
{
	return false;
}

static inline bool llfree_refill(struct zone *zone, unsigned int order,
				 int migratetype)
{
	return false;
}

static inline bool llfree_take_block(struct zone *zone, struct page *page,
				     unsigned int order)
{
	return true;
}

static inline bool llfree_take_page(struct zone *zone, struct page *page,
				    unsigned int order)
{
	return true;
}

static inline void llfree_check_returned(void)
{
}

#endif
#endif
