/* SPDX-License-Identifier: GPL-2.0 */
/*
 * An entry of the frame table that a process shares: 16 bits a huge frame of
 * 2 MiB, changed by both sides with compare-and-exchange alone.
 *
 *	 15     14        13..10             9..0
 *	+------+---------+------------------+-----------+
 *	| held | evicted | run 0-8, or huge | free 0-512|
 *	+------+---------+------------------+-----------+
 *
 * The transitions of the side that reclaims are total functions of any value:
 * false, with nothing stored, where the protocol has none. They are compared
 * with those of shared-layout, over all values, by module/check.
 */
#ifndef LLFREE_ENTRY_H
#define LLFREE_ENTRY_H

#ifdef __KERNEL__
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stdint.h>
typedef uint16_t u16;
#endif

#define LLFREE_FREE		0x0200	/* all 512 pages are free */
#define LLFREE_HUGE		0x2000	/* in use as a whole */
#define LLFREE_EVICTED		0x4000	/* no memory behind it */
#define LLFREE_HELD		0x8000	/* out of the process's reach */

#define LLFREE_ORDER		9
#define LLFREE_PAGES		(1 << LLFREE_ORDER)

/* Free as a whole, and with memory: what a reclaim gains. */
static inline bool llfree_is_resident(u16 entry)
{
	return entry == LLFREE_FREE;
}

/* Who reclaims owns the frame while its memory goes. */
static inline bool llfree_hold(u16 entry, u16 *next)
{
	if ((entry & ~LLFREE_EVICTED) != LLFREE_FREE)
		return false;
	*next = LLFREE_HELD | LLFREE_EVICTED;
	return true;
}

/* Its memory is gone: whoever takes it next is given zeroes. */
static inline bool llfree_release(u16 entry, u16 *next)
{
	if (entry != (LLFREE_HELD | LLFREE_EVICTED))
		return false;
	*next = LLFREE_FREE | LLFREE_EVICTED;
	return true;
}

/* It kept some of its memory: nobody may take it for zeroes, so one step. */
static inline bool llfree_keep(u16 entry, u16 *next)
{
	if (entry != (LLFREE_HELD | LLFREE_EVICTED))
		return false;
	*next = LLFREE_FREE;
	return true;
}

#endif
