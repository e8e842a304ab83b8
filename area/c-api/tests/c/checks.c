/* What llfree_area.h says, from C. */
#include <llfree_area.h>

#include <pthread.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <unistd.h>

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

/* A file's records, at its root: the offset and size of one object each. */
struct record {
	uint64_t offset, size;
};

/* All records of a file and their own memory; counts what it is asked for. */
static int is_owned(void *context, const void *memory, uint64_t root, uint64_t offset, uint64_t bytes)
{
	const struct record *records = (const void *)((const char *)memory + (root - 1));
	uint64_t *asked = context;

	*asked += bytes;
	if (offset >= root - 1 && offset < root - 1 + 64 * 1024)
		return 1;
	for (int i = 0; i < 4; i++)
		if (offset >= records[i].offset && offset < records[i].offset + records[i].size)
			return 1;
	return 0;
}

static void in_a_file(const char *directory)
{
	llfree_objects *objects, *again;
	llfree_area_stats stats;
	struct record *records;
	unsigned char *block;
	uint64_t asked = 0;
	char path[4096], absent[4096];
	int status;
	pid_t child;

	CHECK(snprintf(path, sizeof(path), "%s/area-from-c-%d", directory, (int)getpid()) < (int)sizeof(path));
	CHECK(snprintf(absent, sizeof(absent), "%s/no-directory/area", directory) < (int)sizeof(absent));
	CHECK(llfree_objects_create_at(NULL, MIB, 0, &objects) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create_at(path, MIB, LLFREE_AREA_FILE, &objects) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create_at(path, MIB, 0, NULL) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create_at(path, 0, 0, &objects) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_create_at(absent, MIB, 0, &objects) == LLFREE_AREA_ERR_ABSENT);
	CHECK(llfree_objects_open_at(path, 0, NULL, NULL, &objects) == LLFREE_AREA_ERR_ABSENT);
	CHECK(llfree_objects_open_at(NULL, 0, NULL, NULL, &objects) == LLFREE_AREA_ERR_ARGUMENT);
	CHECK(llfree_objects_open_at(directory, 0, NULL, NULL, &objects) == LLFREE_AREA_ERR_FILE);
	CHECK(llfree_objects_close(NULL) == LLFREE_AREA_OK);
	CHECK(llfree_objects_root(NULL) == 0 && llfree_objects_at(NULL, 0) == NULL);
	CHECK(llfree_objects_offset(NULL, path) == UINT64_MAX);

	/* A first life, which is killed with one object that nobody has a record of. */
	fflush(NULL);
	child = fork();
	CHECK(child >= 0);
	if (child == 0) {
		CHECK(llfree_objects_create_at(path, 32 * MIB, 0, &objects) == LLFREE_AREA_OK);
		CHECK(llfree_objects_root(objects) == 0);
		records = llfree_objects_alloc_zeroed(objects, 64 * 1024, 64);
		block = llfree_objects_alloc(objects, 6 * MIB, 64);
		CHECK(records != NULL && block != NULL && llfree_objects_alloc(objects, 4 * MIB, 64) != NULL);
		memset(block, 9, 6 * MIB);
		records[0].offset = llfree_objects_offset(objects, block);
		records[0].size = 6 * MIB;
		CHECK(llfree_objects_offset(objects, path) == UINT64_MAX);
		CHECK(llfree_objects_set_root(objects, llfree_objects_offset(objects, records) + 1) == LLFREE_AREA_OK);
		CHECK(llfree_objects_create_at(path, MIB, 0, &again) == LLFREE_AREA_ERR_EXISTS);
		CHECK(llfree_objects_open_at(path, 0, NULL, NULL, &again) == LLFREE_AREA_ERR_IN_USE);
		kill(getpid(), SIGKILL);
	}
	CHECK(waitpid(child, &status, 0) == child && WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL);

	CHECK(llfree_objects_open_at(path, LLFREE_AREA_KEEP, is_owned, &asked, &objects) == LLFREE_AREA_OK);
	CHECK(asked >= 10 * MIB + 64 * 1024);
	CHECK(llfree_objects_stats(objects, &stats) == LLFREE_AREA_OK && stats.used == 6 * MIB + 64 * 1024);
	CHECK(llfree_objects_close(objects) == LLFREE_AREA_OK);

	CHECK(llfree_objects_open_at(path, 0, NULL, NULL, &objects) == LLFREE_AREA_OK);
	records = llfree_objects_at(objects, llfree_objects_root(objects) - 1);
	CHECK(records != NULL && records[0].size == 6 * MIB && llfree_objects_at(objects, 32 * MIB) == NULL);
	block = llfree_objects_at(objects, records[0].offset);
	CHECK(block != NULL && block[0] == 9 && block[6 * MIB - 1] == 9);
	CHECK(llfree_objects_free(objects, block, 6 * MIB, 64) == LLFREE_AREA_OK);
	CHECK(llfree_objects_free(objects, records, 64 * 1024, 64) == LLFREE_AREA_OK);
	llfree_objects_destroy(objects);

	/* Nothing is left of it, also of what threads kept. */
	CHECK(llfree_objects_open_at(path, 0, NULL, NULL, &objects) == LLFREE_AREA_OK);
	CHECK(llfree_objects_stats(objects, &stats) == LLFREE_AREA_OK && stats.used == 0);
	CHECK(llfree_objects_close(objects) == LLFREE_AREA_OK);
	CHECK(unlink(path) == 0);
}

int main(int argc, char **argv)
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
	CHECK(llfree_objects_set_root(shared, 1) == LLFREE_AREA_ERR_ARGUMENT && llfree_objects_root(shared) == 0);
	llfree_objects_destroy(shared);

	CHECK(argc == 2);
	in_a_file(argv[1]);
	puts("well");
	return 0;
}
