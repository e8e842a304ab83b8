// SPDX-License-Identifier: GPL-2.0
/*
 * The host of mm/llfree.c: calls it, looks after what it changed, and asks it
 * for memory before the kernel kills for want of some.
 *
 * A call is made by filling the request half of this CPU's mailbox and ringing
 * the host; the reply is there when that returns. See llfree-vmm's
 * docs/protocol.md.
 */

#define pr_fmt(fmt) "llfree: " fmt

#include <linux/mm.h>
#include <linux/compaction.h>
#include <linux/init.h>
#include <linux/interrupt.h>
#include <linux/irq_work.h>
#include <linux/kobject.h>
#include <linux/notifier.h>
#include <linux/oom.h>
#include <linux/sched/mm.h>
#include <linux/swap.h>
#include <linux/sysfs.h>
#include <linux/workqueue.h>

#include "internal.h"
#include "llfree.h"
#include "llfree_host.h"

/* What an out-of-memory condition asks for: 64 MiB. */
#define LLFREE_NEED_FRAMES	32
/* Clean cache that is dropped at a time: 16 MiB. */
#define LLFREE_TRIM_FRAMES	8UL
/* The share of memory that the host is asked to leave free. */
#define LLFREE_FLOOR_SHARE	32

struct llfree_host llfree_host;

static u64 llfree_failed_status;

/* For /sys/kernel/mm/llfree. */
static atomic_long_t llfree_installs;
static atomic_long_t llfree_install_calls;
static atomic_long_t llfree_install_failures;
static atomic_long_t llfree_notices;
static atomic_long_t llfree_needs;

static void llfree_work_fn(struct work_struct *work);
static DECLARE_WORK(llfree_work, llfree_work_fn);
static void llfree_tick_fn(struct work_struct *work);
static DECLARE_DEFERRABLE_WORK(llfree_tick, llfree_tick_fn);
static void llfree_retry_fn(struct work_struct *work);
static DECLARE_DELAYED_WORK(llfree_retry, llfree_retry_fn);
static void llfree_later_fn(struct irq_work *work);
static DEFINE_IRQ_WORK(llfree_later, llfree_later_fn);
static void llfree_soon_fn(struct irq_work *work);
static DEFINE_IRQ_WORK(llfree_soon, llfree_soon_fn);
static DEFINE_MUTEX(llfree_mutex);

u64 llfree_word(unsigned int offset)
{
	return READ_ONCE(*(u64 *)(llfree_host.base + offset));
}

static void llfree_set_word(unsigned int offset, u64 value)
{
	WRITE_ONCE(*(u64 *)(llfree_host.base + offset), value);
}

/* Interrupts must be off: the mailbox is this CPU's. */
u64 llfree_call(unsigned int call, u64 first, u64 second, u64 *reply)
{
	void *mailbox = llfree_host.mailboxes + LLFREE_MAILBOX_BYTES *
			llfree_reach_mailbox();
	u64 *request = mailbox, *answer = mailbox + LLFREE_MAILBOX_REPLY;

	WRITE_ONCE(request[0], first);
	WRITE_ONCE(request[1], second);
	/* The host reads the words after it is rung. */
	wmb();
	llfree_reach_ring(&llfree_host, call);
	/* The answer is there when that returns. */
	rmb();
	if (reply)
		*reply = READ_ONCE(answer[1]);
	return READ_ONCE(answer[0]);
}

bool llfree_install(unsigned long frame, unsigned int count)
{
	u64 status = llfree_call(LLFREE_INSTALL, frame, count, NULL);

	atomic_long_inc(&llfree_install_calls);
	if (status == LLFREE_OK) {
		atomic_long_add(count, &llfree_installs);
		return true;
	}
	/* The caller may hold any lock: what there is to say is said later. */
	atomic_long_inc(&llfree_install_failures);
	WRITE_ONCE(llfree_failed_status, status);
	return false;
}

#define llfree_sum_of(field)						\
	({								\
		unsigned long __sum = 0;				\
		struct zone *__zone;					\
									\
		for_each_populated_zone(__zone)				\
			__sum += READ_ONCE(llfree_zone(__zone)->field);	\
		__sum;							\
	})

/*
 * What the host is asked to leave: enough that no allocation gets below the
 * high watermarks, where memory is reclaimed, for want of what the host took.
 */
static void llfree_publish(void)
{
	unsigned long pages = 0, fragmented = 0;
	struct zone *zone;

	for_each_populated_zone(zone) {
		pages += high_wmark_pages(zone);
		fragmented += llfree_fragmented(zone);
	}
	pages = max(pages, llfree_table.huge_frames * LLFREE_PAGES /
			   LLFREE_FLOOR_SHARE);
	llfree_set_word(LLFREE_FLOOR, DIV_ROUND_UP(pages, LLFREE_PAGES));
	llfree_set_word(LLFREE_FRAGMENTED, fragmented);
	llfree_set_word(LLFREE_SET_ASIDE, llfree_sum_of(nr_aside));
}

/*
 * The host wants more than is free. Blocks that are free but for pages in
 * per-CPU lists are its, and some clean cache, as long as that helps: if not,
 * it is asked for ever more rarely.
 */
