// SPDX-License-Identifier: GPL-2.0
/*
 * A model of Linux' page allocator, without per-CPU lists: the steps of
 * mm/page_alloc.c that blocks of LLFREE_ORDER and more go through, with the
 * hooks of the patch at the same places, for 6.1 and for 6.12. Names are the
 * kernel's.
 */
#include "kernel.h"
#include "llfree.h"

struct zone model_zone;
struct page *model_pages;
unsigned long model_nr_pages;
unsigned long jiffies = 1000000;
bool model_mutex_is_held;
static u8 *block_types;
static bool is_6_12;
/* That of a huge page, or the largest one if the kernel has none in files. */
static unsigned int pageblock_order = 9;
static struct llfree_zone llfree_zones[MAX_NR_ZONES];

static int get_pageblock_migratetype(const struct page *page)
{
	return block_types[page_to_pfn(page) >> pageblock_order];
}

static void add_to_free_list(struct page *page, struct zone *zone, unsigned int order, int type, bool tail)
{
	struct list_head *list = &zone->free_area[order].free_list[type];

	page->buddy = true;
	page->order = order;
	if (tail)
		list_add_tail(&page->buddy_list, list);
	else
		list_add(&page->buddy_list, list);
	zone->free_area[order].nr_free++;
}

static void del_page_from_free_list(struct page *page, struct zone *zone, unsigned int order)
{
	if (!page->buddy || page->order != order)
		abort();
	list_del(&page->buddy_list);
	page->buddy = false;
	zone->free_area[order].nr_free--;
}

static void account(struct zone *zone, long pages, int type)
{
	if (type != MIGRATE_ISOLATE)
		zone->free_pages += pages;
}

static void change_pageblock_range(struct page *page, unsigned int order, int type)
{
	unsigned long i;

	for (i = 0; i < 1UL << order; i += 1UL << pageblock_order)
		block_types[(page_to_pfn(page) + i) >> pageblock_order] = type;
}

static void free_one_page(struct page *page, struct zone *zone, unsigned int order, int type)
{
	unsigned long pfn = page_to_pfn(page);

	account(zone, 1L << order, type);
	while (order < MAX_ORDER - 1) {
		unsigned long buddy_pfn = pfn ^ (1UL << order);
		struct page *buddy = pfn_to_online_page(buddy_pfn);

		if (!buddy || !PageBuddy(buddy) || buddy_order(buddy) != order)
			break;
		/* See __free_one_page(). */
		if (order >= pageblock_order) {
			int buddy_type = get_pageblock_migratetype(buddy);

			if (type != buddy_type && (type >= MIGRATE_PCPTYPES || buddy_type >= MIGRATE_PCPTYPES))
				break;
			if (is_6_12)
				change_pageblock_range(buddy, order, type);
		}
		del_page_from_free_list(buddy, zone, order);
		pfn &= buddy_pfn;
		order++;
	}
	page = pfn_to_page(pfn);
	add_to_free_list(page, zone, order, type, llfree_give(zone, pfn, order));
}

static void expand(struct zone *zone, struct page *page, int low, int high, int type)
{
	unsigned long size = 1UL << high;

	while (high > low) {
		high--;
		size >>= 1;
		add_to_free_list(&page[size], zone, high, type, false);
	}
}

static struct page *rmqueue_smallest(struct zone *zone, unsigned int order, int type)
{
	unsigned int current_order;

	for (current_order = order; current_order < MAX_ORDER; current_order++) {
		struct free_area *area = &zone->free_area[current_order];
		struct page *page = llfree_get_page(zone, area, type, order, current_order);

		if (!page)
			continue;
		del_page_from_free_list(page, zone, current_order);
		expand(zone, page, order, current_order, type);
		return page;
	}
	return NULL;
}

static const int fallbacks[MIGRATE_PCPTYPES][MIGRATE_PCPTYPES - 1] = {
	[MIGRATE_UNMOVABLE] = { MIGRATE_RECLAIMABLE, MIGRATE_MOVABLE },
	[MIGRATE_MOVABLE] = { MIGRATE_RECLAIMABLE, MIGRATE_UNMOVABLE },
	[MIGRATE_RECLAIMABLE] = { MIGRATE_UNMOVABLE, MIGRATE_MOVABLE },
};

