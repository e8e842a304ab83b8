/* SPDX-License-Identifier: GPL-2.0 WITH Linux-syscall-note */
/*
 * /dev/llfree: an open file of it is an area of the process's memory from
 * which the kernel takes free huge frames when it is short of memory. The area
 * ends with LLFREE_DETACH, or when nobody has the file open any more.
 */
#ifndef LLFREE_H
#define LLFREE_H

#include <linux/ioctl.h>
#include <linux/types.h>

/* Raised when a structure or a word of the table changes its meaning. */
#define LLFREE_VERSION		1

/*
 * The memory is a memfd whose size is sealed (F_SEAL_SHRINK, F_SEAL_GROW), open
 * for writing. Huge frame n of the table lies at byte n * 2 MiB of it.
 *
 * The table lies in the caller's own memory, anonymous or of a memfd. Its
 * pages are pinned for as long as the area lives, and count towards
 * RLIMIT_MEMLOCK.
 */
struct llfree_attach {
	__u32 version;		/* LLFREE_VERSION */
	__s32 memory;		/* descriptor of the memfd */
	__u32 huge_frames;	/* at least 1, at most 2^25 */
	__u32 flags;		/* 0 */
	__u64 entries;		/* address of __u16[huge_frames] */
	/*
	 * Address of __u8[huge_frames], or 0: whoever frees sets one, whoever
	 * reclaims clears it.
	 */
	__u64 marks;
	/*
	 * Address of a __u64, raised when frames that were held are free again.
	 */
	__u64 return_epoch;
	/*
	 * Huge frames, at most all, that stay when they are free until reclaim
	 * finds nothing else.
	 */
	__u64 headroom;
	__u64 reserved;		/* 0 */
};

struct llfree_status {
	__u64 huge_frames;
	/* Huge frames with memory that are free, as they were seen last. */
	__u64 free;
	__u64 evicted;		/* taken back since the area was attached */
	__u64 freed_pages;	/* of them, that had memory */
	/*
	 * Held, but pinned, locked or in use by the kernel, and given back as
	 * they were.
	 */
	__u64 kept;
	__u64 broken;		/* overwritten by the process while held */
	__u64 swapped;		/* free frames whose swap was let go */
	__u64 batches;
	/*
	 * In these, from the first frame held to the last one released; with
	 * timing=1.
	 */
	__u64 discard_ns;
	/* Calls of the shrinker that found the area at work. */
	__u64 busy;
	__u64 headroom;		/* as it was attached */
	__u64 yielded;		/* of those evicted, out of the headroom */
	__u64 reserved[4];
};

/*
 * Attaches; once a file, and memory once. EINVAL, EBADF, ENOMEM, EPERM, EFAULT,
 * EBUSY.
 */
#define LLFREE_ATTACH		_IOW('L', 0x80, struct llfree_attach)
#define LLFREE_STATUS		_IOR('L', 0x81, struct llfree_status)
/*
 * Has at most so many huge frames taken back now; the number becomes how many
 * were. Also in a process that is not short of memory.
 */
#define LLFREE_RECLAIM		_IOWR('L', 0x82, __u64)
/*
 * Ends the area, whoever else has the file open, as a forked child has. When it
 * returns the kernel has no frame in hand and takes none any more. It does not
 * fail, and may be called again.
 */
#define LLFREE_DETACH		_IO('L', 0x83)

#endif
