// SPDX-License-Identifier: GPL-2.0
/*
 * The boot of mm/llfree.c: finds the table of its host, hands free memory over,
 * and has memory put behind all that is in use. What cannot be while a table is
 * in use is refused here.
 */

#define pr_fmt(fmt) "llfree: " fmt

#include <linux/init.h>
#include <linux/kexec.h>
#include <linux/memblock.h>
#include <linux/memory.h>
#include <linux/mm.h>
#include <linux/notifier.h>
#include <linux/sizes.h>
#include <linux/slab.h>
#include <linux/suspend.h>

#include "internal.h"
#include "llfree.h"
#include "llfree_host.h"

/* Used frames that the host is asked for at a time, with interrupts off. */
#define LLFREE_INSTALL_FRAMES	32

static u64 llfree_header_at __initdata;
static bool llfree_off __initdata;

static int __init llfree_parse_header(char *arg)
{
	return arg ? kstrtou64(arg, 0, &llfree_header_at) : -EINVAL;
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
	return offset >= header->header_bytes &&
	       offset <= header->total_bytes &&
	       bytes <= header->total_bytes - offset;
}

/* The same for the parts that are used here. */
static const char *__init llfree_check_parts(const struct llfree_header *header)
{
	u64 entries = header->entries_offset;
	u64 entries_bytes = 2ULL * header->huge_frames;
	u64 mailboxes = header->mailboxes_offset;
	u64 mailboxes_bytes = (u64)LLFREE_MAILBOX_BYTES * header->vcpus;

	if (header->ram_base || !header->huge_frames ||
	    header->low_huge_frames > header->huge_frames ||
	    header->total_bytes > SZ_8G ||
	    mailboxes % LLFREE_MAILBOX_BYTES || entries % 2 ||
	    !llfree_fits(header, entries, entries_bytes) ||
	    !llfree_fits(header, mailboxes, mailboxes_bytes))
		return "its parts do not fit";
	if (entries < mailboxes + mailboxes_bytes &&
	    mailboxes < entries + entries_bytes)
		return "its parts overlap";
	return NULL;
}

/* Why the header cannot be used; NULL if it can. */
static const char *__init llfree_check(const struct llfree_header *header)
{
	unsigned long end = max_pfn >> LLFREE_ORDER;
	const char *why;

	if (header->magic != LLFREE_MAGIC)
		return "there is none";
	if (header->abi_version != LLFREE_ABI_VERSION)
		return "it is of another version";
	if (header->header_bytes < LLFREE_WORDS_END)
		return "it is too small";
	if (!(header->features & LLFREE_FEATURE_OWN))
		return "the host does not offer it to kernels";
	why = llfree_check_parts(header);
	if (why)
		return why;
	if (header->low_huge_frames && max_pfn > (4UL << 30) >> PAGE_SHIFT)
		end -= ((4UL << 30) >> (PAGE_SHIFT + LLFREE_ORDER)) -
		       header->low_huge_frames;
	if (end > header->huge_frames)
		return "it describes less memory than there is";
	if (page_poisoning_enabled_static())
		return "page poisoning expects memory to keep its contents";
	return llfree_reach_check(header);
}

static int __init llfree_read(u64 at, struct llfree_header *header)
{
	struct llfree_header *found;

	found = llfree_reach_map(at, PAGE_SIZE);
	if (!found)
		return -ENOMEM;
	/* Once: the host may change it at any time, and must not fool us. */
	memcpy(header, found, sizeof(*header));
	llfree_reach_unmap(found);
	return 0;
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
void llfree_complete(void)
{
	static unsigned long pause, skipped;

	if (!llfree_host.by_touch || skipped++ < pause)
		return;
	skipped = 0;
	if (!llfree_install_used() || !llfree_hello(false)) {
		pause = min(2 * pause + 1, 63UL);
		return;
	}
	WRITE_ONCE(llfree_host.by_touch, false);
	pr_info("used memory no longer comes by touch\n");
}

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

static int __init llfree_init(void)
{
	struct llfree_header header;
	struct llfree_zone *zones;
	unsigned long given = 0;
	struct zone *zone;
	const char *why;
	void *base;
	int i;

	/* A merged block must not leave by compaction_capture(). */
	BUILD_BUG_ON(LLFREE_ORDER + 2 < NR_PAGE_ORDERS);
	BUILD_BUG_ON(sizeof(struct llfree_header) != 136);

	if (!llfree_header_at || llfree_off)
		return 0;
	if (llfree_read(llfree_header_at, &header)) {
		pr_warn("no header at %#llx\n", llfree_header_at);
		return 0;
	}
	why = llfree_check(&header);
	if (why) {
		pr_warn("not used, header at %#llx: %s\n", llfree_header_at,
			why);
		return 0;
	}
	zones = kcalloc(nr_node_ids * MAX_NR_ZONES, sizeof(*zones), GFP_KERNEL);
	base = llfree_reach_map(llfree_header_at, header.total_bytes);
	if (!base || !zones) {
		pr_warn("not used: no room\n");
		llfree_reach_unmap(base);
		kfree(zones);
		return 0;
	}
	for (i = 0; i < nr_node_ids * MAX_NR_ZONES; i++) {
		INIT_LIST_HEAD(&zones[i].aside);
		zones[i].ahead = 1;
		zones[i].last_install = jiffies - HZ;
	}
	llfree_host.base = base;
	llfree_table.entries = base + header.entries_offset;
	llfree_table.huge_frames = header.huge_frames;
	llfree_table.low_frames = header.low_huge_frames ?:
				  header.huge_frames;
	llfree_table.zones = zones;
	llfree_connect(&header);

	/* What is freed from here on is given, in zones that were walked. */
	static_branch_enable(&llfree_key);
	for_each_populated_zone(zone)
		given += llfree_give_zone(zone);
	/* A host that knows no such hand-over discards what it cannot install. */
	llfree_host.by_touch = !llfree_install_used() &&
			       header.features & LLFREE_FEATURE_BY_TOUCH;
	llfree_hello(llfree_host.by_touch);
	if (llfree_host.by_touch)
		pr_warn("the host has no memory for all that is used, which comes by touch\n");
	pr_info("%lu of %lu huge frames are free and shared with the host\n",
		given, llfree_table.huge_frames);

	llfree_watch(&header);
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
	return 0;
}
llfree_initcall(llfree_init);