static int find_suitable_fallback(struct free_area *area, unsigned int order, int type, bool *can_steal)
{
	int i;

	*can_steal = order >= pageblock_order / 2 || type != MIGRATE_MOVABLE;
	for (i = 0; i < MIGRATE_PCPTYPES - 1; i++)
		if (!list_empty(&area->free_list[fallbacks[type][i]]))
			return fallbacks[type][i];
	return -1;
}

/* __rmqueue_fallback() of 6.1: moves a block to the list of this type. */
static bool rmqueue_fallback(struct zone *zone, int order, int type, bool no_fragment)
{
	int min_order = no_fragment && order < (int)pageblock_order ? (int)pageblock_order : order;
	struct free_area *area;
	int current_order, other;
	struct page *page;
	bool can_steal;

	for (current_order = MAX_ORDER - 1; current_order >= min_order; current_order--) {
		if (current_order < LLFREE_ORDER && llfree_starved(zone))
			break;
		area = &zone->free_area[current_order];
		other = find_suitable_fallback(area, current_order, type, &can_steal);
		if (other == -1)
			continue;
		if (!can_steal && type == MIGRATE_MOVABLE && current_order > order)
			goto find_smallest;
		if (!llfree_has_page(zone, area, other, order, current_order))
			continue;
		goto do_steal;
	}
	return false;

find_smallest:
	for (current_order = order; current_order < MAX_ORDER; current_order++) {
		area = &zone->free_area[current_order];
		other = find_suitable_fallback(area, current_order, type, &can_steal);
		if (other == -1)
			continue;
		if (llfree_has_page(zone, area, other, order, current_order))
			break;
		if (llfree_starved(zone))
			return false;
	}
	if (current_order == MAX_ORDER)
		return false;

do_steal:
	page = list_first_entry(&area->free_list[other], struct page, buddy_list);
	if (current_order >= pageblock_order)
		change_pageblock_range(page, current_order, type);
	list_move_tail(&page->buddy_list, &area->free_list[type]);
	return true;
}

/* The free blocks of a pageblock go to the lists of a type. */
static void move_freepages_block(struct zone *zone, unsigned long start, int type)
{
	struct page *page = pfn_to_page(start), *end = page + (1UL << pageblock_order);
	int was = block_types[start >> pageblock_order];

	block_types[start >> pageblock_order] = type;
	while (page < end) {
		unsigned int order;

		if (!PageBuddy(page)) {
			page++;
			continue;
		}
		order = buddy_order(page);
		list_move_tail(&page->buddy_list, &zone->free_area[order].free_list[type]);
		account(zone, -(1L << order), was);
		account(zone, 1L << order, type);
		page += 1UL << order;
	}
}

static unsigned long free_pages_of(unsigned long start)
{
	unsigned long pfn, pages = 0;

	for (pfn = start; pfn < start + (1UL << pageblock_order); pfn++)
		if (PageBuddy(pfn_to_page(pfn)))
			pages += 1UL << buddy_order(pfn_to_page(pfn));
	return pages;
}

/* try_to_steal_block() of 6.12. */
static struct page *try_to_steal_block(struct zone *zone, struct page *page, int current_order, int order, int type)
{
	int block_type = get_pageblock_migratetype(page);
	unsigned long start = page_to_pfn(page) & ~((1UL << pageblock_order) - 1);

	if (current_order >= pageblock_order) {
		page = llfree_get_page(zone, &zone->free_area[current_order], block_type, order, current_order);
		if (!page)
			return NULL;
		del_page_from_free_list(page, zone, current_order);
		change_pageblock_range(page, current_order, type);
		expand(zone, page, order, current_order, type);
		return page;
	}
	if (free_pages_of(start) < 1UL << (pageblock_order - 1))
		return NULL;
	move_freepages_block(zone, start, type);
	return rmqueue_smallest(zone, order, type);
}

/* __rmqueue_claim() and __rmqueue_steal() of 6.12. */
static struct page *rmqueue_claim(struct zone *zone, int order, int type, bool no_fragment)
{
	int min_order = no_fragment && order < (int)pageblock_order ? (int)pageblock_order : order;
	int current_order;

	for (current_order = MAX_ORDER - 1; current_order >= min_order; current_order--) {
		struct free_area *area = &zone->free_area[current_order];
		struct page *page;
		bool can_steal;
		int other;

		if (current_order < LLFREE_ORDER && llfree_starved(zone))
			break;
		other = find_suitable_fallback(area, current_order, type, &can_steal);
		if (other == -1)
			continue;
		if (!can_steal)
			break;
		if (!llfree_has_page(zone, area, other, order, current_order))
			continue;
		page = list_first_entry(&area->free_list[other], struct page, buddy_list);
		page = try_to_steal_block(zone, page, current_order, order, type);
		if (page)
			return page;
	}
	return NULL;
}

