//! Machines for tests of several crates: launched on /dev/kvm through the library, asked, looked at;
//! and tiny images that do one thing.

pub mod image;
pub mod machine;

use llfree_base::error_line;
use llfree_base::thread::Spawner;
use llfree_monitor::memory::{Backing, GuestRam, PoolConfig, Supply, UseUserfaultfd};
use std::sync::OnceLock;
use std::time::{Duration, Instant};
pub use test_support::skipped;

/// Longer than any step takes on any machine that is alive.
pub const DEADLINE: Duration = Duration::from_secs(60);
/// Bytes of a MiB.
pub const MIB: u64 = 1 << 20;

/// Returns from a test that needs KVM where there is none, and says so.
#[macro_export]
macro_rules! need_kvm {
    () => {
        if let Some(reason) = $crate::no_kvm() {
            $crate::skipped(reason);
            return;
        }
    };
}

/// Why no VM can run here.
pub fn no_kvm() -> Option<String> {
    vmm::boot::open_kvm().err().map(|error| error_line(&error))
}

/// Why guest memory cannot be under a userfaultfd.
pub fn no_userfaultfd() -> Option<String> {
    static WHY: OnceLock<Option<String>> = OnceLock::new();
    let try_it = || {
        let ram = GuestRam::new(2 * MIB, Backing::Anon).expect("never touched").into();
        Supply::new(ram, PoolConfig::default(), UseUserfaultfd::On, &Spawner::default())
            .err()
            .map(|error| error_line(&error))
    };
    WHY.get_or_init(try_it).clone()
}

/// Polls until `probe` has an answer.
#[track_caller]
pub fn wait_for<T>(what: &str, mut probe: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = probe() {
            return answer;
        }
        assert!(start.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}
