// SPDX-License-Identifier: GPL-2.0
/*
 * A model of Linux' page allocator, without per-CPU lists: the steps of
 * mm/page_alloc.c that blocks of LLFREE_ORDER and more go through, with the
 * hooks of the patch at the same places. Names are the kernel's.
 */
#include "kernel.h"
#include "llfree.h"

struct zone model_zone;
struct page *model_pages;
unsigned long model_nr_pages;
unsigned long jiffies = 1000000;
static u8 *block_types;
static struct llfree_zone llfree_zones[MAX_NR_ZONES];

static int get_pageblock_migratetype(const struct page *page)
{
	return block_types[page_to_pfn(page) >> PAGEBLOCK_ORDER];
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

static void free_one_page(struct page *page, struct zone *zone, unsigned int order, int type)
{
	unsigned long pfn = page_to_pfn(page);

	account(zone, 1L << order, type);
	while (order < MAX_ORDER - 1) {
		unsigned long buddy_pfn = pfn ^ (1UL << order);
		struct page *buddy = pfn_to_online_page(buddy_pfn);

		if (!buddy || !PageBuddy(buddy) || buddy_order(buddy) != order)
			break;
		/* Isolated blocks stay apart, see __free_one_page(). */
		if (order >= PAGEBLOCK_ORDER) {
			int buddy_type = get_pageblock_migratetype(buddy);

			if (type != buddy_type && (type == MIGRATE_ISOLATE || buddy_type == MIGRATE_ISOLATE))
				break;
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

/* Takes the largest block of another type for this one. */
static bool rmqueue_fallback(struct zone *zone, unsigned int order, int type)
{
	int current_order;

	for (current_order = MAX_ORDER - 1; current_order >= (int)order; current_order--) {
		int other;

		for (other = 0; other < MIGRATE_ISOLATE; other++) {
			struct list_head *list = &zone->free_area[current_order].free_list[other];
			struct page *page;
			unsigned long i;

			if (other == type || list_empty(list))
				continue;
			page = list_first_entry(list, struct page, buddy_list);
			for (i = 0; current_order >= PAGEBLOCK_ORDER && i < 1UL << current_order; i += 1UL << PAGEBLOCK_ORDER)
				block_types[(page_to_pfn(page) + i) >> PAGEBLOCK_ORDER] = type;
			list_move_tail(&page->buddy_list, &zone->free_area[current_order].free_list[type]);
			return true;
		}
	}
	return false;
}

static struct page *rmqueue(struct zone *zone, unsigned int order, int type)
{
	struct page *page;

	model_lock(&zone->lock);
	do
		page = rmqueue_smallest(zone, order, type);
	while (!page && !llfree_starved(zone) && rmqueue_fallback(zone, order, type));
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

void model_start(u16 *entries, unsigned long huge_frames, unsigned long low_frames)
{
	unsigned long pfn, pages;
	unsigned int order, type;

	llfree_table = (struct llfree_table){ entries, huge_frames, low_frames, llfree_zones };
	/* The hole has pages, too, that are never free. */
	pages = llfree_frame_pfn(huge_frames - 1) + LLFREE_PAGES;
	free(model_pages);
	free(block_types);
	model_pages = calloc(pages, sizeof(*model_pages));
	block_types = calloc(pages >> PAGEBLOCK_ORDER, 1);
	if (!model_pages || !block_types)
		abort();
	model_nr_pages = pages;
	model_zone = (struct zone){ .managed_pages = huge_frames * LLFREE_PAGES };
	for (order = 0; order < MAX_ORDER; order++)
		for (type = 0; type < MIGRATE_TYPES; type++)
			INIT_LIST_HEAD(&model_zone.free_area[order].free_list[type]);
	llfree_zones[0] = (struct llfree_zone){ .ahead = 1 };
	INIT_LIST_HEAD(&llfree_zones[0].aside);
	for (pfn = 0; pfn < pages >> PAGEBLOCK_ORDER; pfn++)
		block_types[pfn] = MIGRATE_MOVABLE;
	llfree_key = false;
}

/* What the kernel does at boot: all of it is in use until it is freed. */
void model_hand_over(void)
{
	llfree_key = true;
	llfree_give_zone(&model_zone);
}

long model_alloc(unsigned int order, int type)
{
	struct page *page;

	do
		page = rmqueue(&model_zone, order, type);
	while (!page && llfree_refill(&model_zone, order, type));
	return page ? (long)page_to_pfn(page) : -1;
}

void model_free(unsigned long pfn, unsigned int order)
{
	struct page *page = pfn_to_page(pfn);

	/* Types change under blocks in use; see split_free_page(). */
	if (order > PAGEBLOCK_ORDER &&
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
	unsigned long start = pfn & ~(LLFREE_PAGES - 1), end = start + LLFREE_PAGES, i;
	int was = block_types[start >> PAGEBLOCK_ORDER];
	struct page *page = pfn_to_page(start);

	/* Part of a block of two pageblocks: they stay together. */
	for (i = 0; i < 2; i++) {
		struct page *head = pfn_to_page(start & ~((LLFREE_PAGES << i) - 1));

		if (i && PageBuddy(head) && buddy_order(head) > PAGEBLOCK_ORDER)
			return;
	}
	block_types[start >> PAGEBLOCK_ORDER] = type;
	while (page_to_pfn(page) < end) {
		unsigned int order;

		if (!PageBuddy(page)) {
			page++;
			continue;
		}
		order = buddy_order(page);
		list_move_tail(&page->buddy_list, &model_zone.free_area[order].free_list[type]);
		account(&model_zone, -(1L << order), was);
		account(&model_zone, 1L << order, type);
		page += 1UL << order;
	}
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

void model_tick(unsigned long ticks)
{
	jiffies += ticks;
}

bool model_locked(void)
{
	return model_zone.lock.held;
}

unsigned long model_pfn(unsigned long frame)
{
	return llfree_frame_pfn(frame);
}
