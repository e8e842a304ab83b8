//! [`Parking`]: how a thread that works for the guest is told to run, to park or to end, and how the
//! thread that gave the order learns that it has settled.
//!
//! Used by the threads of vCPUs and of devices. The thread looks at [`order`](Parking::order) between
//! two steps; interrupting a step (by a signal or an event) is up to its owner. Invariants: `Stop` is
//! final; a thread counts as parked from the moment it stops working for the guest until it has seen an
//! order to run; every wait for it has a deadline.

use llfree_base::lock;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// What a thread is told to do.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
pub enum Order {
    /// Work.
    Run,
    /// Finish the step at hand, then wait in [`Parking::park`].
    Pause,
    /// End.
    Stop,
}

#[derive(Debug)]
struct State {
    order: Order,
    parked: bool,
    ended: bool,
}

/// One thread's orders.
#[derive(Debug)]
pub struct Parking {
    /// A copy of the order in `state`, for a look between two steps that costs no lock.
    order: AtomicU8,
    state: Mutex<State>,
    changed: Condvar,
}

impl Default for Parking {
    fn default() -> Self {
        let state = State { order: Order::Run, parked: false, ended: false };
        Self { order: AtomicU8::new(Order::Run as u8), state: Mutex::new(state), changed: Condvar::new() }
    }
}

impl Parking {
    /// Gives an order and does not wait. After `Stop` all other orders are ignored.
    pub fn give(&self, order: Order) {
        let mut state = lock(&self.state);
        if state.order != Order::Stop {
            state.order = order;
            self.order.store(order as u8, Ordering::Release);
        }
        drop(state);
        self.changed.notify_all();
    }

    /// The current order.
    #[must_use]
    pub fn order(&self) -> Order {
        match self.order.load(Ordering::Acquire) {
            run if run == Order::Run as u8 => Order::Run,
            pause if pause == Order::Pause as u8 => Order::Pause,
            _ => Order::Stop,
        }
    }

    /// Called by the thread itself: waits as long as the order is to pause.
    pub fn park(&self) {
        let mut state = lock(&self.state);
        while state.order == Order::Pause {
            if !state.parked {
                state.parked = true;
                self.changed.notify_all();
            }
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        state.parked = false;
    }

    /// Called by the thread itself, as its last act: it has ended.
    pub fn end(&self) {
        lock(&self.state).ended = true;
        self.changed.notify_all();
    }

    /// Whether the thread is parked.
    #[must_use]
    pub fn is_parked(&self) -> bool {
        lock(&self.state).parked
    }

    /// Whether the thread does nothing for the guest: it is parked or has ended.
    #[must_use]
    pub fn has_settled(&self) -> bool {
        let state = lock(&self.state);
        state.parked || state.ended
    }

    /// Waits until the thread has settled, at most until `deadline`; true if it has.
    #[must_use]
    pub fn wait_settled(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        self.wait_settled_for(left)
    }

    /// The same, for at most `timeout`.
    #[must_use]
    pub fn wait_settled_for(&self, timeout: Duration) -> bool {
        let busy = |state: &mut State| !(state.parked || state.ended);
        let waited = self.changed.wait_timeout_while(lock(&self.state), timeout, busy);
        !waited.unwrap_or_else(PoisonError::into_inner).1.timed_out()
    }
}

/// Marks a thread as ended when this goes out of scope, even by a panic.
pub struct EndsWith<'a>(pub &'a Parking);

impl Drop for EndsWith<'_> {
    fn drop(&mut self) {
        self.0.end();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicU64;

    const LONG: Duration = Duration::from_secs(60);

    /// A thread that counts its steps until it is told to stop.
    fn counter(steps: &Arc<AtomicU64>) -> (Arc<Parking>, std::thread::JoinHandle<()>) {
        let parking = Arc::new(Parking::default());
        let (own, steps) = (parking.clone(), steps.clone());
        let thread = std::thread::spawn(move || {
            let _end = EndsWith(&own);
            loop {
                match own.order() {
                    Order::Run => drop(steps.fetch_add(1, Ordering::Relaxed)),
                    Order::Pause => own.park(),
                    Order::Stop => return,
                }
            }
        });
        (parking, thread)
    }

    #[test]
    fn a_parked_thread_makes_no_step_and_goes_on_when_told() {
        let steps = Arc::new(AtomicU64::new(0));
        let (parking, thread) = counter(&steps);
        for _ in 0..500 {
            parking.give(Order::Pause);
            assert!(parking.wait_settled_for(LONG) && parking.is_parked());
            let seen = steps.load(Ordering::Relaxed);
            std::thread::yield_now();
            assert_eq!(steps.load(Ordering::Relaxed), seen);
            parking.give(Order::Run);
            while steps.load(Ordering::Relaxed) == seen {
                std::thread::yield_now();
            }
        }
        parking.give(Order::Stop);
        thread.join().expect("no panic");
    }

    #[test]
    fn a_stop_wakes_a_parked_thread_and_is_final() {
        let (parking, thread) = counter(&Arc::default());
        parking.give(Order::Pause);
        assert!(parking.wait_settled_for(LONG));
        parking.give(Order::Stop);
        parking.give(Order::Pause);
        thread.join().expect("no panic");
        assert_eq!(parking.order(), Order::Stop);
        assert!(parking.has_settled() && !parking.is_parked(), "it is gone");
    }

    #[test]
    fn a_thread_that_does_not_come_costs_the_timeout() {
        let parking = Parking::default();
        parking.give(Order::Pause);
        assert!(!parking.wait_settled_for(Duration::from_millis(5)));
        assert!(!parking.wait_settled(Instant::now()));
    }
}
