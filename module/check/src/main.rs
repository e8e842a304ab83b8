//! What the module promises, checked in a machine that has it: `llfree-module-check quick|short|debug|long MODULE.ko SWAP
//! DISK`; and parts of it: `races MODULE.ko STEPS`, `cost MODULE.ko MIB`, `count MODULE.ko`, `numa`.
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
mod row;
mod system;
mod tenant;
mod uses;

use std::process::ExitCode;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let failures = match words.as_slice() {
        ["hog", mib] => return child::hog(mib),
        ["tenant", words @ ..] => return child::tenant(words),
        ["scribble", seconds] => {
            let outcome = checks::scribble(seconds.parse().unwrap_or(1));
            println!("{}", outcome.as_ref().unwrap_or_else(|why| why));
            return if outcome.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE };
        }
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
        ["cost", module, mib] => {
            let mut failures = 0;
            checks::cost(&mut failures, module, mib.parse().unwrap_or(0));
            failures
        }
        ["races", module, steps] => {
            let mut failures = 0;
            checks::races(&mut failures, module, steps.parse().unwrap_or(0));
            failures
        }
        ["count", module] => {
            let mut failures = 0;
            checks::count(&mut failures, module);
            failures
        }
        _ => {
            eprintln!(
                "usage: llfree-module-check quick|short|debug|long MODULE.ko SWAP DISK, races MODULE.ko STEPS, cost MODULE.ko MIB, \
                 count MODULE.ko, or numa"
            );
            return ExitCode::from(2);
        }
    };
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
