/* SPDX-License-Identifier: GPL-2.0 */
/*
 * How long a scan waits for an area that others have, which areas it passes
 * over, and when headroom goes. Numbers alone: module/check has the same file
 * without a kernel.
 */
#ifndef PATIENCE_H
#define PATIENCE_H

#ifdef __KERNEL__
#include <linux/compiler.h>
#include <linux/jiffies.h>
#include <linux/minmax.h>
#include <linux/types.h>
#else
#include <stdbool.h>
#include <stdint.h>
typedef uint64_t u64;
#define HZ			250
#define READ_ONCE(x)		(x)
#define WRITE_ONCE(x, value)	((x) = (value))
#define time_before(a, b)	((long)((a) - (b)) < 0)
#define min(a, b)		((a) < (b) ? (a) : (b))
#endif

#include "llfree_entry.h"

/* Frames that are held at once. */
#define BATCH			16
/*
 * How long a call waits for others, in sleeps of a tick, which last up to two:
 * for those that take nothing meanwhile and are no scan, and in all.
 */
#define PATIENCE		(HZ / 10)
#define LONG_PATIENCE		HZ

/* --- Waiting for an area --- */

/* Sleeps that a call has yet, whatever the areas that it comes to. */
struct patience {
	unsigned int idle;	/* those that take nothing and are no scan */
	unsigned int all;
};

/* When reclaim last waited in vain, and how many pages were freed by then. */
struct in_vain {
	unsigned long at;
	u64 progress;
};

/*
 * For a scan, all of a call's patience; for who was none, the short one.
 * Written without a lock: in doubt somebody waits once more, or less.
 */
struct waited {
	struct in_vain for_scan, for_look;
};

/* A call's wait for one area. */
struct wait {
	u64 first, before;	/* pages freed when it began, and by now */
	unsigned int idle;	/* sleeps in a row for no scan, in vain */
	unsigned int all;	/* sleeps */
};

/* A moment ago, and nothing was taken since. */
static inline bool was_in_vain(const struct in_vain *wait, u64 progress,
			       unsigned long now)
{
	return time_before(now, READ_ONCE(wait->at) + HZ) &&
	       READ_ONCE(wait->progress) == progress;
}

/* Who waited in vain for a look says nothing of a scan that is there by now. */
static inline bool is_hopeless(const struct waited *waited, u64 progress,
			       bool reclaims, unsigned long now)
{
	return was_in_vain(&waited->for_scan, progress, now) ||
	       (!reclaims && was_in_vain(&waited->for_look, progress, now));
}

/*
 * Whether one more sleep is worth it, which is counted then. `reclaims`: it is
 * a scan that has the area.
 */
static inline bool wait_goes_on(struct wait *wait, struct patience *patience,
				const struct waited *waited, bool reclaims,
				unsigned long now)
{
	if (!patience->idle || !patience->all ||
	    wait->before - wait->first >= BATCH * LLFREE_PAGES ||
	    (!wait->all && is_hopeless(waited, wait->before, reclaims, now)))
		return false;
	/* While a scan unmaps a batch nothing comes free yet. */
	if (!reclaims) {
		patience->idle--;
		wait->idle++;
	}
	patience->all--;
	wait->all++;
	return true;
}

/* After a sleep. */
static inline void wait_saw(struct wait *wait, struct patience *patience,
			    u64 progress)
{
	if (progress != wait->before) {
		patience->idle = PATIENCE;
		wait->idle = 0;
	}
	wait->before = progress;
}

/*
 * It did not get the area. That is no news where patience was spent on others:
 * an area is passed over only after a whole wait for it.
 */
static inline void wait_failed(const struct wait *wait, struct waited *waited,
			       unsigned long now)
{
	if (wait->idle == PATIENCE) {
		WRITE_ONCE(waited->for_look.progress, wait->before);
		WRITE_ONCE(waited->for_look.at, now);
	}
	if (wait->all == LONG_PATIENCE && wait->before == wait->first) {
		WRITE_ONCE(waited->for_scan.progress, wait->before);
		WRITE_ONCE(waited->for_scan.at, now);
	}
}

/* --- Headroom --- */

/* Reclaim's priorities from 12 to 0, at each of which it counts. */
#define ROUND			13U

/* Counts since anything was taken that is not headroom. */
struct asked {
	u64 taken;
	unsigned int times;
};

/*
 * Times that the machine was out of memory, or a part of it for who may have no
 * other, and was asked to try once more. No longer than this may anybody be
 * spared for it: a process that may use one node only finds others' headroom of
 * no use, and others may free again what went.
 */
#define ALARMS			32U
/* The same while no headroom goes: not every round of reclaim asks all. */
#define ALARMS_IN_VAIN		8U
/* After so long without one they begin anew. */
#define QUIET			(10 * HZ)

struct alarms {
	unsigned long at;	/* the last one */
	u64 yielded;		/* headroom that had gone by then */
	unsigned int nr;
	unsigned int in_vain;
};

/* Out of memory: whether reclaim shall try once more, for which headroom goes. */
static inline bool alarm_is_raised(struct alarms *alarms, u64 yielded,
				   unsigned long now)
{
	if (!alarms->nr || !time_before(now, alarms->at + QUIET)) {
		alarms->nr = 0;
		alarms->in_vain = 0;
	} else if (alarms->yielded != yielded) {
		alarms->in_vain = 0;
	}
	alarms->yielded = yielded;
	WRITE_ONCE(alarms->at, now);
	if (alarms->nr == ALARMS || alarms->in_vain == ALARMS_IN_VAIN)
		return false;
	WRITE_ONCE(alarms->nr, alarms->nr + 1);
	alarms->in_vain++;
	return true;
}

/* A moment ago the machine was out of memory. */
static inline bool is_alarmed(const struct alarms *alarms, unsigned long now)
{
	return READ_ONCE(alarms->nr) &&
	       time_before(now, READ_ONCE(alarms->at) + HZ);
}

/*
 * Whether headroom may go, after a count that stands for `weight` of them: a
 * whole round of reclaim was in vain, for that in which something was taken may
 * go on with as many counts as one, without knowing of it. Reclaim of a cgroup
 * has 17 rounds in vain before anybody is killed. That of the machine may have
 * one, if all that its lists have would not do: hence the alarm.
 */
static inline bool headroom_yields(struct asked *asked, u64 taken,
				   unsigned int weight)
{
	if (asked->taken != taken) {
		asked->taken = taken;
		asked->times = 0;
	}
	if (asked->times <= 2 * ROUND)
		asked->times += min(weight, 2 * ROUND + 1);
	return asked->times > 2 * ROUND;
}

#endif
