//! Automatic soft reclaim: what to evict, decided from what a scan saw.
//!
//! [`Policy`] and [`Pace`] are plain values: no thread, no clock, no memory of a guest. A scan hands
//! in which frames are free and backed by memory and how many were installed since the last one,
//! and gets a plan; a manager of several VMs can decide for each from the same numbers. The
//! rules: a frame is evicted after it was free for `min_age` scans in a row, the oldest first; a
//! headroom of free frames with memory stays, `keep` and as much as the guest lately had to have
//! installed; and no more goes at once than the rate allows until the next scan.
//! `thread` has the clock.

mod thread;

pub use thread::{AutoReclaim, AutoStatus, KeepTooLarge, SwitchError};

pub use crate::region::FRAMES_A_WORD;

use llfree_base::choices::Settings;
use shared_layout::{HUGE_SIZE, HugeId};
use std::time::Duration;

/// Frames' ages, and how much the guest installed lately.
#[derive(Clone, Debug)]
pub struct Policy {
    /// Scans in a row that found the frame free and backed, one byte a huge frame.
    ages: Box<[u8]>,
    /// Frames that the guest had to have installed, halved with each scan: what the headroom lacked.
    back_off: u32,
}

/// What one scan decided.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug)]
pub struct Decision {
    /// Free frames backed by host memory.
    pub free: u32,
    /// How many of them are to stay.
    pub headroom: u32,
    /// The part of it that recent installs call for.
    pub back_off: u32,
}

impl Policy {
    /// A policy for a VM of `huge_frames` huge frames, all of them new.
    #[must_use]
    pub fn new(huge_frames: u32) -> Self {
        Self { ages: vec![0; huge_frames as usize].into(), back_off: 0 }
    }

    /// Forgets what recent installs call for: all of it is to go, whatever that costs later.
    pub fn forget_installs(&mut self) {
        self.back_off = 0;
    }

    /// One scan: `free` says of each frame whether it is free and backed, a bit for each of [`FRAMES_A_WORD`], the first
    /// one lowest; `installs` how many frames were installed since the last scan. What is to be evicted is put into `plan`,
    /// in ascending order.
    pub fn scan(
        &mut self,
        settings: &Settings,
        free: impl Iterator<Item = u64>,
        installs: u32,
        plan: &mut Vec<HugeId>,
    ) -> Decision {
        plan.clear();
        let mut of_age = [0u32; 256];
        for (ages, free) in self.ages.chunks_mut(FRAMES_A_WORD).zip(free) {
            if free == 0 {
                // Nearly all of them.
                ages.fill(0);
                continue;
            }
            for (bit, age) in ages.iter_mut().enumerate() {
                *age = if free >> bit & 1 == 1 { age.saturating_add(1) } else { 0 };
                of_age[usize::from(*age)] += 1;
            }
        }
        let free = of_age[1..].iter().sum::<u32>();
        // Each of these was evicted, or never had memory, when the guest needed it. Had that many more
        // been left alone, it would have paid nothing.
        self.back_off = installs.max(self.back_off / 2);
        let headroom = settings.keep_frames().saturating_add(self.back_off);
        let mut due = free.saturating_sub(headroom).min(settings.frames_a_scan());

        // The oldest first: all above some age, and of that age as many as are left.
        let mut oldest = usize::from(u8::MAX) + 1;
        while oldest > usize::from(settings.min_age.max(1)) && due >= of_age[oldest - 1] {
            oldest -= 1;
            due -= of_age[oldest];
        }
        let partly = oldest.checked_sub(1).filter(|age| *age >= usize::from(settings.min_age.max(1)));
        let is_anything_due = oldest <= usize::from(u8::MAX) || due > 0 && partly.is_some();
        let ages = if is_anything_due { &*self.ages } else { &[] };
        for (ages, first) in ages.chunks(FRAMES_A_WORD).zip((0..).step_by(FRAMES_A_WORD)) {
            if ages.iter().all(|age| *age == 0) {
                continue;
            }
            for (age, huge) in ages.iter().zip(first..) {
                let age = usize::from(*age);
                if age >= oldest {
                    plan.push(HugeId(huge));
                } else if due > 0 && Some(age) == partly {
                    plan.push(HugeId(huge));
                    due -= 1;
                }
            }
        }
        Decision { free, headroom, back_off: self.back_off }
    }
}

