//! Promises of the drivers, with a balloon that is a struct.

use super::Devices;
use crate::Agent;
use crate::fake::{Bell, Table};
use agent_abi::{Command, Outcome};
use guest_abi::ControlWord;
use guest_abi::devices::BALLOON_F_HUGE;
use shared_layout::{HUGE_SIZE, Order};
use std::boxed::Box;

const HUGE_FRAMES: u32 = 16;

/// A table of 16 huge frames whose device offers one more feature.
fn table(extra: u32) -> Table {
    let table = Table::with_balloon(HUGE_FRAMES, 1);
    table.balloon().extra = extra;
    table
}

fn devices() -> &'static Devices {
    // A test's devices live as long as its process, as a guest's do.
    Box::leak(Box::default())
}

/// Requests this many pages in the balloon, and calls the drivers until they have no more to do.
fn want(table: &Table, agent: &mut Agent<'_, Bell<'_>>, pages: u32) {
    table.balloon().num_pages = pages;
    let events = table.shared().control(ControlWord::DeviceEvents);
    table.set_control(ControlWord::DeviceEvents, events + 1);
    while table.order(agent, Command::Devices).more != 0 {}
}

/// Blocks in the balloon, and how many pages the driver says there are.
fn size(table: &Table) -> (usize, u32) {
    let balloon = table.balloon();
    (balloon.given.len(), balloon.actual)
}

#[test]
fn a_balloon_takes_free_frames_in_batches_and_gives_them_back() {
    let table = table(0);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    let before = table.order(&mut agent, Command::Drain).free_frames;
    want(&table, &mut agent, 2000);
    assert_eq!(size(&table), (2000, 2000));
    assert_eq!(table.balloon().requests.iter().max(), Some(&256));
    assert!(table.order(&mut agent, Command::Drain).free_frames <= before - 2000);
    want(&table, &mut agent, 700);
    assert_eq!(size(&table), (700, 700));
    want(&table, &mut agent, 0);
    assert_eq!(size(&table), (0, 0));
    assert_eq!(table.order(&mut agent, Command::Drain).free_frames, before, "nothing is lost");
}

#[test]
fn what_is_in_the_balloon_is_nobodys() {
    let table = table(0);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    want(&table, &mut agent, 4000);
    let given = table.balloon().given.clone();
    let report = table.order(&mut agent, Command::Alloc { bytes: HUGE_SIZE, order: Order::BASE, seed: 1 });
    assert_eq!(report.outcome, Outcome::Ok as u64);
    assert_eq!(table.balloon().given, given);
    let verified = table.order(&mut agent, Command::Verify);
    assert_eq!((verified.outcome, verified.bytes), (Outcome::Ok as u64, HUGE_SIZE));
    for number in given {
        let frame = table.frame_of(number);
        assert!(tenant.alloc_at(frame, Order::BASE).is_err(), "frame {frame:?} is free as well");
    }
}

#[test]
fn a_huge_balloon_takes_whole_blocks() {
    let table = table(1 << BALLOON_F_HUGE);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    want(&table, &mut agent, 8 * 512);
    assert_eq!(size(&table), (8, 8 * 512));
    let given = table.balloon().given.clone();
    assert!(given.into_iter().all(|number| table.frame_of(number).is_aligned(Order::HUGE)));
    want(&table, &mut agent, 0);
    assert!(table.balloon().given.is_empty());
}

#[test]
fn a_guest_out_of_memory_takes_pages_back_and_keeps_them() {
    let table = table(0);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    want(&table, &mut agent, u32::MAX);
    let full = table.balloon().given.len();
    assert!(full > 14 * 512, "all but what the guest needs itself: {full}");
    let report = table.order(&mut agent, Command::Alloc { bytes: 2 * HUGE_SIZE, order: Order::BASE, seed: 1 });
    assert_eq!((report.outcome, report.bytes), (Outcome::Ok as u64, 2 * HUGE_SIZE));
    assert!(table.balloon().given.len() <= full - 2 * 512 + 64);
    let after = table.balloon().given.len();
    table.order(&mut agent, Command::Devices);
    assert_eq!(table.balloon().given.len(), after, "until the host asks anew");
    assert_eq!(table.order(&mut agent, Command::Verify).outcome, Outcome::Ok as u64);
}

#[test]
fn free_memory_is_reported_once_until_somebody_used_it() {
    let table = table(0);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    // Only backed frames are worth a report.
    table.order(&mut agent, Command::Alloc { bytes: 8 * HUGE_SIZE, order: Order::HUGE, seed: 1 });
    table.order(&mut agent, Command::Free { bytes: u64::MAX, random: false, seed: 0 });
    want(&table, &mut agent, 0);
    let first = table.balloon().reported.len();
    assert!(first >= 7, "{first}");
    want(&table, &mut agent, 0);
    assert_eq!(table.balloon().reported.len(), first, "the host knows already");
    table.order(&mut agent, Command::Alloc { bytes: 3 * HUGE_SIZE, order: Order::HUGE, seed: 1 });
    table.order(&mut agent, Command::Free { bytes: u64::MAX, random: false, seed: 0 });
    want(&table, &mut agent, 0);
    assert_eq!(table.balloon().reported.len(), first + 3);
}

#[test]
fn statistics_come_with_the_driver() {
    let table = table(0);
    let tenant = table.tenant();
    let mut agent = table.agent(&tenant, 0);
    agent.attach(devices());
    assert_eq!(table.balloon().statistics, 1);
    want(&table, &mut agent, 0);
    assert_eq!(table.balloon().statistics, 1, "the host did not ask for more");
}
