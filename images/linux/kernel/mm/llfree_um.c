// SPDX-License-Identifier: GPL-2.0
/*
 * The host of mm/llfree.c in User Mode Linux: a process that started this one.
 * "iomem=llfree,FILE" maps its table. "llfree.header=" names the first of two
 * descriptors that it left open here: a socket for calls, a byte there and a
 * byte back, and one with a byte to read for each notice.
 */

#include <linux/interrupt.h>
#include <linux/mm.h>

#include <irq_kern.h>
#include <irq_user.h>
#include <mem_user.h>
#include <os.h>

#include "llfree.h"
#include "llfree_host.h"

extern unsigned long long physmem_size;

static int llfree_calls, llfree_notices;
static irq_handler_t llfree_handler;

void *__init llfree_reach_map(u64 at, size_t bytes)
{
	unsigned long mapped, len;

	mapped = find_iomem("llfree", &len);
	if (!mapped || bytes > len || at >= INT_MAX)
		return NULL;
	llfree_calls = at;
	llfree_notices = at + 1;
	return (void *)mapped;
}

/* It stays where it is. */
void __init llfree_reach_unmap(void *mapped)
{
}

const char *__init llfree_reach_check(const struct llfree_header *header)
{
	/* What max_pfn says here is how much there is, not where it ends. */
	if (physmem_size >> (PAGE_SHIFT + LLFREE_ORDER) > header->huge_frames)
		return "it describes less memory than there is";
	if (!header->vcpus)
		return "it has no mailbox for some CPU";
	return NULL;
}

unsigned int llfree_reach_mailbox(void)
{
	return 0;
}

void llfree_reach_ring(const struct llfree_host *host, unsigned int call)
{
	u8 byte = call / 8;
	int done;

	do
		done = os_write_file(llfree_calls, &byte, 1);
	while (done == -EINTR);
	if (done == 1)
		do
			done = os_read_file(llfree_calls, &byte, 1);
		while (done == -EINTR);
	if (done != 1)
		panic("llfree: the host is gone");
}

static irqreturn_t llfree_um_notice(int irq, void *data)
{
	u8 bytes[32];

	while (os_read_file(llfree_notices, bytes, sizeof(bytes)) > 0)
		;
	return llfree_handler(irq, data);
}

int __init llfree_reach_notices(const struct llfree_header *header,
				irq_handler_t handler, void *data)
{
	int err = os_set_fd_block(llfree_notices, 0);

	if (err)
		return err;
	llfree_handler = handler;
	err = um_request_irq(UM_IRQ_ALLOC, llfree_notices, IRQ_READ,
			     llfree_um_notice, 0, "llfree", data);
	return min(err, 0);
}
