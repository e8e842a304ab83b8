//! What the module promises, checked in a machine that has it: `llfree-module-check quick|short|debug|long MODULE.ko SWAP
//! DISK`; and parts of it: `races MODULE.ko STEPS`, `cost MODULE.ko MIB`, `count MODULE.ko`, `pressure MODULE.ko`, `many MODULE.ko`,
//! `tables MODULE.ko`, `global MODULE.ko TIMES`, `behind MODULE.ko TIMES`, `numa`.
//!
//! Started by `images/linux/testbed module` as root, in an emulated machine that is there for this. Prints a row a check,
//! and what was measured. Checks that need processes of their own start this program again, as a `tenant` or a `hog`.

mod checks;
mod child;
mod device;
mod log;
mod measure;
mod memory;
mod races;
mod ring;
mod row;
mod sparse;
mod system;
mod tables;
mod tenant;
mod uses;

use std::process::ExitCode;

/// What a check in a process of its own has to say.
fn said(outcome: &row::Outcome) -> ExitCode {
    println!("{}", outcome.as_ref().unwrap_or_else(|why| why));
    if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// Whether it is a number from 1: no check does nothing and succeeds.
fn number(word: &str) -> bool {
    word.parse().is_ok_and(|number: u64| number > 0)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let failures = match words.as_slice() {
        ["hog", mib] => return child::hog(mib),
        ["tenant", words @ ..] => return child::tenant(words),
        ["sparse", group] => return sparse::child(group),
        ["scribble", seconds] => return said(&checks::scribble(seconds.parse().unwrap_or(1))),
        ["limited"] => return said(&device::limited()),
        ["calls"] => return races::no_system_calls(),
        [form @ ("quick" | "short" | "debug" | "long"), module, swap, disk] => {
            let form = match *form {
                "quick" => checks::Form::Quick,
                "short" => checks::Form::Short,
                "debug" => checks::Form::Debug,
                _ => checks::Form::Long,
            };
            let mut failures = 0;
            checks::run(&mut failures, form, module, [swap, disk]);
            failures
        }
        ["numa"] => {
            let mut failures = 0;
            memory::numa(&mut failures);
            checks::leave(&mut failures);
            failures
        }
        ["cost", module, mib] if number(mib) => {
            let mut failures = 0;
            checks::cost(&mut failures, module, mib.parse().unwrap_or(0));
            failures
        }
        ["races", module, steps] if number(steps) => {
            let mut failures = 0;
            checks::races(&mut failures, module, steps.parse().unwrap_or(0));
            failures
        }
        ["count", module] => {
            let mut failures = 0;
            checks::count(&mut failures, module);
            failures
        }
        ["global", module, times] if number(times) => {
            let mut failures = 0;
            checks::global(&mut failures, module, times.parse().unwrap_or(0));
            failures
        }
        ["behind", module, times] if number(times) => {
            let mut failures = 0;
            checks::behind(&mut failures, module, times.parse().unwrap_or(0));
            failures
        }
        ["many", module] => {
            let mut failures = 0;
            checks::many_large(&mut failures, module);
            failures
        }
        ["tables", module] => {
            let mut failures = 0;
            checks::by_hand(&mut failures, module);
            failures
        }
        ["pressure", module] => {
            let mut failures = 0;
            checks::pressure(&mut failures, module);
            failures
        }
        _ => {
            eprintln!(
                "usage: llfree-module-check quick|short|debug|long MODULE.ko SWAP DISK, races MODULE.ko STEPS, cost MODULE.ko MIB, \
                 count MODULE.ko, pressure MODULE.ko, many MODULE.ko, tables MODULE.ko, \
                 global MODULE.ko TIMES, behind MODULE.ko TIMES, or numa"
            );
            return ExitCode::from(2);
        }
    };
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
