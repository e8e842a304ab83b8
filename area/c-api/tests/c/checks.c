/* What llfree_area.h says, from C. */
#include <llfree_area.h>

#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define MIB (1ul << 20)
#define CHECK(what)                                                          \
	do {                                                                 \
		if (!(what)) {                                               \
			fprintf(stderr, "%s:%d: %s\n", __FILE__, __LINE__, #what); \
			exit(1);                                             \
		}                                                            \
	} while (0)

static void *free_it(void *arguments)
{
	void **both = arguments;
	CHECK(llfree_objects_free(both[0], both[1], 3 * MIB, 64) == LLFREE_AREA_OK);
	return NULL;
}

static void wrong_arguments(llfree_objects *objects)
{
	llfree_objects *none = NULL;
	llfree_registration *registration = NULL;
	int elsewhere = 0;

	CHECK(llfree_objects_create(0, 0, &none) == LLFREE_AREA_ERR_ARGUMENT && none == NULL);
	CHECK(llfree_objects_create(UINT64_MAX, 0, &none) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create(MIB, 7, &none) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create(MIB, 0, NULL) == LLFREE_AREA_ERR_ARGUMENT);
	llfree_objects_destroy(NULL);
	llfree_registration_end(NULL);
	CHECK(llfree_objects_alloc(NULL, MIB, 16) == NULL);
	CHECK(llfree_objects_alloc(objects, 0, 16) == NULL);
	CHECK(llfree_objects_alloc(objects, MIB, 3) == NULL);
	CHECK(llfree_objects_alloc(objects, MIB, 4 * MIB) == NULL);
	CHECK(llfree_objects_alloc(objects, SIZE_MAX, 1) == NULL);
	CHECK(llfree_objects_alloc(objects, SIZE_MAX / 4, 1) == NULL);
	CHECK(llfree_objects_free(objects, NULL, 1, 1) == LLFREE_AREA_OK);
	CHECK(llfree_objects_free(objects, &elsewhere, MIB, 16) == LLFREE_AREA_ERR_FOREIGN);
	CHECK(llfree_objects_free(NULL, &elsewhere, MIB, 16) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_stats(objects, NULL) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_reclaim(NULL, 1, NULL) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_register(objects, NULL, "a", &registration) == LLFREE_AREA_ERR_ARGUMENT);
	/* Private memory, which nobody else can take. */
	CHECK(llfree_objects_register(objects, "/nowhere", "a", &registration) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(registration == NULL);
	CHECK(strlen(llfree_area_strerror(LLFREE_AREA_ERR_FORKED)) > 0 && strlen(llfree_area_strerror(99)) > 0);
}

int main(void)
{
	llfree_objects *objects, *shared;
	llfree_registration *registration;
	llfree_area_stats stats;
	uint64_t number;
	unsigned char *block;
	void *both[2];
	pthread_t thread;

	CHECK(llfree_objects_create(64 * MIB - 5, LLFREE_AREA_PRIVATE | LLFREE_AREA_KEEP, &objects) == LLFREE_AREA_OK);
	wrong_arguments(objects);

	block = llfree_objects_alloc_zeroed(objects, 5 * MIB, 16);
	CHECK(block != NULL && block[0] == 0 && block[5 * MIB - 1] == 0);
	memset(block, 7, 5 * MIB);
	/* Where it is: nothing lies behind it. */
	CHECK(llfree_objects_realloc(objects, block, 5 * MIB, 16, 20 * MIB) == block);
	memset(block + 5 * MIB, 7, 15 * MIB);
	block = llfree_objects_realloc(objects, block, 20 * MIB, 16, 100000);
	CHECK(block != NULL && block[99999] == 7);
	CHECK(llfree_objects_free(objects, block, 100000, 16) == LLFREE_AREA_OK);
	CHECK(llfree_objects_stats(objects, &stats) == LLFREE_AREA_OK);
	CHECK(stats.size == 64 * MIB && stats.limit == 64 * MIB && stats.resident >= 20 * MIB);
	CHECK(llfree_objects_reclaim(objects, UINT64_MAX, &number) == LLFREE_AREA_OK && number >= 20 * MIB);
	CHECK(llfree_objects_stats(objects, &stats) == LLFREE_AREA_OK);
	CHECK(stats.used == 0 && stats.resident == 0 && stats.reclaimable == 0);

	CHECK(llfree_objects_limit(objects, 16 * MIB, &number) == LLFREE_AREA_OK && number == 16 * MIB);
	CHECK(llfree_objects_alloc(objects, 20 * MIB, 16) == NULL);
	CHECK(llfree_objects_limit(objects, UINT64_MAX, NULL) == LLFREE_AREA_OK);

	/* Freed by another thread. */
	both[0] = objects;
	both[1] = llfree_objects_alloc(objects, 3 * MIB, 64);
	CHECK(both[1] != NULL);
	CHECK(pthread_create(&thread, NULL, free_it, both) == 0 && pthread_join(thread, NULL) == 0);
	llfree_objects_destroy(objects);

	CHECK(llfree_objects_create(8 * MIB, LLFREE_AREA_FILE, &shared) == LLFREE_AREA_OK);
	CHECK(llfree_objects_register(shared, "/nowhere", "a", &registration) == LLFREE_AREA_ERR_KEEPER);
	CHECK(llfree_objects_register(shared, "/nowhere", "../a", &registration) == LLFREE_AREA_ERR_ARGUMENT);
	llfree_objects_destroy(shared);
	puts("well");
	return 0;
}
