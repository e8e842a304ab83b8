//! What the module promises, checked in a machine that has it: `llfree-module-check quick|short|long MODULE.ko SWAP DISK`.
//!
//! Started by `images/linux/testbed module` as root, in an emulated machine that is there for this. Prints a row a check,
//! and what was measured. Checks that need processes of their own start this program again, as a `tenant` or a `hog`.

mod checks;
mod child;
mod device;
mod measure;
mod memory;
mod races;
mod row;
mod system;
mod tenant;

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
        [form @ ("quick" | "short" | "long"), module, swap, disk] => {
            let form = match *form {
                "quick" => checks::Form::Quick,
                "short" => checks::Form::Short,
                _ => checks::Form::Long,
            };
            let mut failures = 0;
            checks::run(&mut failures, form, module, [swap, disk]);
            failures
        }
        ["numa"] => {
            let mut failures = 0;
            memory::numa(&mut failures);
            failures
        }
        _ => {
            eprintln!("usage: llfree-module-check quick|short|long MODULE.ko SWAP DISK, or numa");
            return ExitCode::from(2);
        }
    };
    if failures == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
