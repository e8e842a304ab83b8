// SPDX-License-Identifier: GPL-2.0
/*
 * How the memory of huge frames goes that a process has free.
 *
 * A frame is held while its memory goes: free -> held, unmap, remove its
 * folios from the file, held -> free and evicted. The process, which waits for
 * nobody, cannot have it meanwhile, and knows afterwards that it reads zeroes.
 *
 * frames_discard() is called in reclaim, under any allocation. So it waits for
 * no lock that somebody may hold who allocates: each folio is only ever tried,
 * and what is busy is left as it is. What may wait is i_mmap_rwsem, for which
 * the kernel has said that it is never held around such an allocation (see
 * dma_resv_lockdep()), and the notifiers of a process's mappings. Reclaim itself
 * may wait for both when it unmaps a page, whatever it was asked with (see
 * try_to_unmap() and fs_reclaim_acquire()), though it leaves most pages alone
 * whose locks others want; and nothing here is a file system's or needs a disk.
 * shmem_truncate_range() is not called on memory, for it waits for folios that
 * somebody may hold who is in reclaim himself, such as one that splits them.
 */
#include <linux/pagemap.h>
#include <linux/pagevec.h>
#include <linux/shmem_fs.h>
#include <linux/version.h>
#include <linux/xarray.h>

#include "vllfree.h"

enum emptied { KEPT, SWAPPED, EMPTY };

/* One attempt: an entry that changed meanwhile is the process's. */
bool frame_change(struct area *area, u32 huge,
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

/* --- One frame --- */

static int remove_folio(struct address_space *mapping, struct folio *folio)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
	return generic_error_remove_page(mapping, &folio->page);
#else
	return generic_error_remove_folio(mapping, folio);
#endif
}

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
static enum emptied empty(struct area *area, u32 huge, unsigned long *freed)
{
	struct address_space *mapping = area->memory->f_mapping;
	pgoff_t first = (pgoff_t)huge << LLFREE_ORDER;
	pgoff_t last = first + LLFREE_PAGES - 1, next = first;
	struct folio_batch batch;
	bool kept = false;
	unsigned int i;

	folio_batch_init(&batch);
	while (next <= last && filemap_get_folios(mapping, &next, last, &batch)) {
		unsigned long taken = 0;

		for (i = 0; i < folio_batch_count(&batch); i++) {
			struct folio *folio = batch.folios[i];

			if (take_folio(mapping, folio, first, last))
				taken += folio_nr_pages(folio);
			else
				kept = true;
		}
		folio_batch_release(&batch);
		*freed += taken;
		/* Who waits for us sees that it is worth it. */
		WRITE_ONCE(area->stats.freed_pages,
			   area->stats.freed_pages + taken);
	}
	if (kept)
		return KEPT;
	return has_entries(mapping, huge) ? SWAPPED : EMPTY;
}

/* --- Those that are held --- */

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
unsigned int frames_discard(struct area *area, const u32 *frames,
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
			emptied[i] = empty(area, frames[i], freed);
	if (*freed != before)
		settle_blocks(mapping->host);
	for (i = 0; i < nr; i++) {
		struct note *note = &area->notes[frames[i]];
		bool done;

		if (emptied[i] == EMPTY) {
			done = frame_change(area, frames[i], llfree_release);
			evicted += done;
		} else {
			done = frame_change(area, frames[i], llfree_keep);
			note->skip = 1;
			area->chunks[frames[i] / CHUNK].skipped++;
			note->swapped = emptied[i] == SWAPPED;
			area->has_swapped |= note->swapped;
			stats->kept++;
		}
		note->age = 0;
		frame_locate(area, note, 0);
		stats->broken += !done;
	}
	raise_epoch(area);
	stats->evicted += evicted;
	stats->batches++;
	return evicted;
}

/*
 * Lets go of the swap of frames that are free. Not in reclaim: this may wait
 * for folios that the process brings in meanwhile.
 */
void frame_let_swap_go(struct area *area, u32 huge)
{
	struct inode *inode = file_inode(area->memory);
	loff_t start = (loff_t)huge << HUGE_SHIFT;
	bool done;

	area->notes[huge].swapped = 0;
	if (!llfree_is_resident(READ_ONCE(area->entries[huge])) ||
	    !frame_change(area, huge, llfree_hold))
		return;
	raise_epoch(area);
	WRITE_ONCE(area->waits, true);
	unmap_mapping_range(inode->i_mapping, start, 1L << HUGE_SHIFT, 0);
	shmem_truncate_range(inode, start, start + (1L << HUGE_SHIFT) - 1);
	WRITE_ONCE(area->waits, false);
	if (has_entries(inode->i_mapping, huge)) {
		done = frame_change(area, huge, llfree_keep);
	} else {
		done = frame_change(area, huge, llfree_release);
		area->stats.swapped += done;
	}
	area->stats.broken += !done;
	raise_epoch(area);
}
