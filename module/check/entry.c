/* SPDX-License-Identifier: GPL-2.0 */
/* The header's functions, to be called from outside. -1: no transition. */
#include "llfree_entry.h"

#define TRANSITION(name)						\
	int module_##name(uint16_t entry)				\
	{								\
		uint16_t next = 0x1234;					\
									\
		if (llfree_##name(entry, &next))			\
			return next;					\
		return next == 0x1234 ? -1 : -2;			\
	}

TRANSITION(hold)
TRANSITION(release)
TRANSITION(keep)

bool module_is_resident(uint16_t entry)
{
	return llfree_is_resident(entry);
}
