//! How many descriptors this process may have open, and how many it has.

use std::io;

/// The most that it may have open; `None` without a limit.
///
/// # Errors
/// The kernel does not say.
pub fn limit() -> io::Result<Option<u64>> {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // Not by rustix, which takes it for a call that cannot fail: a filter of system calls can make it fail.
    // SAFETY: the kernel writes one structure of this type, which outlives the call.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => Ok((limit.rlim_cur != libc::RLIM_INFINITY).then_some(limit.rlim_cur)),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Those that are open, and the one that it takes to count them.
///
/// # Errors
/// `EMFILE` if there is none left to count them with; `/proc` is not mounted.
pub fn open() -> io::Result<u64> {
    Ok(std::fs::read_dir("/proc/self/fd")?.count() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_more_is_one_more() {
        let before = open().expect("/proc is mounted");
        let more: Vec<_> = (0..100).map(|_| std::fs::File::open("/dev/null").expect("it is there")).collect();
        // Other tests open some, too.
        assert!(open().expect("/proc is mounted") > before + 50);
        assert!(limit().expect("nobody refuses it").is_none_or(|limit| limit > before + 50));
        drop(more);
    }
}