/// A token bucket that holds one batch, in frames: how long to wait before the next one.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Pace {
    a_frame: Duration,
    /// When all that was taken is paid for.
    paid: Duration,
}

impl Pace {
    /// A pace of `rate` bytes a second.
    #[must_use]
    pub fn new(rate: u64) -> Self {
        Self { a_frame: Duration::from_nanos(HUGE_SIZE * 1_000_000_000 / rate.max(1)), paid: Duration::ZERO }
    }

    /// How long to wait at `now`, a time since whenever, before the next batch.
    #[must_use]
    pub fn wait(&self, now: Duration) -> Duration {
        self.paid.saturating_sub(now)
    }

    /// A batch of `frames` was taken at `now`.
    pub fn take(&mut self, frames: u32, now: Duration) {
        self.paid = self.paid.max(now).saturating_add(self.a_frame.saturating_mul(frames));
    }

    /// The frames that it takes this long to pay for.
    #[must_use]
    pub fn frames_in(&self, time: Duration) -> u32 {
        u32::try_from(time.as_nanos() / self.a_frame.as_nanos().max(1)).unwrap_or(u32::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn settings(min_age: u8, keep: u64, rate: u64) -> Settings {
        let (keep_bytes, rate_bytes) = (keep * HUGE_SIZE, rate * HUGE_SIZE);
        Settings { interval: Duration::from_secs(1), min_age, keep_bytes, rate_bytes }
    }

    /// As a scan has it.
    fn words(free: &[bool]) -> impl Iterator<Item = u64> {
        let word = |free: &[bool]| free.iter().rev().fold(0, |word, free| word << 1 | u64::from(*free));
        free.chunks(FRAMES_A_WORD).map(word)
    }

    fn ids(frames: impl IntoIterator<Item = u32>) -> Vec<HugeId> {
        frames.into_iter().map(HugeId).collect()
    }

    #[test]
    fn the_oldest_go_first_and_the_newest_stay() {
        let settings = settings(2, 3, 1000);
        let (mut policy, mut plan) = (Policy::new(8), Vec::new());
        let mut scan = |free: [u8; 8], plan: &mut Vec<_>| policy.scan(&settings, words(&free.map(|f| f == 1)), 0, plan);
        assert_eq!(scan([0, 0, 1, 1, 0, 0, 0, 0], &mut plan).free, 2);
        scan([0, 1, 1, 1, 0, 0, 0, 1], &mut plan);
        assert_eq!(plan, ids([2]), "two are old enough, and three of the four stay");
        // As if it had not been done: nothing is remembered of a plan.
        scan([1, 1, 1, 1, 0, 0, 1, 1], &mut plan);
        assert_eq!(plan, ids([1, 2, 3]), "ages 3 and 3, then one of the two of age 2");
        scan([1, 1, 0, 1, 0, 0, 1, 1], &mut plan);
        assert_eq!(plan, ids([1, 3]), "a frame that was used is young again");
    }

    #[test]
    fn installs_raise_the_headroom_and_it_decays() {
        let settings = settings(1, 4, 1000);
        let (mut policy, mut plan) = (Policy::new(100), Vec::new());
        let mut headroom = |installs| {
            let decision = policy.scan(&settings, words(&[true; 100]), installs, &mut plan);
            assert_eq!(plan.len() as u32, 100 - decision.headroom.min(100));
            decision.headroom
        };
        assert_eq!([headroom(0), headroom(40), headroom(0), headroom(0), headroom(15)], [4, 44, 24, 14, 19]);
        assert_eq!([headroom(0), headroom(0), headroom(0), headroom(0), headroom(0)], [11, 7, 5, 4, 4]);
        assert_eq!(headroom(u32::MAX), u32::MAX);
        policy.forget_installs();
        let nothing_kept = Settings { keep_bytes: 0, ..settings };
        let decision = policy.scan(&nothing_kept, words(&[true; 100]), 0, &mut plan);
        assert_eq!((decision.headroom, plan.len()), (0, 100));
    }

    proptest! {
        /// Whatever a guest does, and however the settings are.
        #[test]
        fn no_scan_breaks_a_rule(
            min_age in 1u8..5, keep in 0u64..20, rate in 1u64..40,
            // One word is whole, one is not, and between them lies one that nobody uses.
            scans in prop::collection::vec((prop::collection::vec(any::<bool>(), 80), 0u32..50), 1..40),
        ) {
            let settings = settings(min_age, keep, rate);
            let (mut policy, mut plan) = (Policy::new(144), Vec::new());
            let mut ages = [0u32; 144];
            let mut evicted = [false; 144];
            for (mut used_or_not, installs) in scans {
                used_or_not.splice(64..64, [false; 64]);
                // What was evicted is not backed until the guest used it.
                let free: Vec<bool> = used_or_not.iter().zip(&evicted).map(|(free, gone)| *free && !gone).collect();
                for (i, age) in ages.iter_mut().enumerate() {
                    *age = if free[i] { *age + 1 } else { 0 };
                    evicted[i] &= used_or_not[i];
                }
                let decision = policy.scan(&settings, words(&free), installs, &mut plan);
                prop_assert!(plan.is_sorted() && plan.windows(2).all(|pair| pair[0] != pair[1]));
                let youngest = plan.iter().map(|huge| ages[huge.index()]).min();
                prop_assert!(youngest.is_none_or(|age| age >= u32::from(min_age)), "never a young one");
                let left = free.iter().filter(|free| **free).count() - plan.len();
                prop_assert!(plan.is_empty() || left as u64 >= keep + u64::from(installs), "never below the headroom");
                prop_assert!(plan.len() as u64 <= rate, "never faster");
                let oldest_left = (0..144).filter(|i| free[*i] && !plan.contains(&HugeId(*i as u32))).map(|i| ages[i]).max();
                prop_assert!(youngest.zip(oldest_left).is_none_or(|(gone, left)| gone >= left), "never the newer first");
                prop_assert_eq!(decision.free as usize, free.iter().filter(|free| **free).count());
                for huge in &plan {
                    evicted[huge.index()] = true;
                }
            }
        }

        /// What fits in a time is paid for at its end, and one more is not.
        #[test]
        fn a_batch_fits_the_time_that_it_is_for(rate in 1u64..1 << 40, millis in 1u64..1000) {
            let time = Duration::from_millis(millis);
            let pace = Pace::new(rate);
            let frames = pace.frames_in(time);
            let paid_at = |frames| { let mut pace = pace; pace.take(frames, Duration::ZERO); pace.wait(Duration::ZERO) };
            prop_assert!(paid_at(frames) <= time && time < paid_at(frames.saturating_add(1)));
        }

        /// In any stretch of time, what the rate allows and one batch.
        #[test]
        fn the_pace_is_kept(rate in 1u64..1 << 40, steps in prop::collection::vec((0u64..100_000_000, 1u32..=32), 1..60)) {
            let mut pace = Pace::new(rate);
            let mut now = Duration::from_secs(1);
            let mut taken = Vec::new();
            for (idle, frames) in steps {
                now += Duration::from_nanos(idle) + pace.wait(now + Duration::from_nanos(idle));
                pace.take(frames, now);
                taken.push((now, u64::from(frames) * HUGE_SIZE));
            }
            for from in 0..taken.len() {
                let mut sum = 0;
                for (at, bytes) in &taken[from..] {
                    let allowed = (*at - taken[from].0).as_secs_f64() * rate as f64;
                    // Nanoseconds a frame are rounded down.
                    prop_assert!(sum as f64 <= allowed * 1.001 + 1.0, "{sum} before {at:?}, {allowed} allowed");
                    sum += bytes;
                }
            }
        }
    }
}
