//! Places where a test makes the host fail: a system call that is refused, a thread that dies, a
//! write that gets half of its bytes out.
//!
//! Without the Cargo feature `fault-injection` (only tests turn it on) a point is
//! nothing: it compiles to `Ok(())`. To add one: a name in the list below, `faults::point(NAME)?`
//! right before the step that may fail (its errors take the same way as the kernel's), and a
//! driver in `vmm/tests/faults.rs`, which fails while a point has none. Actions are those of the crate
//! `fail`: `1*return->off` fails the first time, `2*off->1*return->off` the third, `return(12)`
//! always and with ENOMEM, and `return(12/3)` each third time.

/// Names the points, and lists them.
macro_rules! points {
    ($($(#[$doc:meta])* $name:ident = $text:literal;)*) => {
        $($(#[$doc])* pub const $name: &str = $text;)*
        /// Every point there is.
        pub const ALL: &[&str] = &[$($name),*];
    };
}

points! {
    /// The kernel does not take guest memory back.
    DISCARD = "discard";
    /// The kernel does not back guest RAM with memory.
    POPULATE = "populate";
    /// The same, but some came before it gave up.
    POPULATE_LATE = "populate-late";
    /// A page of the pool is not moved into guest RAM.
    MOVE = "move";
    /// The userfaultfd cannot be read.
    USERFAULT_READ = "userfault-read";
    /// The kernel does not say what is resident.
    RESIDENCY = "residency";
    /// The kernel says what is resident, and then that it could not.
    RESIDENCY_LATE = "residency-late";
    /// No thread can be started.
    THREAD_START = "thread-start";
    /// A thread that carries requests out ends in the middle of one.
    THREAD_DEATH = "thread-death";
    /// `KVM_RUN` fails.
    VCPU_RUN = "vcpu-run";
    /// The event loop cannot watch a descriptor.
    EPOLL_ADD = "epoll-add";
    /// An eventfd takes no more events.
    EVENTFD = "eventfd";
    /// A client's socket cannot be read.
    SOCKET_READ = "socket-read";
    /// A client's socket cannot be written.
    SOCKET_WRITE = "socket-write";
    /// A client's socket takes one byte a write.
    SOCKET_SHORT_WRITE = "socket-short-write";
    /// A cgroup's file cannot be written.
    CGROUP_WRITE = "cgroup-write";
}

/// Fails if a test wants this point to: with the error number that it gave, or EIO.
///
/// # Errors
/// The fault that the test asked for; never without the feature.
#[cfg(not(feature = "fault-injection"))]
#[inline(always)]
pub const fn point(_: &'static str) -> std::io::Result<()> {
    Ok(())
}

#[cfg(feature = "fault-injection")]
pub use injection::{Held, Scenario, hits, point};

#[cfg(feature = "fault-injection")]
mod injection {
    use std::collections::BTreeMap;
    use std::io;
    use std::sync::{Arc, Condvar, Mutex, PoisonError};
    use std::time::Duration;

    static HITS: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());
    /// The times that points were passed which fail only now and then.
    static PASSES: Mutex<BTreeMap<&'static str, u64>> = Mutex::new(BTreeMap::new());

    /// The error number that an action's argument gives, if it is to fail this time.
    fn number(name: &'static str, argument: Option<&str>) -> Option<i32> {
        let Some((number, one_in)) = argument.and_then(|argument| argument.split_once('/')) else {
            return Some(argument.and_then(|number| number.parse().ok()).unwrap_or(libc::EIO));
        };
        let mut passes = PASSES.lock().unwrap_or_else(PoisonError::into_inner);
        let passes = passes.entry(name).or_default();
        *passes += 1;
        passes.is_multiple_of(one_in.parse().unwrap_or(1)).then(|| number.parse().unwrap_or(libc::EIO))
    }

    /// Fails if a test wants this point to: with the error number that it gave, or EIO.
    ///
    /// # Errors
    /// The fault that the test asked for.
    pub fn point(name: &'static str) -> io::Result<()> {
        match fail::eval(name, |argument| number(name, argument.as_deref())).flatten() {
            None => Ok(()),
            Some(number) => {
                *HITS.lock().unwrap_or_else(PoisonError::into_inner).entry(name).or_default() += 1;
                Err(io::Error::from_raw_os_error(number))
            }
        }
    }

    /// The number of times that a point failed on purpose since the process started.
    #[must_use]
    pub fn hits(name: &str) -> u64 {
        HITS.lock().unwrap_or_else(PoisonError::into_inner).get(name).copied().unwrap_or(0)
    }

    /// The right to make points fail; there is one at a time in a process, and when it goes all
    /// points work again.
    pub struct Scenario(#[allow(dead_code, reason = "its drop clears the points")] fail::FailScenario<'static>);

    impl Scenario {
        /// Waits for the last one to end. Points named in the variable `FAILPOINTS` are set.
        #[must_use]
        pub fn start() -> Self {
            Self(fail::FailScenario::setup())
        }

        /// Gives a point its actions; `off` makes it work again.
        ///
        /// # Errors
        /// If they make no sense.
        pub fn set(&self, name: &str, actions: &str) -> Result<(), String> {
            fail::cfg(name, actions)
        }

        /// Keeps the first thread that comes to one of these points there: a host that does not answer.
        ///
        /// # Errors
        /// If a point cannot be set.
        pub fn hold(&self, points: &[&'static str]) -> Result<Held<'_>, String> {
            let gate = Arc::<Gate>::default();
            for point in points {
                let gate = gate.clone();
                fail::cfg_callback(*point, move || gate.enter())?;
            }
            Ok(Held { gate, points: points.to_vec(), scenario: self })
        }
    }

    #[derive(Default)]
    struct Gate {
        step: Mutex<Step>,
        changed: Condvar,
    }

    #[derive(Clone, Copy, Default, PartialEq, Eq, PartialOrd)]
    enum Step {
        #[default]
        Waiting,
        Holding,
        Open,
    }

    impl Gate {
        fn enter(&self) {
            let mut step = self.step.lock().unwrap_or_else(PoisonError::into_inner);
            if *step == Step::Waiting {
                *step = Step::Holding;
                self.changed.notify_all();
                drop(self.changed.wait_while(step, |step| *step != Step::Open));
            }
        }
    }

    /// A thread that is kept at a point, or will be; it goes on when this goes out of scope.
    pub struct Held<'a> {
        gate: Arc<Gate>,
        points: Vec<&'static str>,
        scenario: &'a Scenario,
    }

    impl Held<'_> {
        /// Waits until there is one, for at most `timeout`; whether there is.
        #[must_use]
        pub fn wait(&self, timeout: Duration) -> bool {
            let step = self.gate.step.lock().unwrap_or_else(PoisonError::into_inner);
            let waited = self.gate.changed.wait_timeout_while(step, timeout, |step| *step == Step::Waiting);
            *waited.unwrap_or_else(PoisonError::into_inner).0 == Step::Holding
        }
    }

    impl Drop for Held<'_> {
        fn drop(&mut self) {
            *self.gate.step.lock().unwrap_or_else(PoisonError::into_inner) = Step::Open;
            self.gate.changed.notify_all();
            for point in &self.points {
                self.scenario.set(point, "off").expect("it is an action");
            }
        }
    }
}

#[cfg(all(test, feature = "fault-injection"))]
mod tests {
    use super::*;

    #[test]
    fn a_point_fails_always_or_each_third_time_as_it_is_told() {
        let scenario = Scenario::start();
        let fails = |times| (0..times).map(|_| point(DISCARD).err().and_then(|error| error.raw_os_error())).collect();
        scenario.set(DISCARD, "return(12/3)").expect("actions");
        let found: Vec<_> = fails(7);
        assert_eq!(found, [None, None, Some(12), None, None, Some(12), None]);
        scenario.set(DISCARD, "return(12)").expect("actions");
        let found: Vec<_> = fails(2);
        assert_eq!(found, [Some(12), Some(12)]);
    }
}