static void llfree_trim(void)
{
	static unsigned long last_wanted, pause, skipped;
	unsigned long wanted = llfree_word(LLFREE_WANTED);
	unsigned long pages = min(wanted, LLFREE_TRIM_FRAMES) * LLFREE_PAGES;
	unsigned int noreclaim;
	pg_data_t *pgdat;

	if (!wanted) {
		last_wanted = 0;
		pause = 0;
		return;
	}
	if (skipped++ < pause)
		return;
	skipped = 0;
	pause = wanted < last_wanted ? 0 : min(2 * pause + 1, 63UL);
	last_wanted = wanted;

	drain_all_pages(NULL);
	while (pages && llfree_word(LLFREE_WANTED)) {
		unsigned long freed;

		/* Nothing is written for it: neither dirty cache nor swap. */
		noreclaim = memalloc_noreclaim_save();
		freed = try_to_free_pages(node_zonelist(first_online_node,
							GFP_NOIO), 0,
					  GFP_NOIO, NULL);
		memalloc_noreclaim_restore(noreclaim);
		if (!freed)
			break;
		pages -= min(pages, freed);
		cond_resched();
	}
	for_each_online_pgdat(pgdat)
		wakeup_kcompactd(pgdat, LLFREE_ORDER, MAX_NR_ZONES - 1);
	drain_all_pages(NULL);
}

static void llfree_tell_failures(void)
{
	static long told;
	long failures = atomic_long_read(&llfree_install_failures);

	if (failures == told)
		return;
	pr_warn_ratelimited("the host had no memory %ld times, status %llu\n",
			    failures - told, READ_ONCE(llfree_failed_status));
	told = failures;
}

static void llfree_look_after(bool failed)
{
	static unsigned long seen_moves;
	unsigned long moves;

	mutex_lock(&llfree_mutex);
	llfree_tell_failures();
	llfree_follow_host(failed);
	/* Allocations set some aside, too, and take some back, in any zone. */
	moves = llfree_sum_of(asides) + llfree_sum_of(returns);
	if (moves != seen_moves) {
		seen_moves = moves;
		setup_per_zone_wmarks();
	}
	llfree_publish();
	mutex_unlock(&llfree_mutex);
}

/* After a notice. */
static void llfree_work_fn(struct work_struct *work)
{
	llfree_look_after(false);
}

/*
 * A second after an install that failed, or soon after an allocation saw that
 * the host has returned something. The tick may be long in coming, as the CPU
 * that has it may be idle while another one goes without its memory.
 */
static void llfree_retry_fn(struct work_struct *work)
{
	llfree_look_after(true);
}

static void llfree_later_fn(struct irq_work *work)
{
	queue_delayed_work(system_wq, &llfree_retry, HZ);
}

static void llfree_soon_fn(struct irq_work *work)
{
	mod_delayed_work(system_wq, &llfree_retry, 0);
}

/*
 * Of these two, the caller may hold any lock, those of timers and work queues
 * among them.
 */
void llfree_try_later(void)
{
	irq_work_queue(&llfree_later);
}

void llfree_try_soon(void)
{
	irq_work_queue(&llfree_soon);
}

/* Now and then, but no idle CPU wakes up for it. */
static void llfree_tick_fn(struct work_struct *work)
{
	llfree_look_after(true);
	llfree_complete();
	llfree_trim();
	schedule_delayed_work(&llfree_tick, HZ);
}

static irqreturn_t llfree_notice(int irq, void *data)
{
	atomic_long_inc(&llfree_notices);
	schedule_work(&llfree_work);
	return IRQ_HANDLED;
}

static unsigned long llfree_free_pages(void)
{
	unsigned long pages = 0;
	struct zone *zone;

	for_each_populated_zone(zone)
		pages += zone_page_state_snapshot(zone, NR_FREE_PAGES);
	return pages;
}

/*
 * What may be of no help to the request is progress to the OOM killer once a
 * second at most: it must not keep that from killing for ever.
 */
static bool llfree_once_a_second(unsigned long *next)
{
	if (time_before(jiffies, *next))
		return false;
	*next = jiffies + HZ;
	return true;
}

/*
 * Per-CPU lists are sized for the watermarks of all memory, and hold a fifth of
 * what is left after a large shrink. An allocation that finds nothing to
 * reclaim drains none of them, and would kill for what another CPU has at hand.
 * Returns pages, by which free memory is more than @before: a huge frame at
 * least, as lists fill and are drained again.
 */
static unsigned long llfree_drain(unsigned long before)
{
	static unsigned long next;
	unsigned long after;
	struct zone *zone;

	/* One zone at a time: a drain of all of them waits for no other one. */
	for_each_populated_zone(zone)
		drain_all_pages(zone);
	after = llfree_free_pages();
	if (after < before + LLFREE_PAGES || !llfree_once_a_second(&next))
		return 0;
	return after - before;
}

/*
 * What the host has given back since this was asked last, whoever put it into
 * the free lists: a worker or an allocation may be there first, and the OOM
 * killer would not know. The callers are one at a time.
 */
