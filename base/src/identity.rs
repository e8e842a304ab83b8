//! Who this process and its threads are: numbers that the kernel always has.
//!
//! Not by rustix, which takes a refusal of these calls for impossible and panics in debug builds. A filter of system
//! calls can refuse them all the same: then the number is nobody's, and whatever goes by it finds no match.

/// The effective user.
#[must_use]
pub fn effective_user() -> u32 {
    // SAFETY: it takes nothing and touches no memory of ours.
    unsafe { libc::geteuid() }
}

/// The calling thread, as the kernel numbers it.
#[must_use]
pub fn this_thread() -> i32 {
    // SAFETY: as above.
    unsafe { libc::gettid() }
}

/// This process; 0, which is none, for what is no number of one.
#[must_use]
pub fn this_process() -> i32 {
    i32::try_from(std::process::id()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_is_not_its_process() {
        assert!(this_process() > 0 && effective_user() < u32::MAX / 2);
        let other = std::thread::spawn(this_thread).join().expect("no panic");
        assert!(other > 0 && other != this_thread() && other != this_process());
    }
}
