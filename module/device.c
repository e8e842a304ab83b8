// SPDX-License-Identifier: GPL-2.0
/*
 * /dev/llfree: what a process hands over and gets back; the start and the end
 * of an area, and of the module. See llfree.h for the ABI.
 *
 * An area lives until it is detached, or as long as the open file. The module
 * cannot go before, since the file counts as its user.
 */
#include <linux/debugfs.h>
#include <linux/file.h>
#include <linux/fs.h>
#include <linux/miscdevice.h>
#include <linux/module.h>
#include <linux/oom.h>
#include <linux/pagemap.h>
#include <linux/sched/mm.h>
#include <linux/sched/signal.h>
#include <linux/seq_file.h>
#include <linux/shmem_fs.h>
#include <linux/slab.h>
#include <linux/timekeeping.h>
#include <linux/uaccess.h>
#include <linux/vmalloc.h>
#include <uapi/linux/fcntl.h>

#include "vllfree.h"

/* Frames that one call of the lock takes, when a process asks for it. */
#define FRAMES_A_TURN		64
#define LOOK_INTERVAL		HZ
/* How long a look that found the area busy before tries, a tick at a time. */
#define LOOK_PATIENCE		(HZ / 10)

/* An open file. */
struct session {
	/* For reading: whoever uses the area, which does not end meanwhile. */
	struct rw_semaphore lock;
	struct area *area;
	bool gone;		/* it has had one */
};

static LIST_HEAD(areas);
static DEFINE_MUTEX(areas_lock);
static struct dentry *debugfs;

/* --- The process's table --- */

static void unpin(struct pinned *pinned, struct mm_struct *mm)
{
	if (!pinned->pages)
		return;
	if (pinned->mapping)
		vunmap(pinned->mapping);
	unpin_user_pages_dirty_lock(pinned->pages, pinned->nr, true);
	account_locked_vm(mm, pinned->nr, false);
	kvfree(pinned->pages);
	pinned->pages = NULL;
}

/* Anonymous memory or shared memory: nothing that a file system writes back. */
static bool may_pin(struct page *page)
{
	return folio_test_swapbacked(page_folio(page));
}

/*
 * Pins so many bytes of the caller's memory and maps them. Returns their
 * address here.
 */
static void *pin(struct pinned *pinned, u64 address, u64 bytes, u64 align,
		 struct mm_struct *mm)
{
	unsigned long start = address & PAGE_MASK, nr, done = 0, i;
	struct page **pages;
	int ret;

	if (!IS_ALIGNED(address, align) || address + bytes < address ||
	    address + bytes > TASK_SIZE_MAX)
		return ERR_PTR(-EINVAL);
	nr = (PAGE_ALIGN(address + bytes) - start) >> PAGE_SHIFT;
	pages = kvmalloc_array(nr, sizeof(*pages), GFP_KERNEL_ACCOUNT);
	if (!pages)
		return ERR_PTR(-ENOMEM);
	ret = account_locked_vm(mm, nr, true);
	if (ret)
		goto free;
	while (done < nr) {
		ret = pin_user_pages_fast(start + done * PAGE_SIZE,
					  min(nr - done, 512UL),
					  FOLL_WRITE | FOLL_LONGTERM,
					  pages + done);
		if (ret <= 0) {
			ret = ret ?: -EFAULT;
			goto unpin;
		}
		for (i = done; i < done + ret; i++) {
			if (!may_pin(pages[i])) {
				done += ret;
				ret = -EINVAL;
				goto unpin;
			}
		}
		done += ret;
	}
	pinned->mapping = vmap(pages, nr, VM_MAP, PAGE_KERNEL);
	if (!pinned->mapping) {
		ret = -ENOMEM;
		goto unpin;
	}
	pinned->pages = pages;
	pinned->nr = nr;
	return pinned->mapping + offset_in_page(address);

unpin:
	unpin_user_pages(pages, done);
	account_locked_vm(mm, nr, false);
free:
	kvfree(pages);
	return ERR_PTR(ret);
}

/* --- An area's life --- */

/* What an area has, apart from itself: reclaim may still have a reference. */
static void area_drop(struct area *area)
{
	unpin(&area->pinned_entries, area->mm);
	unpin(&area->pinned_marks, area->mm);
	unpin(&area->pinned_epoch, area->mm);
	if (area->memory) {
		mapping_unmap_writable(area->memory->f_mapping);
		fput(area->memory);
	}
	kvfree(area->notes);
	kvfree(area->chunks);
	kvfree(area->old);
	mmdrop(area->mm);
	kref_put(&area->ref, area_release);
}

