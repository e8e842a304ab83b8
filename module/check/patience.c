/* SPDX-License-Identifier: GPL-2.0 */
/* The header's functions, to be called from outside, and its numbers. */
#include "patience.h"

const unsigned int module_hz = HZ;
const unsigned int module_patience = PATIENCE;
const unsigned int module_long_patience = LONG_PATIENCE;
const unsigned int module_batch_pages = BATCH * LLFREE_PAGES;

bool module_wait_goes_on(struct wait *wait, struct patience *patience,
			 const struct waited *waited, bool reclaims,
			 unsigned long now)
{
	return wait_goes_on(wait, patience, waited, reclaims, now);
}

void module_wait_saw(struct wait *wait, struct patience *patience, u64 progress)
{
	wait_saw(wait, patience, progress);
}

void module_wait_failed(const struct wait *wait, struct waited *waited,
			unsigned long now)
{
	wait_failed(wait, waited, now);
}

bool module_headroom_yields(struct asked *asked, u64 taken, unsigned int weight)
{
	return headroom_yields(asked, taken, weight);
}

const unsigned int module_alarms = ALARMS;
const unsigned int module_alarms_in_vain = ALARMS_IN_VAIN;
const unsigned int module_quiet = QUIET;

bool module_alarm_is_raised(struct alarms *alarms, u64 yielded,
			    unsigned long now)
{
	return alarm_is_raised(alarms, yielded, now);
}

bool module_is_alarmed(const struct alarms *alarms, unsigned long now)
{
	return is_alarmed(alarms, now);
}
