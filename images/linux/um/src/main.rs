//! Starts a User Mode Linux that shares its free memory, is its host, and checks what such a kernel promises: at native
//! speed, on any machine. `--help` says how it is called; images/linux/build makes what it starts.

mod checks;
mod guest;
mod host;
mod plan;
mod table;

use plan::{Fault, Plan};
use std::path::PathBuf;
use std::process::ExitCode;

const HELP: &str = "\
Starts a User Mode Linux that shares its free memory, and checks what it promises.

usage: llfree-um [OPTIONS] KERNEL INITRD

  --mem MIB        memory of the guest (default 1024, at least 512)
  --rounds N       rounds of shrink, grow and reclaim under load (default 20)
  --project DIR    a C project with a Makefile that makes and cleans, built in the guest with the compiler of this machine
  --help           this text

KERNEL, INITRD: linux and initrd.img of images/linux/build --kernel um-6.1

exit status: 0 all checks passed, 1 some did not or it cannot be started, 2 wrong usage
";

fn parse(mut arguments: impl Iterator<Item = String>) -> Result<Option<Plan>, Fault> {
    let (mut mem_mib, mut rounds, mut project, mut files) = (1024, 20, None, Vec::new());
    while let Some(argument) = arguments.next() {
        let mut value = || arguments.next().ok_or_else(|| format!("{argument} needs a value"));
        match argument.as_str() {
            "--help" | "-h" => return Ok(None),
            "--mem" => mem_mib = value()?.parse()?,
            "--rounds" => rounds = value()?.parse()?,
            "--project" => project = Some(PathBuf::from(value()?).canonicalize()?),
            option if option.starts_with('-') => return Err(format!("unknown option '{option}'").into()),
            file => files.push(PathBuf::from(file).canonicalize().map_err(|error| format!("{file}: {error}"))?),
        }
    }
    if mem_mib < 512 || mem_mib % 2 != 0 {
        return Err("--mem needs an even number, at least 512".into());
    }
    let [kernel, initrd] = <[PathBuf; 2]>::try_from(files).map_err(|_| "it takes a kernel and an initrd")?;
    Ok(Some(Plan { kernel, initrd, mem_mib, rounds, project }))
}

fn main() -> ExitCode {
    let plan = match parse(std::env::args().skip(1)) {
        Ok(Some(plan)) => plan,
        Ok(None) => {
            print!("{HELP}");
            return ExitCode::SUCCESS;
        }
        Err(fault) => {
            eprintln!("llfree-um: {fault}; see --help");
            return ExitCode::from(2);
        }
    };
    match checks::run(&plan) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(fault) => {
            eprintln!("llfree-um: {fault}");
            ExitCode::FAILURE
        }
    }
}