/*
 * A file whose size stays, that the process may write to, and that nobody can
 * be promised to be unchanged: as with a writable mapping, F_SEAL_WRITE is
 * refused for as long as there is an area.
 */
static struct file *memory_file(int fd)
{
	const unsigned int fixed = F_SEAL_SHRINK | F_SEAL_GROW;
	const unsigned int read_only = F_SEAL_WRITE | F_SEAL_FUTURE_WRITE;
	struct file *file = fget(fd);
	unsigned int seals;
	int ret = -EINVAL;

	if (!file)
		return ERR_PTR(-EBADF);
	if (!(file->f_mode & FMODE_WRITE) || !shmem_mapping(file->f_mapping) ||
	    !S_ISREG(file_inode(file)->i_mode))
		goto put;
	ret = mapping_map_writable(file->f_mapping);
	if (ret)
		goto put;
	seals = READ_ONCE(SHMEM_I(file_inode(file))->seals);
	if ((seals & fixed) == fixed && !(seals & read_only)) {
		loff_t end = round_up(i_size_read(file_inode(file)),
				      1UL << HUGE_SHIFT);

		/*
		 * What fallocate() left behind the end before it was sealed: in
		 * reclaim nothing may be there, see settle_blocks().
		 */
		shmem_truncate_range(file_inode(file), end, -1);
		return file;
	}
	ret = -EPERM;
	mapping_unmap_writable(file->f_mapping);
put:
	fput(file);
	return ERR_PTR(ret);
}

static void area_end(struct area *area)
{
	area_delist(area);
	/* Reclaim that has it finishes its batch, and comes back no more. */
	mutex_lock(&area->lock);
	area->dead = true;
	mutex_unlock(&area->lock);
	/* Only now may another table have the memory: see claim(). */
	mutex_lock(&areas_lock);
	list_del(&area->all);
	mutex_unlock(&areas_lock);
	cancel_delayed_work_sync(&area->look);
	area_drop(area);
}

/* Two tables for the same memory would each take what the other has in use. */
static int claim(struct area *area)
{
	struct inode *inode = file_inode(area->memory);
	struct area *other;
	int ret = 0;

	mutex_lock(&areas_lock);
	list_for_each_entry(other, &areas, all)
		if (file_inode(other->memory) == inode)
			ret = -EBUSY;
	if (!ret)
		list_add_tail(&area->all, &areas);
	mutex_unlock(&areas_lock);
	return ret;
}

/*
 * A worker is never kept for longer than that, whoever has the area: others wait
 * for their looks, too. Who takes from it in a loop gives way meanwhile.
 */
static bool lock_to_look(struct area *area)
{
	unsigned int ticks = area->look_missed ? LOOK_PATIENCE : 0;
	bool locked;

	while (!(locked = mutex_trylock(&area->lock)) && ticks--)
		schedule_timeout_idle(1);
	WRITE_ONCE(area->look_missed, !locked);
	return locked;
}

static void look(struct work_struct *work)
{
	struct area *area = container_of(to_delayed_work(work), struct area,
					 look);

	unsigned long again = LOOK_INTERVAL;

	/* Busy: reclaim takes from it, and counts only what it took from. */
	if (!lock_to_look(area)) {
		again = HZ / 10;
	} else {
		bool aging = time_after_eq(jiffies,
					   area->aged_at + LOOK_INTERVAL);

		if (aging)
			area->aged_at = jiffies;
		if (!area->dead)
			area_look(area, aging);
		mutex_unlock(&area->lock);
	}
	queue_delayed_work(system_unbound_wq, &area->look, again);
}

static struct area *area_new(const struct llfree_attach *words)
{
	int nodes = num_node_state(N_MEMORY);
	u32 nr = words->huge_frames;
	struct file *memory;
	struct area *area;
	int ret = -ENOMEM;

