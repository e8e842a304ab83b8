/* SPDX-License-Identifier: GPL-2.0 */
/*
 * The host of mm/llfree.c: the header of its table, the words in it, and its
 * calls. See llfree-vmm's docs/protocol.md.
 */
#ifndef _MM_LLFREE_HOST_H
#define _MM_LLFREE_HOST_H

#include <linux/bits.h>
#include <linux/init.h>
#include <linux/interrupt.h>
#include <linux/types.h>

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

struct llfree_host {
	void *base;			/* of the header, as it is mapped */
	void *mailboxes;
	u16 port;
	bool by_touch;			/* see llfree_complete() */
};

extern struct llfree_host llfree_host;

/* In mm/llfree_guest.c. */
u64 llfree_word(unsigned int offset);
u64 llfree_call(unsigned int call, u64 first, u64 second, u64 *reply);
void llfree_connect(const struct llfree_header *header);
void llfree_watch(const struct llfree_header *header);

/* In mm/llfree_boot.c. */
void llfree_complete(void);

/*
 * How the host is reached, which a machine and User Mode Linux do in different
 * ways: mm/llfree_x86.c and mm/llfree_um.c. @at is what llfree.header= said.
 */
void *llfree_reach_map(u64 at, size_t bytes);
void llfree_reach_unmap(void *mapped);
const char *llfree_reach_check(const struct llfree_header *header);
unsigned int llfree_reach_mailbox(void);
void llfree_reach_ring(const struct llfree_host *host, unsigned int call);
int llfree_reach_notices(const struct llfree_header *header,
			 irq_handler_t handler, void *data);

#ifdef CONFIG_UML
/* The table is mapped at device_initcall. */
#define llfree_initcall(fn)	late_initcall(fn)
#else
#define llfree_initcall(fn)	subsys_initcall_sync(fn)
#endif

#endif
