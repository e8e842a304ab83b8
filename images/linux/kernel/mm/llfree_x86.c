// SPDX-License-Identifier: GPL-2.0
/*
 * The host of mm/llfree.c on a machine: its table lies beyond RAM, a write to
 * an I/O port calls it, and it sends an interrupt.
 */

#include <linux/acpi.h>
#include <linux/io.h>
#include <linux/mm.h>
#include <linux/smp.h>

#include "llfree_host.h"

void *__init llfree_reach_map(u64 at, size_t bytes)
{
	return memremap(at, bytes, MEMREMAP_WB);
}

void __init llfree_reach_unmap(void *mapped)
{
	memunmap(mapped);
}

const char *__init llfree_reach_check(const struct llfree_header *header)
{
	int cpu;

	if (!(header->features & LLFREE_FEATURE_PORT) ||
	    header->doorbell_port > IO_SPACE_LIMIT - PAGE_SIZE / 8)
		return "it has no port to call the host";
	for_each_possible_cpu(cpu)
		if (cpu_physical_id(cpu) >= header->vcpus)
			return "it has no mailbox for some CPU";
	return NULL;
}

unsigned int llfree_reach_mailbox(void)
{
	return cpu_physical_id(smp_processor_id());
}

void llfree_reach_ring(const struct llfree_host *host, unsigned int call)
{
	outl(0, host->port + call / 8);
}

int __init llfree_reach_notices(const struct llfree_header *header,
				irq_handler_t handler, void *data)
{
	int irq = acpi_register_gsi(NULL, header->notice_gsi,
				    ACPI_EDGE_SENSITIVE, ACPI_ACTIVE_HIGH);

	if (irq < 0)
		return irq;
	return request_irq(irq, handler, 0, "llfree", data);
}
