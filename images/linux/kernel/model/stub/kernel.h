/* SPDX-License-Identifier: GPL-2.0 */
/*
 * What mm/llfree.c and mm/llfree_aside.c need of the kernel, for a model with one zone and one
 * thread. Locks only check that they are held where they must be.
 */
#ifndef MODEL_KERNEL_H
#define MODEL_KERNEL_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>

typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
/* The model is never interrupted. */
typedef int (*irq_handler_t)(int irq, void *data);

#define CONFIG_LLFREE		1
#define PAGE_SHIFT		12
#define HZ			250
#define MAX_ORDER		11
#define MAX_NR_ZONES		1

enum {
	MIGRATE_UNMOVABLE,
	MIGRATE_MOVABLE,
	MIGRATE_RECLAIMABLE,
	MIGRATE_PCPTYPES,
	MIGRATE_CMA = MIGRATE_PCPTYPES,
	MIGRATE_ISOLATE,
	MIGRATE_TYPES
};

#define READ_ONCE(x)		(*(volatile __typeof__(x) *)&(x))
#define WRITE_ONCE(x, v)	(*(volatile __typeof__(x) *)&(x) = (v))
#define smp_load_acquire(p)	READ_ONCE(*(p))
#define smp_store_release(p, v)	WRITE_ONCE(*(p), v)
#define try_cmpxchg(p, old, new) \
	__atomic_compare_exchange_n(p, old, new, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)
#define min(a, b)		({ __typeof__(a) _a = (a); __typeof__(b) _b = (b); _a < _b ? _a : _b; })
#define max(a, b)		({ __typeof__(a) _a = (a); __typeof__(b) _b = (b); _a > _b ? _a : _b; })
#define max_t(t, a, b)		max((t)(a), (t)(b))
#define min_t(t, a, b)		min((t)(a), (t)(b))

#define BIT_ULL(n)		(1ULL << (n))
#define likely(x)		(x)

#define cpu_relax()		abort()	/* nobody else could end such a wait */
/* Whoever may sleep, and does: others act meanwhile. In the tests. */
void model_sleeps(void);
#define cond_resched()		model_sleeps()
extern unsigned long jiffies;
#define time_before(a, b)	((long)((a) - (b)) < 0)

struct list_head {
	struct list_head *next, *prev;
};

static inline void INIT_LIST_HEAD(struct list_head *list)
{
	list->next = list->prev = list;
}

static inline void __list_add(struct list_head *new, struct list_head *prev, struct list_head *next)
{
	next->prev = prev->next = new;
	new->next = next;
	new->prev = prev;
}

static inline void list_add(struct list_head *new, struct list_head *head)
{
	__list_add(new, head, head->next);
}

static inline void list_add_tail(struct list_head *new, struct list_head *head)
{
	__list_add(new, head->prev, head);
}

static inline void list_del(struct list_head *entry)
{
	entry->next->prev = entry->prev;
	entry->prev->next = entry->next;
	entry->next = entry->prev = NULL;
}

static inline void list_move(struct list_head *entry, struct list_head *head)
{
	list_del(entry);
	list_add(entry, head);
}

static inline void list_move_tail(struct list_head *entry, struct list_head *head)
{
	list_del(entry);
	list_add_tail(entry, head);
}

static inline bool list_empty(const struct list_head *head)
{
	return head->next == head;
}

#define list_entry(p, type, member) ((type *)((char *)(p) - offsetof(type, member)))
#define list_first_entry(head, type, member) list_entry((head)->next, type, member)
#define list_last_entry(head, type, member) list_entry((head)->prev, type, member)
#define list_first_entry_or_null(head, type, member) \
	(list_empty(head) ? NULL : list_first_entry(head, type, member))
#define list_for_each_entry(pos, head, member) \
	for (pos = list_first_entry(head, __typeof__(*pos), member); &pos->member != (head); \
	     pos = list_entry(pos->member.next, __typeof__(*pos), member))
#define list_for_each_entry_safe(pos, n, head, member) \
	for (pos = list_first_entry(head, __typeof__(*pos), member), \
	     n = list_entry(pos->member.next, __typeof__(*pos), member); &pos->member != (head); \
	     pos = n, n = list_entry(n->member.next, __typeof__(*n), member))

struct page {
	union {
		struct list_head lru;
		struct list_head buddy_list;
	};
	unsigned int order;
	bool buddy, offline;
};

struct free_area {
	struct list_head free_list[MIGRATE_TYPES];
	unsigned long nr_free;
};

typedef struct {
	bool held;
} spinlock_t;

struct zone {
	struct free_area free_area[MAX_ORDER];
	spinlock_t lock;
	long free_pages;
	long managed_pages;
};

extern struct zone model_zone;
extern struct page *model_pages;
extern unsigned long model_nr_pages;

static inline void model_lock(spinlock_t *lock)
{
	if (lock->held)
		abort();
	lock->held = true;
}

static inline void model_unlock(spinlock_t *lock)
{
	if (!lock->held)
		abort();
	lock->held = false;
}

#define spin_lock(l)			model_lock(l)
#define spin_unlock(l)			model_unlock(l)
#define spin_lock_irqsave(l, f)		do { (f) = 0; model_lock(l); } while (0)
#define spin_unlock_irqrestore(l, f)	do { (void)(f); model_unlock(l); } while (0)

struct mutex {
	bool held;
};

#define DEFINE_MUTEX(name)		struct mutex name
extern bool model_mutex_is_held;

static inline void mutex_lock(struct mutex *mutex)
{
	/* Nobody else could end the wait. */
	if (mutex->held || model_zone.lock.held)
		abort();
	model_mutex_is_held = mutex->held = true;
}

static inline void mutex_unlock(struct mutex *mutex)
{
	if (!mutex->held)
		abort();
	model_mutex_is_held = mutex->held = false;
}

#define DECLARE_STATIC_KEY_FALSE(name)	extern bool name
#define DEFINE_STATIC_KEY_FALSE(name)	bool name
#define static_branch_unlikely(key)	(*(key))

#define zone_to_nid(z)		((void)(z), 0)
#define zone_idx(z)		((void)(z), 0)
#define page_zone(p)		(&model_zone)
#define for_each_populated_zone(z) for (z = &model_zone; z; z = NULL)

static inline unsigned long page_to_pfn(const struct page *page)
{
	return page - model_pages;
}

static inline struct page *pfn_to_page(unsigned long pfn)
{
	return model_pages + pfn;
}

static inline struct page *pfn_to_online_page(unsigned long pfn)
{
	return pfn < model_nr_pages ? pfn_to_page(pfn) : NULL;
}

static inline bool PageBuddy(const struct page *page)
{
	return page->buddy;
}

static inline unsigned int buddy_order(const struct page *page)
{
	return page->order;
}

static inline void __SetPageOffline(struct page *page)
{
	if (page->offline || page->buddy)
		abort();
	page->offline = true;
}

static inline void __ClearPageOffline(struct page *page)
{
	if (!page->offline)
		abort();
	page->offline = false;
}

static inline void adjust_managed_page_count(struct page *page, long count)
{
	(void)page;
	model_zone.managed_pages += count;
}

#endif