static unsigned long llfree_host_gave(void)
{
	static unsigned long seen;
	unsigned long now, gave;

	now = llfree_sum_of(host_returns);
	gave = now - seen;
	seen = now;
	return gave;
}

/*
 * Asks the host for memory. What was never set aside is in the free lists as it
 * ever was, and is seen by nothing but the host's word.
 */
static unsigned long llfree_need(void)
{
	static unsigned long next;
	unsigned long flags, gave;
	u64 released = 0;

	atomic_long_inc(&llfree_needs);
	local_irq_save(flags);
	llfree_call(LLFREE_NEED, LLFREE_NEED_FRAMES, 0, &released);
	local_irq_restore(flags);
	if (!released)
		return 0;
	llfree_return_blocks(true);
	gave = llfree_host_gave();
	if (!gave && llfree_once_a_second(&next))
		gave = 1;
	return gave;
}

/* The kernel is about to kill: perhaps the host has some to spare. */
static int llfree_oom(struct notifier_block *nb, unsigned long unused,
		      void *freed)
{
	static long seen_installs;
	unsigned long before = llfree_free_pages();
	unsigned long returned, retried, drained = 0;
	long installs = atomic_long_read(&llfree_installs);

	returned = llfree_return_blocks(false);
	/* To try what failed before is no progress if it failed ever since. */
	retried = llfree_return_blocks(true);
	returned = max(returned, llfree_host_gave());
	if (installs != seen_installs)
		returned += retried;
	seen_installs = installs;
	if (!returned)
		drained = llfree_drain(before + retried * LLFREE_PAGES);
	if (!returned && !drained)
		returned = llfree_need();
	*(unsigned long *)freed += returned * LLFREE_PAGES + drained;
	return NOTIFY_OK;
}

static struct notifier_block llfree_oom_nb = { .notifier_call = llfree_oom };

static void __init llfree_set_up_notices(const struct llfree_header *header)
{
	if (header->features & LLFREE_FEATURE_NOTICES &&
	    llfree_reach_notices(header, llfree_notice, &llfree_work))
		pr_warn("no interrupt %u; looking once a second instead\n",
			header->notice_gsi);
}

/* From here on, the host can be called, and reads what the kernel says. */
void __init llfree_connect(const struct llfree_header *header)
{
	llfree_host.mailboxes = llfree_host.base + header->mailboxes_offset;
	llfree_host.port = header->doorbell_port;
	llfree_publish();
}

/* From here on, what the host changes is looked after. */
void __init llfree_watch(const struct llfree_header *header)
{
	llfree_set_up_notices(header);
	register_oom_notifier(&llfree_oom_nb);
	schedule_delayed_work(&llfree_tick, HZ);
}

#define LLFREE_ATTR(name, value)					\
	static ssize_t name##_show(struct kobject *kobj,		\
				   struct kobj_attribute *attr, char *buf) \
	{								\
		return sysfs_emit(buf, "%lu\n", (unsigned long)(value)); \
	}								\
	static struct kobj_attribute name##_attr = __ATTR_RO(name)

LLFREE_ATTR(huge_frames, llfree_table.huge_frames);
LLFREE_ATTR(limit, llfree_word(LLFREE_LIMIT));
LLFREE_ATTR(floor, llfree_word(LLFREE_FLOOR));
LLFREE_ATTR(aside, llfree_sum_of(nr_aside));
LLFREE_ATTR(takes, llfree_sum_of(takes));
LLFREE_ATTR(gives, llfree_sum_of(gives));
LLFREE_ATTR(set_aside, llfree_sum_of(asides));
LLFREE_ATTR(returns, llfree_sum_of(returns));
LLFREE_ATTR(installs, atomic_long_read(&llfree_installs));
LLFREE_ATTR(install_calls, atomic_long_read(&llfree_install_calls));
LLFREE_ATTR(install_failures, atomic_long_read(&llfree_install_failures));
LLFREE_ATTR(notices, atomic_long_read(&llfree_notices));
LLFREE_ATTR(needs, atomic_long_read(&llfree_needs));
LLFREE_ATTR(by_touch, READ_ONCE(llfree_host.by_touch));

static struct attribute *llfree_attrs[] = {
	&huge_frames_attr.attr,
	&limit_attr.attr,
	&floor_attr.attr,
	&aside_attr.attr,
	&takes_attr.attr,
	&gives_attr.attr,
	&set_aside_attr.attr,
	&returns_attr.attr,
	&installs_attr.attr,
	&install_calls_attr.attr,
	&install_failures_attr.attr,
	&notices_attr.attr,
	&needs_attr.attr,
	&by_touch_attr.attr,
	NULL,
};

static const struct attribute_group llfree_group = {
	.name = "llfree",
	.attrs = llfree_attrs,
};

static int __init llfree_sysfs_init(void)
{
	if (!static_key_enabled(&llfree_key) || !IS_ENABLED(CONFIG_SYSFS))
		return 0;
	return sysfs_create_group(mm_kobj, &llfree_group);
}
late_initcall(llfree_sysfs_init);
