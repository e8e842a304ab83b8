//! How long the module's scans wait for an area, whom they pass over, and when headroom goes: its own header, with a clock of
//! ticks and areas that are had by whom a test says.

// The library has the C file.
use llfree_module_check as _;
use std::ffi::c_ulong;

#[repr(C)]
struct Patience {
    idle: u32,
    all: u32,
}

#[repr(C)]
#[derive(Default)]
struct InVain {
    at: c_ulong,
    progress: u64,
}

#[repr(C)]
#[derive(Default)]
struct Waited {
    for_scan: InVain,
    for_look: InVain,
}

#[repr(C)]
struct Wait {
    first: u64,
    before: u64,
    idle: u32,
    all: u32,
}

#[repr(C)]
#[derive(Default)]
struct Asked {
    taken: u64,
    times: u32,
}

#[repr(C)]
#[derive(Default)]
struct Alarms {
    at: c_ulong,
    yielded: u64,
    nr: u32,
    in_vain: u32,
}

#[link(name = "llfree-module-entry", kind = "static")]
unsafe extern "C" {
    safe static module_hz: u32;
    safe static module_patience: u32;
    safe static module_long_patience: u32;
    safe static module_batch_pages: u32;
    safe fn module_wait_goes_on(
        wait: &mut Wait,
        patience: &mut Patience,
        waited: &Waited,
        reclaims: bool,
        now: c_ulong,
    ) -> bool;
    safe fn module_wait_saw(wait: &mut Wait, patience: &mut Patience, progress: u64);
    safe fn module_wait_failed(wait: &Wait, waited: &mut Waited, now: c_ulong);
    safe fn module_headroom_yields(asked: &mut Asked, taken: u64, weight: u32) -> bool;
    safe static module_alarms: u32;
    safe static module_alarms_in_vain: u32;
    safe static module_quiet: u32;
    safe fn module_alarm_is_raised(alarms: &mut Alarms, yielded: u64, now: c_ulong) -> bool;
    safe fn module_is_alarmed(alarms: &Alarms, now: c_ulong) -> bool;
}

/// Who has an area at a moment: nobody, or somebody who is a scan or not; and what was taken from it by then.
#[derive(Clone, Copy)]
enum Had {
    No,
    ByScan(u64),
    ByLook(u64),
}

impl Had {
    fn progress(self) -> u64 {
        match self {
            Self::No => 0,
            Self::ByScan(progress) | Self::ByLook(progress) => progress,
        }
    }
}

/// A clock, in ticks.
struct Clock(c_ulong);

impl Clock {
    /// A moment at which no area has been waited for in vain within the last second.
    fn start() -> Self {
        Self(1_000_000)
    }

    /// A call's wait for an area, as `lock_area()` has it: whether it gets it, and after how many sleeps.
    fn lock(&mut self, patience: &mut Patience, waited: &mut Waited, had: impl Fn(c_ulong) -> Had) -> (bool, u32) {
        let first = had(self.0).progress();
        let mut wait = Wait { first, before: first, idle: 0, all: 0 };
        loop {
            let reclaims = match had(self.0) {
                Had::No => return (true, wait.all),
                Had::ByScan(_) => true,
                Had::ByLook(_) => false,
            };
            if !module_wait_goes_on(&mut wait, patience, waited, reclaims, self.0) {
                module_wait_failed(&wait, waited, self.0);
                return (false, wait.all);
            }
            self.0 += 1;
            module_wait_saw(&mut wait, patience, had(self.0).progress());
        }
    }
}

fn patience() -> Patience {
    Patience { idle: module_patience, all: module_long_patience }
}

#[test]
fn each_is_waited_for_as_long_as_it_says_and_then_passed_over_for_a_second() {
    for (had, ticks) in [(Had::ByScan(7), module_long_patience), (Had::ByLook(7), module_patience)] {
        let (mut clock, mut waited) = (Clock::start(), Waited::default());
        let mut call = |clock: &mut Clock| clock.lock(&mut patience(), &mut waited, |_| had);
        assert_eq!(call(&mut clock), (false, ticks));
        assert_eq!(call(&mut clock), (false, 0));
        clock.0 += c_ulong::from(module_hz) - 1;
        assert_eq!(call(&mut clock), (false, 0));
        clock.0 += 1;
        assert_eq!(call(&mut clock), (false, ticks));
    }
}

/// What was spent on one area leaves less for the next, which is not to blame: a call that begins with it waits.
#[test]
fn an_area_is_passed_over_only_after_a_whole_wait_for_it() {
    let had = |by_scan: bool| if by_scan { Had::ByScan(0) } else { Had::ByLook(0) };
    for (by_scan, limit) in [(true, module_long_patience), (false, module_patience)] {
        let (mut clock, mut waited) = (Clock::start(), [Waited::default(), Waited::default()]);
        let (begin, mut one_call) = (clock.0, patience());
        let most = c_ulong::from(limit / 5 * 4);
        let first = |now| if now < begin + most { had(by_scan) } else { Had::No };
        assert_eq!(clock.lock(&mut one_call, &mut waited[0], first), (true, limit / 5 * 4));
        let end = clock.0 + c_ulong::from(limit);
        let second = |now| if now < end { had(by_scan) } else { Had::No };
        let (got, sleeps) = clock.lock(&mut one_call, &mut waited[1], second);
        assert!(!got && sleeps == limit - limit / 5 * 4, "{sleeps} sleeps");
        // Another call, which has all of its patience for this one.
        let left = u32::try_from(end - clock.0).unwrap_or(0);
        assert_eq!(clock.lock(&mut patience(), &mut waited[1], second), (true, left));
    }
}

