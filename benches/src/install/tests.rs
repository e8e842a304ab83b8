//! Plans, comparisons, and one small measurement of each kind.

use super::*;
use crate::candidates::INSTALL;
use test_support::skipped;

fn cell(p99: f64, us: f64) -> Cell {
    let mut cell = Cell::default();
    cell.p99.push(p99);
    cell.us_per_frame.push(us);
    cell
}

#[test]
fn rows_are_compared_with_their_like() {
    let mut rows = vec![
        cell(100.0, 8.0).row("pool", 1, SETTINGS[0], 9),
        cell(150.0, 10.0).row("pool", 1, SETTINGS[1], 9),
        cell(300.0, 4.0).row("pool", 2, SETTINGS[0], 9),
    ];
    compare(&mut rows, 80.0);
    assert_eq!((rows[1].p99_to_quiet, rows[1].ratio_to_populate), (1.5, 0.125));
    assert_eq!((rows[2].throughput_to_one_vcpu, rows[0].throughput_to_one_vcpu), (2.0, 1.0));
    assert_eq!(panels(&rows).len(), 3);
}

#[test]
fn single_calls_have_percentiles_too() {
    let mut cell = Cell::default();
    cell.raw((1..=1000).rev().collect());
    assert_eq!((cell.p50.median(), cell.p99.median(), cell.p999.median()), (500.0, 990.0, 999.0));
    assert_eq!(cell.mean.median(), 500.5);
}

fn plan(mem: u64, burst: u64, reclaim: u64) -> Plan {
    // The large pool takes long to fill, and does what the small one does.
    let candidates = INSTALL.iter().filter(|candidate| candidate.name != "pool-512M").collect();
    Plan { candidates, cpus: vec![1, 2], mem, burst, reclaim, iterations: 1 }
}

#[test]
fn a_plan_is_made_to_fit_or_refused() {
    let fitted = plan(8 << 30, 1 << 30, 4 << 30).fitted(6 << 30).expect("it can be made smaller");
    assert_eq!((fitted.mem, fitted.burst, fitted.reclaim), (4 << 30, 512 << 20, 2 << 30));
    assert!(plan(1 << 30, 768 << 20, 0).fitted(64 << 30).is_err());
    assert!(plan(1 << 30, 0, 0).fitted(64 << 30).is_err());
    assert!(plan(1 << 30, 64 << 20, 768 << 20).fitted(64 << 30).is_err());
}

#[test]
fn every_way_to_install_is_measured() {
    if let Err(error) = vmm::boot::open_kvm() {
        return skipped(llfree_base::error_line(&error));
    }
    let plan = plan(256 << 20, 32 << 20, 64 << 20);
    let rows = run(&plan, Show::Nothing).unwrap_or_else(|e| panic!("{}", llfree_base::error_line(&e)));
    let guests: Vec<&Row> = rows.iter().filter(|row| row.vcpus > 0).collect();
    assert_eq!(guests.len(), plan.candidates.len() * 2 * SETTINGS.len());
    for row in &guests {
        assert!(row.installed >= 16.0 && row.calls > 0.0 && row.p50_ns > 0.0 && row.p50_ns <= row.p99_ns, "{row:?}");
        assert!(row.throughput_to_one_vcpu > 0.0 && row.p99_to_quiet > 0.0, "{row:?}");
    }
    assert!(guests.iter().any(|row| row.beside == "reclaim" && row.reclaimed > 0.0), "{guests:?}");
    assert!(Row::table(&rows).lines().count() == rows.len() + 1);
}
