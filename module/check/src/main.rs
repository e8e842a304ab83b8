//! What the module promises, checked in a machine that has it: `llfree-module-check quick|short|debug|long MODULE.ko SWAP
//! DISK`; and parts of it: `races MODULE.ko STEPS`, `cost MODULE.ko MIB`, `count MODULE.ko`, `pressure MODULE.ko`, `many MODULE.ko`,
//! `tables MODULE.ko`, `global MODULE.ko TIMES`, `behind MODULE.ko TIMES`, `headroom MODULE.ko DISK [TIMES]`,
//! `beside MODULE.ko`, `numa`.
//!
//! Started by `images/linux/testbed module` as root, in an emulated machine that is there for this. Prints a row a check,
//! and what was measured. Checks that need processes of their own start this program again, as a `tenant` or a `hog`.

mod checks;
mod child;
mod device;
mod headroom;
mod keeper;
mod log;
mod many;
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

/// What this program is for a check, started again.
fn part(words: &[&str]) -> Option<ExitCode> {
    Some(match words {
        ["hog", mib] => child::hog(mib),
        ["read", path, mib] => child::read(path, mib),
        ["dirty", path, mib, group] => child::dirty(path, mib, group),
        ["tenant", words @ ..] => child::tenant(words),
        ["keeper", directory] => keeper::child(directory),
        ["sparse", group] => sparse::child(group),
        ["many", group] => many::child(group),
        ["scribble", seconds] => said(&checks::scribble(seconds.parse().unwrap_or(1))),
        ["limited"] => said(&device::limited()),
        ["calls"] => races::no_system_calls(),
        _ => return None,
    })
}

/// How many of the checks failed, if these words name any.
fn failures(words: &[&str]) -> Option<u32> {
    let mut failures = 0;
    match words {
        [form @ ("quick" | "short" | "debug" | "long"), module, swap, disk] => {
            let form = match *form {
                "quick" => checks::Form::Quick,
                "short" => checks::Form::Short,
                "debug" => checks::Form::Debug,
                _ => checks::Form::Long,
            };
            checks::run(&mut failures, form, module, [swap, disk]);
        }
        ["numa"] => {
            memory::numa(&mut failures);
            checks::leave(&mut failures);
        }
        ["cost", module, mib] if number(mib) => checks::cost(&mut failures, module, mib.parse().unwrap_or(0)),
        ["races", module, steps] if number(steps) => checks::races(&mut failures, module, steps.parse().unwrap_or(0)),
        ["count", module] => checks::count(&mut failures, module),
        ["global", module, times] if number(times) => checks::global(&mut failures, module, times.parse().unwrap_or(0)),
        ["behind", module, times] if number(times) => checks::behind(&mut failures, module, times.parse().unwrap_or(0)),
        ["many", module] => checks::many_large(&mut failures, module),
        ["tables", module] => checks::by_hand(&mut failures, module),
        ["headroom", module, disk] => checks::headroom_alone(&mut failures, module, disk),
        ["headroom", module, disk, times] if number(times) => {
            checks::headroom_often(&mut failures, module, disk, times.parse().unwrap_or(0));
        }
        ["beside", module] => checks::beside(&mut failures, module),
        ["pressure", module] => checks::pressure(&mut failures, module),
        _ => return None,
    }
    Some(failures)
}

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    if let Some(code) = part(&words) {
        return code;
    }
    match failures(&words) {
        Some(0) => ExitCode::SUCCESS,
        Some(_) => ExitCode::FAILURE,
        None => {
            eprintln!(
                "usage: llfree-module-check quick|short|debug|long MODULE.ko SWAP DISK, races MODULE.ko STEPS, cost MODULE.ko MIB, \
                 count MODULE.ko, pressure MODULE.ko, many MODULE.ko, tables MODULE.ko, \
                 global MODULE.ko TIMES, behind MODULE.ko TIMES, headroom MODULE.ko DISK [TIMES], beside MODULE.ko, or numa"
            );
            ExitCode::from(2)
        }
    }
}
