//! `llfree-bench`: the project's figures, one module each.
//!
//! Every figure is measured against a limit or a baseline in the same run, after a warm-up round,
//! the candidates taking turns: absolute times differ between machines and from minute to minute,
//! their ratios hardly. A module yields [`series::Row`]s; this file parses the command line and writes
//! them as a table, JSON or CSV.

mod boot;
mod inflate;
mod series;

use clap::{Args, Parser, Subcommand};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use vmm::memory::Backing;
use vmm::units::{Bytes, parse_memory};

/// Measures llfree-vmm against the limits of the machine it runs on.
#[derive(Parser)]
#[command(name = "llfree-bench", version, max_term_width = 110)]
#[command(after_help = "\
Examples:
  llfree-bench inflate --mem 4G --to 512M          reclaim, return and install, per 2 MiB frame
  llfree-bench inflate --iterations 15 --csv inflate.csv
  llfree-bench boot --mem 16G --json               from the launch to the agent's first answer

Close what else uses the machine's cores: rows with a large spread between min and max were disturbed.")]
struct Cli {
    #[command(subcommand)]
    figure: Figure,
}

#[derive(Subcommand)]
enum Figure {
    /// Reclaim, return and install memory, against the raw system calls
    Inflate(InflateArgs),
    /// Boot a guest, against a bare KVM machine
    Boot(BootArgs),
}

#[derive(Args)]
struct InflateArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    mem: Bytes,
    /// The limit that it is shrunk to, again and again
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "512M")]
    to: Bytes,
    /// What guest memory is made of: anon, memfd or hugetlb
    #[arg(long, value_name = "KIND", default_value = "anon")]
    backing: Backing,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct BootArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G")]
    mem: Bytes,
    #[command(flatten)]
    common: Common,
}

#[derive(Args)]
struct Common {
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=1000))]
    iterations: u32,
    /// Print one JSON array of rows
    #[arg(long)]
    json: bool,
    /// Also write the rows to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

/// Why there is no figure.
#[derive(Debug, thiserror::Error)]
enum BenchError {
    #[error(transparent)]
    Launch(#[from] vmm::vm::LaunchError),
    #[error(transparent)]
    Vm(#[from] vmm::vm::VmError),
    #[error(transparent)]
    Memory(#[from] vmm::memory::MemoryError),
    #[error(transparent)]
    Host(#[from] vmm::boot::BootError),
    #[error("{0}")]
    Size(String),
    #[error("the guest did not do its part: {0}")]
    Guest(String),
    #[error("KVM could not {step}")]
    Kvm { step: &'static str, source: kvm_ioctls::Error },
    #[error("cannot write {path}")]
    Csv { path: String, source: csv::Error },
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let _ = error.print();
            return ExitCode::from(u8::from(error.use_stderr()));
        }
    };
    match run(&cli) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "llfree-bench: error: {}", vmm::error_line(&error));
            ExitCode::FAILURE
        }
    }
}

fn run(cli: &Cli) -> Result<(), BenchError> {
    let common = match &cli.figure {
        Figure::Inflate(args) => &args.common,
        Figure::Boot(args) => &args.common,
    };
    // A file that cannot be written should not cost minutes of measuring first.
    let csv = common.csv.as_ref().map(|path| {
        let in_file =
            |error: std::io::Error| BenchError::Csv { path: path.display().to_string(), source: error.into() };
        File::create(path).map_err(in_file)
    });
    let csv = csv.transpose()?;
    let rows = match &cli.figure {
        Figure::Inflate(args) => inflate::run(args.mem, args.to, args.backing, common.iterations)?,
        Figure::Boot(args) => boot::run(args.mem, common.iterations)?,
    };
    if let (Some(file), Some(path)) = (csv, &common.csv) {
        series::write_csv(&rows, file)
            .map_err(|source| BenchError::Csv { path: path.display().to_string(), source })?;
    }
    let text = if common.json {
        serde_json::to_string_pretty(&rows).map_err(std::io::Error::from)? + "\n"
    } else {
        series::table(&rows)
    };
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() == std::io::ErrorKind::BrokenPipe => Ok(()),
        other => Ok(other?),
    }
}

/// A line of progress on a terminal; nothing in a pipe.
fn progress(round: u32, rounds: u32, what: &str) {
    let mut stderr = std::io::stderr();
    if stderr.is_terminal() {
        let _ = if round < rounds {
            write!(stderr, "\r\x1b[Kround {round} of {}: {what}", rounds - 1)
        } else {
            write!(stderr, "\r\x1b[K")
        };
        let _ = stderr.flush();
    }
}