	area = kzalloc(struct_size(area, places, nodes), GFP_KERNEL_ACCOUNT);
	if (!area)
		return ERR_PTR(ret);
	kref_init(&area->ref);
	area->waited.for_scan.at = jiffies - HZ;
	area->waited.for_look.at = jiffies - HZ;
	mutex_init(&area->lock);
	/* An idle machine is not woken for it. */
	INIT_DEFERRABLE_WORK(&area->look, look);
	area->max_places = nodes;
	area->huge_frames = nr;
	area->headroom = words->headroom;
	area->nr_chunks = DIV_ROUND_UP(nr, CHUNK);
	area->aged_at = jiffies;
	area->kicked_at = jiffies;
	area->pid = task_tgid_nr(current);
	area->mm = current->mm;
	mmgrab(area->mm);
	memory = memory_file(words->memory);
	if (IS_ERR(memory)) {
		ret = PTR_ERR(memory);
		goto drop;
	}
	area->memory = memory;
	if ((u64)i_size_read(file_inode(memory)) >> HUGE_SHIFT < nr) {
		ret = -EINVAL;
		goto drop;
	}
	area->notes = kvcalloc(nr, sizeof(*area->notes), GFP_KERNEL_ACCOUNT);
	area->chunks = kvcalloc(area->nr_chunks, sizeof(*area->chunks),
				GFP_KERNEL_ACCOUNT);
	area->old = kvcalloc(BITS_TO_LONGS(area->nr_chunks),
			     sizeof(*area->old), GFP_KERNEL_ACCOUNT);
	if (!area->notes || !area->chunks || !area->old)
		goto drop;
	area->entries = pin(&area->pinned_entries, words->entries,
			    nr * sizeof(u16), sizeof(u16), area->mm);
	if (IS_ERR(area->entries)) {
		ret = PTR_ERR(area->entries);
		goto drop;
	}
	if (words->marks)
		area->marks = pin(&area->pinned_marks, words->marks, nr, 1,
				  area->mm);
	if (IS_ERR(area->marks)) {
		ret = PTR_ERR(area->marks);
		goto drop;
	}
	area->return_epoch = pin(&area->pinned_epoch, words->return_epoch,
				 sizeof(u64), sizeof(u64), area->mm);
	if (IS_ERR(area->return_epoch)) {
		ret = PTR_ERR(area->return_epoch);
		goto drop;
	}
	ret = claim(area);
	if (ret)
		goto drop;
	mutex_lock(&area->lock);
	area_look(area, true);
	mutex_unlock(&area->lock);
	ret = area_enlist(area);
	if (ret)
		goto disclaim;
	return area;

disclaim:
	mutex_lock(&areas_lock);
	list_del(&area->all);
	mutex_unlock(&areas_lock);
drop:
	area_drop(area);
	return ERR_PTR(ret);
}

static long attach(struct session *session, const void __user *arg)
{
	struct llfree_attach words;
	struct area *area;

	if (copy_from_user(&words, arg, sizeof(words)))
		return -EFAULT;
	if (words.version != LLFREE_VERSION || words.flags ||
	    words.reserved || !words.huge_frames ||
	    words.huge_frames > MAX_HUGE_FRAMES ||
	    words.headroom > words.huge_frames)
		return -EINVAL;
	if (down_write_killable(&session->lock))
		return -EINTR;
	area = session->area || session->gone ? ERR_PTR(-EBUSY) :
						area_new(&words);
	if (!IS_ERR(area)) {
		session->area = area;
		queue_delayed_work(system_unbound_wq, &area->look,
				   LOOK_INTERVAL);
	}
	up_write(&session->lock);
	return PTR_ERR_OR_ZERO(area);
}

/* Not killable: whoever calls this counts on it. */
static long detach(struct session *session)
{
	down_write(&session->lock);
	if (session->area)
		area_end(session->area);
	session->area = NULL;
	session->gone = true;
	up_write(&session->lock);
	return 0;
}

static int device_open(struct inode *inode, struct file *file)
{
	struct session *session = kzalloc(sizeof(*session), GFP_KERNEL_ACCOUNT);

	if (!session)
		return -ENOMEM;
	init_rwsem(&session->lock);
	/* misc_open() left the device here. */
	file->private_data = session;
	return 0;
}

static int device_release(struct inode *inode, struct file *file)
{
	struct session *session = file->private_data;

	detach(session);
	kfree(session);
	return 0;
}

/* --- Questions --- */

static long status(struct session *session, void __user *arg)
{
	struct llfree_status status;
	struct area *area;

	if (down_read_killable(&session->lock))
		return -EINTR;
	area = session->area;
	if (area) {
		status = area->stats;
		status.huge_frames = area->huge_frames;
		status.free = atomic_long_read(&area->free);
		status.busy = atomic64_read(&area->busy);
		status.headroom = area->headroom;
	}
	up_read(&session->lock);
	if (!area)
		return -EINVAL;
	return copy_to_user(arg, &status, sizeof(status)) ? -EFAULT : 0;
}

