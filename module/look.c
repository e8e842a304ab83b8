// SPDX-License-Identifier: GPL-2.0
/*
 * What an area has free: how many frames and, once a second, for how long; and
 * on which node their memory is. Nothing here changes an entry.
 */
#include <linux/bitops.h>
#include <linux/pagemap.h>
#include <linux/sched.h>
#include <linux/xarray.h>

#include "vllfree.h"

/* Frames in a look, which has the area's lock. */
#define FRAMES_A_TURN		(256 * CHUNK)
/* The same of frames whose swap is let go. */
#define SWAPPED_A_TURN		4

/* --- Counting --- */

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
void chunk_recount(struct area *area, u32 chunk)
{
	int free = count_free(area, chunk) -
		   READ_ONCE(area->chunks[chunk].skipped);

	set_chunk_free(area, chunk, max(free, 0));
}

/*
 * With an area that seems to have little, one chunk is looked at: what a
 * process has freed is found before anybody is killed, and a count of many
 * areas costs no more than that of one.
 */
void area_look_for_more(struct area *area)
{
	u32 chunk = (u32)atomic_inc_return(&area->look_at) % area->nr_chunks;

	chunk_recount(area, chunk);
}

/* --- Nodes --- */

/* What is known of where a frame's memory is: 0, or a place from 1. */
void frame_locate(struct area *area, struct note *note, u8 place)
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
bool frame_is_elsewhere(struct area *area, u32 huge, struct place *place)
{
	struct note *note = &area->notes[huge];

	frame_locate(area, note, place_of(area, huge));
	return note->place && area->places[note->place - 1] != place;
}

/* --- The look --- */

static void look_at_chunk(struct area *area, u32 chunk, bool aging)
{
	u32 first = chunk * CHUNK, nr = chunk_frames(area, chunk), i;
	unsigned int free = 0;
	bool old = false;

	for (i = first; i < first + nr; i++) {
		struct note *note = &area->notes[i];

		note->skip = 0;
		if (aging)
			frame_locate(area, note, 0);
		if (!llfree_is_resident(READ_ONCE(area->entries[i]))) {
			frame_locate(area, note, 0);
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
		old |= note->age >= grace;
	}
	WRITE_ONCE(area->chunks[chunk].skipped, 0);
	__assign_bit(chunk, area->old, old);
	set_chunk_free(area, chunk, free);
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
			frame_let_swap_go(area, i);
			turn += FRAMES_A_TURN / SWAPPED_A_TURN;
		}
		if (turn >= FRAMES_A_TURN) {
			turn = 0;
			if (!step_aside(area))
				return;
		}
	}
}
