// SPDX-License-Identifier: GPL-2.0
/*
 * The lists of areas that reclaim walks, by cgroup and node, and the two
 * shrinkers that these belong to: for what is spare, and for headroom.
 */
#include <linux/memcontrol.h>
#include <linux/nodemask.h>
#include <linux/sched/mm.h>
#include <linux/slab.h>
#include <linux/version.h>

#include "vllfree.h"

struct list_lru spare_places, headroom_places;
atomic_t areas_with_headroom;
static struct kmem_cache *place_cache;
/* The lists are there: stored with release, loaded with acquire. */
static bool ready;

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 8, 0)
#define lru_add(list, item)	list_lru_add(list, item)
#define lru_del(list, item)	list_lru_del(list, item)
#else
#define lru_add(list, item)	list_lru_add_obj(list, item)
#define lru_del(list, item)	list_lru_del_obj(list, item)
#endif

bool places_are_ready(void)
{
	/* Pairs with the release in places_init(). */
	return smp_load_acquire(&ready);
}

void area_delist(struct area *area)
{
	int i;

	for (i = 0; i < area->nr_places; i++) {
		lru_del(&spare_places, &area->places[i]->spare);
		if (area->headroom)
			lru_del(&headroom_places, &area->places[i]->headroom);
	}
	if (area->headroom)
		atomic_dec(&areas_with_headroom);
}

/* With the last reference: reclaim may have had one. */
void area_release(struct kref *ref)
{
	struct area *area = container_of(ref, struct area, ref);
	int i;

	for (i = 0; i < area->nr_places; i++)
		kmem_cache_free(place_cache, area->places[i]);
	kfree(area);
}

/* So that the cgroup has a list in it, and those above: with an allocation. */
static bool have_list(struct list_lru *list)
{
	struct place *place = kmem_cache_alloc_lru(place_cache, list,
						   GFP_KERNEL);

	if (!place)
		return false;
	kmem_cache_free(place_cache, place);
	return true;
}

static int new_places(struct area *area)
{
	int nid;

	if (!have_list(&spare_places) ||
	    (area->headroom && !have_list(&headroom_places)))
		return -ENOMEM;
	for_each_node_state(nid, N_MEMORY) {
		struct place *place;

		/* A node that has come since has none. */
		if (area->nr_places == area->max_places)
			break;
		place = kmem_cache_alloc_node(place_cache, GFP_KERNEL |
					      __GFP_THISNODE | __GFP_ZERO, nid);
		if (!place)
			return -ENOMEM;
		INIT_LIST_HEAD(&place->spare);
		INIT_LIST_HEAD(&place->headroom);
		place->area = area;
		place->nid = page_to_nid(virt_to_page(place));
		area->places[area->nr_places++] = place;
	}
	return 0;
}

/*
 * A place is listed under the cgroup and the node that its own memory is of:
 * all under one cgroup, wherever the process is moved meanwhile, for that one
 * has lists.
 */
int area_enlist(struct area *area)
{
	struct mem_cgroup *memcg = get_mem_cgroup_from_mm(current->mm);
	struct mem_cgroup *before = set_active_memcg(memcg);
	int i, ret;

	ret = new_places(area);
	set_active_memcg(before);
	mem_cgroup_put(memcg);
	for (i = 0; !ret && i < area->nr_places; i++) {
		lru_add(&spare_places, &area->places[i]->spare);
		if (area->headroom)
			lru_add(&headroom_places, &area->places[i]->headroom);
	}
	if (!ret && area->headroom)
		atomic_inc(&areas_with_headroom);
	return ret;
}

/* --- Start and end --- */

struct kind {
	const char *name;
	struct list_lru *list;
	unsigned long (*count)(struct shrinker *s, struct shrink_control *sc);
	unsigned long (*scan)(struct shrinker *s, struct shrink_control *sc);
	int seeks;
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	struct shrinker shrinker;
#else
	struct shrinker *shrinker;
#endif
};

/* In the order in which reclaim asks them. */
static struct kind kinds[] = {
	{
		.name = "llfree",
		.list = &spare_places,
		.count = spare_count,
		.scan = spare_scan,
		/*
		 * Nothing is lost with it and nothing has to be read again:
		 * before anything goes to swap, half of what is free is asked
		 * for, whatever the priority.
		 */
		.seeks = 0,
	}, {
		.name = "llfree-headroom",
		.list = &headroom_places,
		.count = headroom_count,
		.scan = headroom_scan,
		/*
		 * With priority n, a part of 2^-n: all of it as the last thing
		 * before somebody is killed, and next to nothing as long as
		 * reclaim finds something else.
		 */
		.seeks = 4,
	},
};

static void set_up(struct shrinker *s, const struct kind *kind)
{
	s->count_objects = kind->count;
	s->scan_objects = kind->scan;
	s->seeks = kind->seeks;
	/* In pages, as the count. */
	s->batch = BATCH * LLFREE_PAGES;
}

static int kind_begin(struct kind *kind)
{
	unsigned int flags = SHRINKER_NUMA_AWARE | SHRINKER_MEMCG_AWARE;
	int ret;

#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	/* The lists need the number that the shrinker gets here: `ready`. */
	set_up(&kind->shrinker, kind);
	kind->shrinker.flags = flags;
	ret = register_shrinker(&kind->shrinker, "%s", kind->name);
	if (ret)
		return ret;
	ret = list_lru_init_memcg(kind->list, &kind->shrinker);
	if (ret)
		unregister_shrinker(&kind->shrinker);
#else
	kind->shrinker = shrinker_alloc(flags, "%s", kind->name);
	if (!kind->shrinker)
		return -ENOMEM;
	ret = list_lru_init_memcg(kind->list, kind->shrinker);
	if (ret) {
		shrinker_free(kind->shrinker);
		return ret;
	}
	set_up(kind->shrinker, kind);
	shrinker_register(kind->shrinker);
#endif
	return ret;
}

static void kind_end(struct kind *kind)
{
#if LINUX_VERSION_CODE < KERNEL_VERSION(6, 7, 0)
	unregister_shrinker(&kind->shrinker);
#else
	shrinker_free(kind->shrinker);
#endif
	list_lru_destroy(kind->list);
}

int places_init(void)
{
	unsigned int i;
	int ret = -ENOMEM;

	place_cache = KMEM_CACHE(place, SLAB_ACCOUNT);
	if (!place_cache)
		return ret;
	for (i = 0; i < ARRAY_SIZE(kinds); i++) {
		ret = kind_begin(&kinds[i]);
		if (ret)
			goto undo;
	}
	/* The lists, before anybody walks them: places_are_ready(). */
	smp_store_release(&ready, true);
	return 0;

undo:
	while (i--)
		kind_end(&kinds[i]);
	kmem_cache_destroy(place_cache);
	return ret;
}

void places_exit(void)
{
	unsigned int i;

	for (i = 0; i < ARRAY_SIZE(kinds); i++)
		kind_end(&kinds[i]);
	kmem_cache_destroy(place_cache);
}
