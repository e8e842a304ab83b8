//! A panic ends the process, whichever thread it happens in: a program whose invariants broke must stop, not limp on
//! with a thread less.
//!
//! Release builds have `panic = "abort"` besides. The profile of tests does not, because test harnesses unwind and all
//! crates would be compiled twice; so each binary says it once, first thing.

use std::panic::{self, PanicHookInfo};

/// From now on a panic is told by `tell`, then ends the process with SIGABRT.
pub fn end_the_process_after(tell: impl Fn(&PanicHookInfo<'_>) + Send + Sync + 'static) {
    panic::set_hook(Box::new(move |panic| {
        tell(panic);
        std::process::abort();
    }));
}

/// The same, told as std tells it.
pub fn end_the_process() {
    end_the_process_after(panic::take_hook());
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt;
    use std::process::Command;

    /// Set in the process that is to end.
    const PANIC: &str = "LLFREE_TEST_PANIC";

    #[test]
    fn a_panic_of_any_thread_ends_the_process_and_is_told() {
        if std::env::var_os(PANIC).is_some() {
            super::end_the_process();
            let _ = std::thread::spawn(|| panic!("out of cheese")).join();
            return;
        }
        let this = std::thread::current().name().map(str::to_owned);
        let Some(test) = this.filter(|name| name != "main") else {
            return println!("SKIPPED: one thread for all tests, so this one does not know its name");
        };
        let mut command = Command::new(std::env::current_exe().expect("this test"));
        let output = command.args(["--exact", &test, "--nocapture"]).env(PANIC, "1").output().expect("it starts");
        assert_eq!(output.status.signal(), Some(libc::SIGABRT), "{output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("out of cheese"), "{output:?}");
    }
}