/// Who waited in vain for a look says nothing of a scan that has the area by now.
#[test]
fn the_mark_of_a_short_wait_keeps_nobody_from_waiting_for_a_scan() {
    let (mut clock, mut waited) = (Clock::start(), Waited::default());
    let look = |_| Had::ByLook(0);
    assert_eq!(clock.lock(&mut patience(), &mut waited, look), (false, module_patience));
    assert_eq!(clock.lock(&mut patience(), &mut waited, look), (false, 0));
    let end = clock.0 + 50;
    let scan = |now| if now < end { Had::ByScan(0) } else { Had::No };
    assert_eq!(clock.lock(&mut patience(), &mut waited, scan), (true, 50));
    // The other way round: a whole wait for a scan is longer than one for a look would be.
    assert_eq!(clock.lock(&mut patience(), &mut waited, |_| Had::ByScan(0)), (false, module_long_patience));
    assert_eq!(clock.lock(&mut patience(), &mut waited, look), (false, 0));
}

#[test]
fn progress_has_others_wait_on_until_it_is_a_batch() {
    let (mut clock, mut waited) = (Clock::start(), Waited::default());
    let begin = clock.0;
    // A page each time that the short patience is about to end, and for as long as the long one lasts.
    let slow = |now: c_ulong| Had::ByLook((now - begin) / (c_ulong::from(module_patience) - 1));
    assert_eq!(clock.lock(&mut patience(), &mut waited, slow), (false, module_long_patience));
    // It is worth another wait: something came free.
    let end = clock.0 + 3;
    let next = |now| if now < end { slow(now) } else { Had::No };
    assert_eq!(clock.lock(&mut patience(), &mut waited, next), (true, 3));
    let begin = clock.0;
    let fast = |now: c_ulong| Had::ByScan((now - begin) * c_ulong::from(module_batch_pages / 4));
    assert_eq!(clock.lock(&mut patience(), &mut waited, fast), (false, 4));
    // Somebody was busy, and gave: no reason to pass it over.
    assert_eq!(clock.lock(&mut patience(), &mut waited, fast), (false, 4));
}

/// A round of reclaim counts 13 times, also after it got what it wanted, where it does not know of it.
#[test]
fn headroom_yields_after_a_round_in_vain_and_long_before_the_last() {
    let mut asked = Asked::default();
    let mut counts = |taken: u64, weight: u32| {
        let before = (0..1000).take_while(|_| !module_headroom_yields(&mut asked, taken, weight)).count();
        assert!(module_headroom_yields(&mut asked, taken, weight), "and it goes on to");
        before
    };
    // The rest of the round in which something was taken, a whole one, and no more than two of 17.
    assert_eq!(counts(0, 1), 26);
    assert_eq!(counts(5, 1), 26);
    // Each counted area stands for others, of so many that it has its turn in every eleventh count.
    assert_eq!(counts(6, 11), 2);
    assert_eq!(counts(7, u32::MAX), 0);
    assert_eq!(counts(8, 1), 26);
}

#[test]
fn who_is_out_of_memory_tries_again_for_as_long_as_headroom_goes_and_not_for_ever() {
    let mut alarms = Alarms::default();
    let mut clock = Clock::start();
    assert!(!module_is_alarmed(&alarms, clock.0));
    // Each time some headroom goes, and each round lasts for almost as long as it takes to forget the ones before.
    let raised = |alarms: &mut Alarms, clock: &mut Clock, yields: bool| {
        let first = alarms.yielded;
        let again = |n: &u64| {
            clock.0 += c_ulong::from(module_quiet) - 1;
            module_alarm_is_raised(alarms, first + if yields { *n } else { 0 }, clock.0)
        };
        (1..1000u64).take_while(again).count()
    };
    assert_eq!(raised(&mut alarms, &mut clock, true), module_alarms as usize);
    assert_eq!(raised(&mut alarms, &mut clock, true), 0, "it goes on: somebody is killed");
    clock.0 += c_ulong::from(module_quiet);
    assert_eq!(raised(&mut alarms, &mut clock, false), module_alarms_in_vain as usize, "nothing comes of it");
    clock.0 += c_ulong::from(module_quiet);
    assert_eq!(raised(&mut alarms, &mut clock, true), module_alarms as usize, "after a while it begins anew");
}

#[test]
fn an_alarm_lasts_for_a_second() {
    let mut alarms = Alarms::default();
    let clock = Clock::start();
    assert!(module_alarm_is_raised(&mut alarms, 0, clock.0));
    let second = c_ulong::from(module_hz);
    assert!(module_is_alarmed(&alarms, clock.0) && module_is_alarmed(&alarms, clock.0 + second - 1));
    assert!(!module_is_alarmed(&alarms, clock.0 + second));
}