/* A turn; whether there may be more to take. Who detaches waits for no longer. */
static long reclaim_turn(struct session *session, u64 want, u64 *done,
			 u64 *looked)
{
	struct area *area;
	u32 chunks;
	long ret;

	ret = down_read_killable(&session->lock);
	if (ret)
		return ret;
	area = session->area;
	/* It is behind a look that found the area busy. */
	if (area && READ_ONCE(area->look_missed))
		schedule_timeout_killable(1);
	ret = area ? mutex_lock_killable(&area->lock) : -EINVAL;
	if (!ret) {
		unsigned int turn = min_t(u64, want - *done, FRAMES_A_TURN);
		unsigned int got = area_reclaim(area, turn, &chunks);

		mutex_unlock(&area->lock);
		*done += got;
		*looked = got ? 0 : *looked + chunks;
		/*
		 * All was looked at; or twice, in turns. The process frees while
		 * we take: there is an end to it.
		 */
		ret = (got == turn || chunks >= CHUNKS_A_CALL) &&
		      *looked <= 2 * (u64)area->nr_chunks &&
		      *done < area->huge_frames;
	}
	up_read(&session->lock);
	return ret;
}

static long reclaim(struct session *session, u64 __user *arg)
{
	u64 want, done = 0, looked = 0;
	long ret = 0;

	if (get_user(want, arg))
		return -EFAULT;
	do {
		ret = reclaim_turn(session, want, &done, &looked);
		cond_resched();
	} while (ret > 0 && done < want && !signal_pending(current));
	return put_user(done, arg) ? -EFAULT : min(ret, 0L);
}

static long device_ioctl(struct file *file, unsigned int call, unsigned long arg)
{
	struct session *session = file->private_data;
	void __user *user = (void __user *)arg;

	switch (call) {
	case LLFREE_ATTACH:
		return attach(session, user);
	case LLFREE_STATUS:
		return status(session, user);
	case LLFREE_RECLAIM:
		return reclaim(session, user);
	case LLFREE_DETACH:
		return detach(session);
	default:
		return -ENOTTY;
	}
}

static int areas_show(struct seq_file *seq, void *unused)
{
	u64 start = ktime_get_mono_fast_ns();
	struct area *area;

	/* What is counted with timing=1 has the clock's own cost in it. */
	seq_printf(seq, "counts %lld count_ns %lld scans %lld scan_ns %lld clock_ns %llu\n",
		   atomic64_read(&count_calls), atomic64_read(&count_ns),
		   atomic64_read(&scan_calls), atomic64_read(&scan_ns),
		   ktime_get_mono_fast_ns() - start);
	mutex_lock(&areas_lock);
	list_for_each_entry(area, &areas, all)
		seq_printf(seq, "pid %d frames %u free %ld evicted %llu freed_pages %llu kept %llu broken %llu swapped %llu batches %llu discard_ns %llu busy %lld headroom %u yielded %llu\n",
			   area->pid, area->huge_frames,
			   atomic_long_read(&area->free), area->stats.evicted,
			   area->stats.freed_pages, area->stats.kept,
			   area->stats.broken, area->stats.swapped,
			   area->stats.batches, area->stats.discard_ns,
			   atomic64_read(&area->busy), area->headroom,
			   area->stats.yielded);
	mutex_unlock(&areas_lock);
	return 0;
}
DEFINE_SHOW_ATTRIBUTE(areas);

static const struct file_operations device_fops = {
	.owner = THIS_MODULE,
	.open = device_open,
	.release = device_release,
	.unlocked_ioctl = device_ioctl,
	.compat_ioctl = compat_ptr_ioctl,
	.llseek = noop_llseek,
};

static struct miscdevice device = {
	.minor = MISC_DYNAMIC_MINOR,
	.name = "llfree",
	.fops = &device_fops,
	.mode = 0600,
};

static int __init vllfree_init(void)
{
	int ret;

	BUILD_BUG_ON(HPAGE_PMD_ORDER != LLFREE_ORDER);
	ret = places_init();
	if (ret)
		return ret;
	ret = misc_register(&device);
	if (ret) {
		places_exit();
		return ret;
	}
	register_oom_notifier(&last_resort);
	debugfs = debugfs_create_dir("llfree", NULL);
	debugfs_create_file("areas", 0400, debugfs, NULL, &areas_fops);
	return 0;
}

static void __exit vllfree_exit(void)
{
	debugfs_remove(debugfs);
	misc_deregister(&device);
	unregister_oom_notifier(&last_resort);
	places_exit();
}

module_init(vllfree_init);
module_exit(vllfree_exit);
MODULE_LICENSE("GPL");
MODULE_DESCRIPTION("Reclaim of what a process's allocator has free");