static struct page *rmqueue_steal(struct zone *zone, int order, int type)
{
	int current_order;

	for (current_order = order; current_order < MAX_ORDER; current_order++) {
		struct free_area *area = &zone->free_area[current_order];
		struct page *page;
		bool can_steal;
		int other = find_suitable_fallback(area, current_order, type, &can_steal);

		if (other == -1)
			continue;
		page = llfree_get_page(zone, area, other, order, current_order);
		if (!page && llfree_starved(zone))
			break;
		if (!page)
			continue;
		del_page_from_free_list(page, zone, current_order);
		expand(zone, page, order, current_order, other);
		return page;
	}
	return NULL;
}

static struct page *__rmqueue(struct zone *zone, unsigned int order, int type, bool no_fragment)
{
	struct page *page;

	do {
		page = rmqueue_smallest(zone, order, type);
		if (!page && type == MIGRATE_MOVABLE)
			page = rmqueue_smallest(zone, order, MIGRATE_CMA);
	} while (!page && !is_6_12 && !llfree_starved(zone) && rmqueue_fallback(zone, order, type, no_fragment));
	if (page || !is_6_12 || llfree_starved(zone))
		return page;
	page = rmqueue_claim(zone, order, type, no_fragment);
	if (!page && !no_fragment && !llfree_starved(zone))
		page = rmqueue_steal(zone, order, type);
	return page;
}

static struct page *rmqueue(struct zone *zone, unsigned int order, int type, bool no_fragment)
{
	struct page *page;

	model_lock(&zone->lock);
	page = __rmqueue(zone, order, type, no_fragment);
	if (page)
		account(zone, -(1L << order), get_pageblock_migratetype(page));
	model_unlock(&zone->lock);
	return page;
}

void llfree_unlink(struct zone *zone, struct page *page, unsigned int order)
{
	if (!zone->lock.held)
		abort();
	account(zone, -(1L << order), get_pageblock_migratetype(page));
	del_page_from_free_list(page, zone, order);
}

void llfree_link(struct zone *zone, struct page *page, unsigned int order, bool tail)
{
	int type = get_pageblock_migratetype(page);

	if (!zone->lock.held)
		abort();
	account(zone, 1L << order, type);
	add_to_free_list(page, zone, order, type, tail);
}

void llfree_free(struct zone *zone, struct page *page, unsigned int order)
{
	if (!zone->lock.held)
		abort();
	free_one_page(page, zone, order, get_pageblock_migratetype(page));
}

/* ---- for the tests */

