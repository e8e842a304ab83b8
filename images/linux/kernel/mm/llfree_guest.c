// SPDX-License-Identifier: GPL-2.0
/*
 * The host of mm/llfree.c: finds its table, hands free memory over to it at
 * boot, calls it, and looks after what it changed.
 *
 * A call is made by filling the request half of this CPU's mailbox and writing
 * to an I/O port; the reply is there when the write returns. See llfree-vmm's
 * docs/protocol.md.
 */

#define pr_fmt(fmt) "llfree: " fmt

#include <linux/acpi.h>
#include <linux/compaction.h>
#include <linux/init.h>
#include <linux/interrupt.h>
#include <linux/io.h>
#include <linux/irq_work.h>
#include <linux/kexec.h>
#include <linux/kobject.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/notifier.h>
#include <linux/oom.h>
#include <linux/reboot.h>
#include <linux/sched/mm.h>
#include <linux/sizes.h>
#include <linux/smp.h>
#include <linux/suspend.h>
#include <linux/swap.h>
#include <linux/sysfs.h>
#include <linux/workqueue.h>

#include "internal.h"
#include "llfree.h"

#define LLFREE_MAGIC		0x4d56454552464c4cULL	/* "LLFREEVM" */
#define LLFREE_ABI_VERSION	2

#define LLFREE_FEATURE_PORT	BIT_ULL(0)
#define LLFREE_FEATURE_OWN	BIT_ULL(2)
#define LLFREE_FEATURE_NOTICES	BIT_ULL(3)
#define LLFREE_FEATURE_BY_TOUCH	BIT_ULL(5)

struct llfree_header {
	u64 magic;
	u32 abi_version;
	u32 header_bytes;
	u64 features;
	u64 ram_base;
	u32 huge_frames;
	u32 vcpus;
	u64 mailboxes_offset;
	u64 entries_offset;
	u64 bitfields_offset;
	u64 tenant_offset;
	u64 tenant_bytes;
	u64 total_bytes;
	u64 doorbell_gpa;
	u64 doorbell_port;
	u64 tsc_khz;
	u64 devices_gpa;
	u32 devices;
	u32 low_huge_frames;
	u32 notice_gsi;
	u32 reserved;
};

/* Words that the host changes at any time. */
#define LLFREE_LIMIT		0x100
#define LLFREE_WANTED		0x108
#define LLFREE_RETURN_EPOCH	0x110
/* Words for the host to read. */
#define LLFREE_FLOOR		0x180
#define LLFREE_FRAGMENTED	0x188
#define LLFREE_SET_ASIDE	0x190
#define LLFREE_WORDS_END	0x198

#define LLFREE_MAILBOX_BYTES	512
#define LLFREE_MAILBOX_REPLY	256

/* Calls, and what they are answered with. */
#define LLFREE_HELLO		0x00
#define LLFREE_HELLO_OWN	BIT_ULL(0)
#define LLFREE_HELLO_BY_TOUCH	BIT_ULL(1)
#define LLFREE_INSTALL		0x18
#define LLFREE_NEED		0x40
#define LLFREE_OK		0

/* What an out-of-memory condition asks for: 64 MiB. */
#define LLFREE_NEED_FRAMES	32
/* Used frames that the host is asked for at a time, with interrupts off. */
#define LLFREE_INSTALL_FRAMES	32
/* Clean cache that is dropped at a time: 16 MiB. */
#define LLFREE_TRIM_FRAMES	8UL
/* The share of memory that the host is asked to leave free. */
#define LLFREE_FLOOR_SHARE	32

static void *llfree_base;
static void *llfree_mailboxes;
static u16 llfree_port;
static u64 llfree_header_gpa __initdata;
static bool llfree_off __initdata;
/* Some of what is in use has no memory yet, and gets it by touch. */
static bool llfree_by_touch;

/* What was seen of the host's words. */
static u64 llfree_seen_epoch;
static u64 llfree_seen_limit;
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
static DEFINE_MUTEX(llfree_mutex);

static u64 llfree_word(unsigned int offset)
{
	return READ_ONCE(*(u64 *)(llfree_base + offset));
}

static void llfree_set_word(unsigned int offset, u64 value)
{
	WRITE_ONCE(*(u64 *)(llfree_base + offset), value);
}

