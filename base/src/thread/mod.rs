//! The one place that starts threads.
//!
//! A thread has a name, which the kernel shows, and a [`Role`], which says what it may ask of the
//! kernel. Each crate states the roles of its threads; the owner of the process decides whether
//! they are enforced, and hands a [`Spawner`] down that does so. The default spawner starts
//! ordinary threads.

pub mod rights;

use crate::faults;
use std::fmt;
use std::io;
use std::sync::Arc;
use std::thread::{Builder, JoinHandle};

/// A kind of thread: one set of rights, shared by all threads that do the same work.
///
/// A constant, which stands where the thread's code does.
#[derive(Clone, Copy, Debug)]
pub struct Role {
    name: &'static str,
    rights: &'static [&'static [rights::Allow]],
}

impl Role {
    /// A role of this name, which is unique in the process, with the rights of these groups besides
    /// those that every thread needs.
    #[must_use]
    pub const fn new(name: &'static str, rights: &'static [&'static [rights::Allow]]) -> Self {
        Self { name, rights }
    }

    /// Its name, in messages.
    #[must_use]
    pub const fn name(self) -> &'static str {
        self.name
    }

    /// The system calls that its threads may make.
    #[must_use]
    pub const fn rights(self) -> &'static [&'static [rights::Allow]] {
        self.rights
    }
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name)
    }
}

/// Starts threads, each confined to its role before it does anything else.
#[derive(Clone, Default)]
pub struct Spawner {
    confine: Option<Arc<dyn Fn(Role) + Send + Sync>>,
}

impl Spawner {
    /// A spawner whose threads call `confine` with their role first. It must not return if it
    /// cannot do what it is for.
    #[must_use]
    pub fn confined(confine: impl Fn(Role) + Send + Sync + 'static) -> Self {
        Self { confine: Some(Arc::new(confine)) }
    }

    /// Starts a thread that runs `body` within the rights of `role`. The kernel shows the first 15
    /// bytes of `name`.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn spawn<T: Send + 'static>(
        &self,
        name: impl Into<String>,
        role: Role,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        self.spawn_after(name, role, || {}, body)
    }

    /// The same, where `prepare` still has the rights of the caller.
    ///
    /// # Errors
    /// If the host has no thread to give.
    pub fn spawn_after<T: Send + 'static>(
        &self,
        name: impl Into<String>,
        role: Role,
        prepare: impl FnOnce() + Send + 'static,
        body: impl FnOnce() -> T + Send + 'static,
    ) -> io::Result<JoinHandle<T>> {
        faults::point(faults::THREAD_START)?;
        let spawner = self.clone();
        Builder::new().name(name.into()).spawn(move || {
            prepare();
            spawner.confine(role);
            body()
        })
    }

    /// Confines the calling thread, for good: what a thread that nobody spawned does, such as main.
    pub fn confine(&self, role: Role) {
        if let Some(confine) = &self.confine {
            confine(role);
        }
    }
}

impl fmt::Debug for Spawner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.confine.is_some() { "Spawner(confined)" } else { "Spawner" })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Mutex;

    const ROLE: Role = Role::new("worker", &[]);

    #[test]
    fn a_thread_is_confined_after_its_preparation_and_before_its_work() {
        let steps = Arc::new(Mutex::new(Vec::new()));
        let [confined, prepared, ran] = std::array::from_fn(|_| steps.clone());
        let spawner = Spawner::confined(move |role| confined.lock().expect("whole").push(role.name()));
        let thread = spawner.spawn_after(
            "named",
            ROLE,
            move || prepared.lock().expect("whole").push("prepare"),
            move || {
                ran.lock().expect("whole").push("run");
                std::thread::current().name().map(str::to_owned)
            },
        );
        assert_eq!(thread.expect("a thread").join().expect("no panic").as_deref(), Some("named"));
        assert_eq!(*steps.lock().expect("whole"), ["prepare", "worker", "run"]);
    }

    #[test]
    fn a_spawner_of_nobody_confines_nothing() {
        let spawner = Spawner::default();
        spawner.confine(ROLE);
        assert_eq!(spawner.spawn("free", ROLE, || 7).expect("a thread").join().expect("no panic"), 7);
    }
}