void model_start(u16 *entries, unsigned long huge_frames, unsigned long low_frames, bool new_fallbacks,
		 bool large_pageblocks)
{
	unsigned long pfn, pages;
	unsigned int order, type;

	llfree_table = (struct llfree_table){ entries, huge_frames, low_frames, llfree_zones };
	pageblock_order = large_pageblocks ? MAX_ORDER - 1 : LLFREE_ORDER;
	/* The hole has pages, too, that are never free. */
	pages = llfree_frame_pfn(huge_frames - 1) + LLFREE_PAGES;
	free(model_pages);
	free(block_types);
	model_pages = calloc(pages, sizeof(*model_pages));
	block_types = calloc(pages >> pageblock_order, 1);
	if (!model_pages || !block_types)
		abort();
	model_nr_pages = pages;
	model_zone = (struct zone){ .managed_pages = huge_frames * LLFREE_PAGES };
	for (order = 0; order < MAX_ORDER; order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			INIT_LIST_HEAD(&model_zone.free_area[order].free_list[type]);
	llfree_zones[0] = (struct llfree_zone){ .ahead = 1 };
	INIT_LIST_HEAD(&llfree_zones[0].aside);
	for (pfn = 0; pfn < pages >> pageblock_order; pfn++)
		block_types[pfn] = MIGRATE_MOVABLE;
	llfree_key = false;
	is_6_12 = new_fallbacks;
}

/* What the kernel does at boot: all of it is in use until it is freed. */
void model_hand_over(void)
{
	llfree_key = true;
	llfree_give_zone(&model_zone);
}

/* As get_page_from_freelist(): at first, types are not mixed within a pageblock. */
long model_alloc(unsigned int order, int type)
{
	bool no_fragment = true;
	struct page *page;
	int tries = 0;

	for (;;) {
		page = rmqueue(&model_zone, order, type, no_fragment);
		if (page)
			return page_to_pfn(page);
		/* As long as something comes of it. */
		if (llfree_refill(&model_zone, order, type)) {
			if (++tries > 10000)
				abort();
			continue;
		}
		if (!no_fragment)
			return -1;
		no_fragment = false;
	}
}

void model_free(unsigned long pfn, unsigned int order)
{
	struct page *page = pfn_to_page(pfn);

	/* Types change under blocks in use; see split_free_page(). */
	if (order > pageblock_order &&
	    get_pageblock_migratetype(page) != get_pageblock_migratetype(page + LLFREE_PAGES)) {
		model_free(pfn, order - 1);
		model_free(pfn + LLFREE_PAGES, order - 1);
		return;
	}
	model_lock(&model_zone.lock);
	free_one_page(page, &model_zone, order, get_pageblock_migratetype(page));
	model_unlock(&model_zone.lock);
}

/* As alloc_contig_range() and hotplug take a block: the one with this page. */
long model_isolate(unsigned long pfn, unsigned int *order)
{
	struct page *page = NULL;
	unsigned int o;

	for (o = 0; o < MAX_ORDER; o++) {
		page = pfn_to_page(pfn & ~((1UL << o) - 1));
		if (PageBuddy(page) && buddy_order(page) == o)
			break;
	}
	if (o == MAX_ORDER)
		return -1;
	model_lock(&model_zone.lock);
	if (!llfree_take_block(&model_zone, page, o)) {
		model_unlock(&model_zone.lock);
		return -1;
	}
	account(&model_zone, -(1L << o), get_pageblock_migratetype(page));
	del_page_from_free_list(page, &model_zone, o);
	model_unlock(&model_zone.lock);
	*order = o;
	return page_to_pfn(page);
}

/* As set_migratetype_isolate() and steal_suitable_fallback() move a pageblock. */
void model_set_type(unsigned long pfn, int type)
{
	unsigned long start = pfn & ~((1UL << pageblock_order) - 1);
	struct page *head = pfn_to_page(start & ~(2 * LLFREE_PAGES - 1));

	/* Part of a block of two pageblocks: they stay together. */
	if (PageBuddy(head) && buddy_order(head) > pageblock_order)
		return;
	move_freepages_block(&model_zone, start, type);
}

int model_type(unsigned long pfn)
{
	return block_types[pfn >> pageblock_order];
}

/* What a huge frame is: 0 in use, 1 free as a whole or part of such, 2 aside. */
int model_state(unsigned long frame)
{
	unsigned long pfn = llfree_frame_pfn(frame);
	unsigned int order;

	if (pfn_to_page(pfn)->offline)
		return 2;
	for (order = LLFREE_ORDER; order < MAX_ORDER; order++) {
		struct page *head = pfn_to_page(pfn & ~((1UL << order) - 1));

		if (PageBuddy(head) && buddy_order(head) == order)
			return 1;
	}
	return 0;
}

/* The books: free pages by the lists, by the counter, and managed pages. */
void model_books(long *listed, long *counted, long *managed, long *aside)
{
	unsigned int order, type;

	*listed = 0;
	for (order = 0; order < MAX_ORDER; order++) {
		unsigned long blocks = 0;

		for (type = 0; type < MIGRATE_TYPES; type++) {
			struct page *page;

			list_for_each_entry(page, &model_zone.free_area[order].free_list[type], buddy_list) {
				if (!page->buddy || page->order != order || page->offline)
					abort();
				blocks++;
				if (get_pageblock_migratetype(page) != MIGRATE_ISOLATE)
					*listed += 1L << order;
			}
		}
		if (blocks != model_zone.free_area[order].nr_free)
			abort();
	}
	*counted = model_zone.free_pages;
	*managed = model_zone.managed_pages;
	*aside = llfree_zones[0].nr_aside;
}

/* Huge frames that came back because the host gave them, not because their install failed. */
long model_host_returns(void)
{
	return llfree_zones[0].host_returns;
}

void model_tick(unsigned long ticks)
{
	jiffies += ticks;
}

bool model_locked(void)
{
	return model_zone.lock.held;
}

/* Has somebody a mutex, so that all others who may sleep wait? */
bool model_waits(void)
{
	return model_mutex_is_held;
}

unsigned long model_pfn(unsigned long frame)
{
	return llfree_frame_pfn(frame);
}