/* Interrupts must be off: the mailbox is this CPU's. */
static u64 llfree_call(unsigned int call, u64 first, u64 second, u64 *reply)
{
	void *mailbox = llfree_mailboxes + LLFREE_MAILBOX_BYTES *
			cpu_physical_id(smp_processor_id());
	u64 *request = mailbox, *answer = mailbox + LLFREE_MAILBOX_REPLY;

	WRITE_ONCE(request[0], first);
	WRITE_ONCE(request[1], second);
	/* The host reads the words after the write to the port. */
	wmb();
	outl(0, llfree_port + call / 8);
	/* The answer is there when the write returns. */
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

/* Takes back what the host returned. */
static unsigned long llfree_returned(bool failed)
{
	u64 epoch = llfree_word(LLFREE_RETURN_EPOCH);

	/* Set before the lists are looked at: what comes later is seen then. */
	smp_store_mb(llfree_seen_epoch, epoch);
	return llfree_return_blocks(failed);
}

void __llfree_check_returned(void)
{
	if (unlikely(llfree_word(LLFREE_RETURN_EPOCH) !=
		     READ_ONCE(llfree_seen_epoch)))
		llfree_returned(true);
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
	bool changed;
	u64 limit;

	mutex_lock(&llfree_mutex);
	llfree_tell_failures();
	limit = llfree_word(LLFREE_LIMIT);
	changed = llfree_returned(failed);
	if (limit != llfree_seen_limit) {
		llfree_seen_limit = limit;
		llfree_set_held_aside();
		changed = true;
	}
	if (changed)
		setup_per_zone_wmarks();
	llfree_publish();
	mutex_unlock(&llfree_mutex);
}

/* After a notice. */
static void llfree_work_fn(struct work_struct *work)
{
	llfree_look_after(false);
}

/*
 * A second after an install that failed. The tick may be long in coming, as
 * the CPU that has it may be idle while another one goes without its memory.
 */
static void llfree_retry_fn(struct work_struct *work)
{
	llfree_look_after(true);
}

static void llfree_later_fn(struct irq_work *work)
{
	queue_delayed_work(system_wq, &llfree_retry, HZ);
}

/* The caller may hold any lock, those of timers and work queues among them. */
void llfree_try_later(void)
{
	irq_work_queue(&llfree_later);
}

/* Whether a frame is in use and has no memory but by touch. */
static bool llfree_wants_memory(unsigned long frame)
{
	return frame < llfree_table.huge_frames &&
	       READ_ONCE(llfree_table.entries[frame]) ==
	       (LLFREE_HUGE | LLFREE_EVICTED) &&
	       pfn_to_online_page(llfree_frame_pfn(frame));
}

/*
 * Has memory put behind all that is in use, so that from now on nothing is
 * touched without it. Before, it came by touch. False if the host had none for
 * some of it.
 */
static bool llfree_install_used(void)
{
	unsigned long first = 0, count, flags, i;
	bool all = true, done;

	while (first < llfree_table.huge_frames) {
		for (count = 0; count < LLFREE_INSTALL_FRAMES; count++)
			if (!llfree_wants_memory(first + count))
				break;
		if (!count) {
			first++;
			continue;
		}
		local_irq_save(flags);
		done = llfree_install(first, count);
		local_irq_restore(flags);
		cond_resched();
		for (i = 0; !done && i < count; i++)
			if (!(READ_ONCE(llfree_table.entries[first + i]) &
			      LLFREE_HUGE))
				break;
		/* One was given meanwhile, and the host may hold it: again. */
		if (!done && i < count)
			continue;
		all &= done;
		first += count;
	}
	return all;
}

/*
 * Tells the host that the table is in use, and what it may rely on. False if
 * it does not take that.
 */
static bool llfree_hello(bool by_touch)
{
	u64 say = LLFREE_HELLO_OWN, status;
	unsigned long flags;

	if (by_touch)
		say |= LLFREE_HELLO_BY_TOUCH;
	local_irq_save(flags);
	status = llfree_call(LLFREE_HELLO, LLFREE_ABI_VERSION, say, NULL);
	local_irq_restore(flags);
	if (status != LLFREE_OK)
		pr_warn("the host answers hello with status %llu\n", status);
	return status == LLFREE_OK;
}

/*
 * The rest of a hand-over that the host had no memory for. Tried ever more
 * rarely, as what is in use has what it needs, if only by touch.
 */
static void llfree_complete(void)
{
	static unsigned long pause, skipped;

	if (!llfree_by_touch || skipped++ < pause)
		return;
	skipped = 0;
	if (!llfree_install_used() || !llfree_hello(false)) {
		pause = min(2 * pause + 1, 63UL);
		return;
	}
	WRITE_ONCE(llfree_by_touch, false);
	pr_info("used memory no longer comes by touch\n");
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

/*
 * Per-CPU lists are sized for the watermarks of all memory, and hold a fifth of
 * what is left after a large shrink. An allocation that finds nothing to
 * reclaim drains none of them, and would kill for what another CPU has at hand.
 * A few pages are no progress: it might go on like that for ever.
 */
static unsigned long llfree_drain(void)
{
	unsigned long before = global_zone_page_state(NR_FREE_PAGES), after;

	drain_all_pages(NULL);
	after = global_zone_page_state(NR_FREE_PAGES);
	return after >= before + LLFREE_PAGES ? after - before : 0;
}

/* The kernel is about to kill: perhaps the host has some to spare. */
static int llfree_oom(struct notifier_block *nb, unsigned long unused,
		      void *freed)
{
	static long seen_installs;
	unsigned long flags, returned, retried, drained = 0;
	long installs = atomic_long_read(&llfree_installs);
	u64 released = 0;

	returned = llfree_returned(false);
	/* To try what failed before is no progress if it failed ever since. */
	retried = llfree_returned(true);
	if (installs != seen_installs)
		returned += retried;
	seen_installs = installs;
	if (!returned)
		drained = llfree_drain();
	if (!returned && !drained) {
		atomic_long_inc(&llfree_needs);
		local_irq_save(flags);
		llfree_call(LLFREE_NEED, LLFREE_NEED_FRAMES, 0, &released);
		local_irq_restore(flags);
		if (released)
			returned = llfree_returned(true);
	}
	*(unsigned long *)freed += returned * LLFREE_PAGES + drained;
	return NOTIFY_OK;
}

static struct notifier_block llfree_oom_nb = { .notifier_call = llfree_oom };

#ifdef CONFIG_MEMORY_HOTPLUG
/* The table would describe memory that is no longer there. */
static int llfree_memory(struct notifier_block *nb, unsigned long action,
			 void *arg)
{
	struct memory_notify *range = arg;

	if (action != MEM_GOING_OFFLINE || !llfree_entry(range->start_pfn))
		return NOTIFY_OK;
	pr_warn_ratelimited("memory of the table cannot be removed\n");
	return notifier_from_errno(-EBUSY);
}
#endif

#ifdef CONFIG_HIBERNATION
/* A kernel that is resumed has another idea of the table than its host. */
static int llfree_pm(struct notifier_block *nb, unsigned long action,
		     void *unused)
{
	if (action == PM_HIBERNATION_PREPARE)
		return notifier_from_errno(-EBUSY);
	return NOTIFY_OK;
}
#endif

static int __init llfree_parse_header(char *arg)
{
	return arg ? kstrtou64(arg, 0, &llfree_header_gpa) : -EINVAL;
}
early_param("llfree.header", llfree_parse_header);

static int __init llfree_parse(char *arg)
{
	llfree_off = arg && !strcmp(arg, "off");
	return 0;
}
early_param("llfree", llfree_parse);

/* Whether a part lies in the table; no sum of its numbers may wrap. */
static bool __init llfree_fits(const struct llfree_header *header, u64 offset,
			       u64 bytes)
{
	return offset <= header->total_bytes &&
	       bytes <= header->total_bytes - offset;
}

/* Why the header cannot be used; NULL if it can. */
static const char *__init llfree_check(const struct llfree_header *header)
{
	unsigned long end = max_pfn >> LLFREE_ORDER;
	u64 entries_bytes = 2ULL * header->huge_frames;
	u64 mailboxes_bytes = (u64)LLFREE_MAILBOX_BYTES * header->vcpus;
	int cpu;

	if (header->magic != LLFREE_MAGIC)
		return "there is none";
	if (header->abi_version != LLFREE_ABI_VERSION)
		return "it is of another version";
	if (header->header_bytes < LLFREE_WORDS_END)
		return "it is too small";
	if (!(header->features & LLFREE_FEATURE_OWN))
		return "the host does not offer it to kernels";
	if (!(header->features & LLFREE_FEATURE_PORT) ||
	    header->doorbell_port > IO_SPACE_LIMIT - PAGE_SIZE / 8)
		return "it has no port to call the host";
	if (header->ram_base || !header->huge_frames ||
	    header->low_huge_frames > header->huge_frames ||
	    header->mailboxes_offset % LLFREE_MAILBOX_BYTES ||
	    header->entries_offset % 2 ||
	    header->entries_offset < header->header_bytes ||
	    header->mailboxes_offset < header->header_bytes ||
	    header->total_bytes > SZ_8G ||
	    !llfree_fits(header, header->entries_offset, entries_bytes) ||
	    !llfree_fits(header, header->mailboxes_offset, mailboxes_bytes))
		return "its parts do not fit";
	if (header->low_huge_frames && max_pfn > (4UL << 30) >> PAGE_SHIFT)
		end -= ((4UL << 30) >> (PAGE_SHIFT + LLFREE_ORDER)) -
		       header->low_huge_frames;
	if (end > header->huge_frames)
		return "it describes less memory than there is";
	if (page_poisoning_enabled_static())
		return "page poisoning expects memory to keep its contents";
	for_each_possible_cpu(cpu)
		if (cpu_physical_id(cpu) >= header->vcpus)
			return "it has no mailbox for some CPU";
	return NULL;
}

static int __init llfree_map(u64 gpa, struct llfree_header *header)
{
	struct llfree_header *found;

	found = memremap(gpa, PAGE_SIZE, MEMREMAP_WB);
	if (!found)
		return -ENOMEM;
	/* Once: the host may change it at any time, and must not fool us. */
	memcpy(header, found, sizeof(*header));
	memunmap(found);
	return 0;
}

static void __init llfree_set_up_notices(const struct llfree_header *header)
{
	int irq;

	if (!(header->features & LLFREE_FEATURE_NOTICES))
		return;
	irq = acpi_register_gsi(NULL, header->notice_gsi, ACPI_EDGE_SENSITIVE,
				ACPI_ACTIVE_HIGH);
	if (irq < 0 || request_irq(irq, llfree_notice, 0, "llfree", &llfree_work))
		pr_warn("no interrupt %u; looking once a second instead\n",
			header->notice_gsi);
}

static int __init llfree_init(void)
{
	struct llfree_header header;
	struct llfree_zone *zones;
	unsigned long given = 0;
	struct zone *zone;
	const char *why;
	int i;

	/* A merged block must not leave by compaction_capture(). */
	BUILD_BUG_ON(LLFREE_ORDER + 2 < NR_PAGE_ORDERS);
	BUILD_BUG_ON(sizeof(struct llfree_header) != 136);

	if (!llfree_header_gpa || llfree_off)
		return 0;
	if (llfree_map(llfree_header_gpa, &header)) {
		pr_warn("no header at %#llx\n", llfree_header_gpa);
		return 0;
	}
	why = llfree_check(&header);
	if (why) {
		pr_warn("not used, header at %#llx: %s\n", llfree_header_gpa,
			why);
		return 0;
	}
	zones = kcalloc(nr_node_ids * MAX_NR_ZONES, sizeof(*zones), GFP_KERNEL);
	llfree_base = memremap(llfree_header_gpa, header.total_bytes,
			       MEMREMAP_WB);
	if (!llfree_base || !zones) {
		pr_warn("not used: no room\n");
		memunmap(llfree_base);
		kfree(zones);
		return 0;
	}
	for (i = 0; i < nr_node_ids * MAX_NR_ZONES; i++) {
		INIT_LIST_HEAD(&zones[i].aside);
		zones[i].ahead = 1;
		zones[i].last_install = jiffies - HZ;
	}
	llfree_mailboxes = llfree_base + header.mailboxes_offset;
	llfree_port = header.doorbell_port;
	llfree_table.entries = llfree_base + header.entries_offset;
	llfree_table.huge_frames = header.huge_frames;
	llfree_table.low_frames = header.low_huge_frames ?:
				  header.huge_frames;
	llfree_table.zones = zones;
	llfree_seen_epoch = llfree_word(LLFREE_RETURN_EPOCH);
	llfree_seen_limit = header.huge_frames;
	llfree_publish();

	/* What is freed from here on is given, in zones that were walked. */
	static_branch_enable(&llfree_key);
	for_each_populated_zone(zone)
		given += llfree_give_zone(zone);
	/* A host that knows no such hand-over discards what it cannot install. */
	llfree_by_touch = !llfree_install_used() &&
			  header.features & LLFREE_FEATURE_BY_TOUCH;
	llfree_hello(llfree_by_touch);
	if (llfree_by_touch)
		pr_warn("the host has no memory for all that is used, which comes by touch\n");
	pr_info("%lu of %lu huge frames are free and shared with the host\n",
		given, llfree_table.huge_frames);

	llfree_set_up_notices(&header);
	register_oom_notifier(&llfree_oom_nb);
#ifdef CONFIG_MEMORY_HOTPLUG
	hotplug_memory_notifier(llfree_memory, 0);
#endif
#ifdef CONFIG_HIBERNATION
	pm_notifier(llfree_pm, 0);
#endif
#ifdef CONFIG_KEXEC_CORE
	/* The next kernel would not know what this one has given. */
	kexec_load_disabled = 1;
#endif
	schedule_delayed_work(&llfree_tick, HZ);
	return 0;
}
subsys_initcall_sync(llfree_init);

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
LLFREE_ATTR(by_touch, READ_ONCE(llfree_by_touch));

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
