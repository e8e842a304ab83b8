//! What moves the VM's memory, in rows of a status.

use super::words::{Row, is_none, listed, millis, plural, word};
use llfree_base::units::Bytes;
use llfree_control::report::{BalloonStatus, ChosenBy, ElasticStatus, GuestStatsReport, HandOver};

/// The state of the device that moves memory; nothing without one.
pub(super) fn rows(report: &ElasticStatus) -> Vec<Row> {
    let mut rows = Vec::new();
    let driver = if report.driven || is_none(report) { "" } else { ", no driver in the guest" };
    let errors = match report.device_errors {
        0 => String::new(),
        errors => format!(", {}", plural(errors, "driver error")),
    };
    let of_guest = match report.chosen_by.known() {
        Some(ChosenBy::Hello) => Some("llfree: the guest's kernel said that it shares its free memory"),
        Some(ChosenBy::Driver) => {
            Some("balloon: the guest has a driver for it, and did not say that it shares its free memory")
        }
        Some(ChosenBy::Nobody) => Some(
            "undecided: llfree if the guest's kernel says that it shares its free memory, else a balloon once it has a driver",
        ),
        Some(ChosenBy::Launch) | None => None,
    };
    if let Some(text) = of_guest {
        // Whoever has not come is not missed.
        let driver = if report.chosen_by == ChosenBy::Driver { driver } else { "" };
        rows.push(("elastic", format!("{text}{driver}{errors}")));
    } else if report.balloon.is_some() || report.mem.is_some() || is_none(report) {
        rows.push(("elastic", format!("{}{driver}{errors}", word(&report.kind))));
    }
    rows.extend(report.balloon.iter().flat_map(balloon_rows));
    if let Some(m) = &report.mem {
        let (plugged, requested, boot) = (Bytes(m.plugged_bytes), Bytes(m.requested_bytes), Bytes(m.boot_bytes));
        rows.push(("blocks", format!("{plugged} plugged, {requested} requested, above {boot}{}", listed(&m.counts))));
    }
    match &report.table {
        Some(_) if !report.driven => rows.push((
            "guest says",
            "nothing: its kernel does not share its free memory; it is still booting, or was built without that".into(),
        )),
        Some(said) => {
            let (floor, fragmented) = (Bytes(said.floor_bytes), Bytes(said.fragmented_bytes));
            let aside = Bytes(said.set_aside_bytes);
            let by_touch = if said.hand_over == HandOver::ByTouch {
                "; of what it uses, some comes by touch, as the host had no memory for it"
            } else {
                ""
            };
            let text = format!(
                "{fragmented} free between used pages, {aside} set aside for the host, {floor} to be left free{by_touch}"
            );
            rows.push(("guest says", text));
        }
        None => {}
    }
    rows
}

fn balloon_rows(balloon: &BalloonStatus) -> Vec<Row> {
    let counts = &balloon.counts;
    let bad = match counts.bad_pages.saturating_add(counts.repeated_pages) {
        0 => String::new(),
        bad => format!(", {bad} wrong page numbers"),
    };
    let reported = match counts.reported_bytes {
        0 => String::new(),
        bytes => format!(", {} of it reported", Bytes(bytes)),
    };
    let discarded = Bytes(counts.discarded_bytes);
    let mut rows = vec![
        ("balloon", format!("{} of {}{bad}", Bytes(balloon.inflated_bytes), Bytes(balloon.target_bytes))),
        ("discarded", format!("{discarded} in {}{reported}", plural(counts.discards, "call"))),
    ];
    rows.extend(balloon.guest.iter().map(|guest| ("guest says", guest_says(guest))));
    rows
}

/// A guest's statistics: what it says of them.
fn guest_says(guest: &GuestStatsReport) -> String {
    let said = [
        (guest.free_bytes, "free"),
        (guest.available_bytes, "available"),
        (guest.cache_bytes, "in caches"),
        (guest.total_bytes, "in total"),
    ];
    let said: Vec<String> =
        said.into_iter().filter_map(|(bytes, what)| Some(format!("{} {what}", Bytes(bytes?)))).collect();
    let said = if said.is_empty() { "nothing".to_owned() } else { said.join(", ") };
    let stale = if guest.stale { ": out of date" } else { "" };
    format!("{said}; {} ago{stale}", millis(guest.age_ms))
}
