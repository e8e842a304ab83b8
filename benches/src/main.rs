//! `llfree-bench`: the project's figures, one module each.
//!
//! Every figure is measured against a limit or a baseline in the same run, after a warm-up round,
//! the candidates taking turns: absolute times differ between machines and from minute to minute,
//! their ratios hardly. A module yields rows of its own; this file parses the command line and writes
//! them as a table, JSON, CSV or a picture.

mod alloc;
mod boot;
mod candidates;
mod crew;
mod fill;
mod frag;
mod frames;
mod guest;
mod idle;
mod inflate;
mod install;
mod interference;
mod mover;
mod passes;
mod plot;
mod recovery;
mod series;
mod tables;

#[cfg(test)]
#[path = "../../vmm/tests/common/skipped.rs"]
mod skipped;

use candidates::Candidate;
use clap::{Args, Parser, Subcommand, ValueEnum};
use frag::Exchange;
use frames::Allocator;
use passes::Bench;
use plot::Panel;
use series::Table;
use shared_layout::{HUGE_SIZE, Order};
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;
use vmm::cli::Exit;
use vmm::memory::Backing;
use vmm::units::{Bytes, parse_duration, parse_memory};
use vmm::workload::parse_time;

/// Measures llfree-vmm against the limits of the machine it runs on.
#[derive(Parser)]
#[command(name = "llfree-bench", version, max_term_width = 110)]
#[command(after_help = "\
Examples:
  llfree-bench inflate --mem 4G --to 512M          reclaim, return and install, per 2 MiB frame
  llfree-bench inflate --iterations 15 --csv inflate.csv
  llfree-bench install --plot install.svg          what an allocation waits for memory, 1 and 2 vCPUs
  llfree-bench interference --json                 what STREAM and FTQ lose while memory is resized
  llfree-bench boot --mem 16G --json               from the launch to the agent's first answer
  llfree-bench idle --mem 16G                      host CPU of a VM that does nothing
  llfree-bench alloc --plot alloc.svg              allocators, all orders, over threads
  llfree-bench alloc --benches bulk,repeat --orders 0,9 --allocators llfree --threads 1
  llfree-bench frag --plot frag.svg                huge frames that come back
  llfree-bench fill --csv fill.csv                 order 0 in almost full memory
  llfree-bench recovery --mem 8G                   a persistent instance after a crash

Close what else uses the machine's cores: rows with a large spread between min and max were disturbed.")]
struct Cli {
    #[command(subcommand)]
    figure: Figure,
}

#[derive(Subcommand)]
enum Figure {
    /// Reclaim, return and install memory, against the raw system calls
    Inflate(InflateArgs),
    /// Allocate frames that have no memory yet, quiet and while the host reclaims
    Install(InstallArgs),
    /// Run STREAM and FTQ in a guest while its memory shrinks and grows
    Interference(InterferenceArgs),
    /// Boot a guest, against a bare KVM machine
    Boot(BootArgs),
    /// Let a VM idle, without and with automatic reclaim
    Idle(IdleArgs),
    /// Allocate and free blocks, against other allocators
    Alloc(AllocArgs),
    /// Exchange frames at random and count the free huge frames
    Frag(FragArgs),
    /// Allocate frames in almost full memory
    Fill(FillArgs),
    /// Open a persistent instance that was closed, or was not
    Recovery(RecoveryArgs),
}

#[derive(Args)]
struct InflateArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "2G")]
    mem: Bytes,
    /// The limit that it is shrunk to, again and again
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "256M")]
    to: Bytes,
    /// What guest memory is made of: anon, memfd or hugetlb
    #[arg(long, value_name = "KIND", default_value = "anon")]
    backing: Backing,
    /// Ways to take memory and to give it back
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "llfree,balloon,balloon-huge,virtio-mem", value_parser = candidates::elastic)]
    candidates: Vec<&'static Candidate>,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct InstallArgs {
    /// Guest memory; less, with what follows, where the host has less than twice of what is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    mem: Bytes,
    /// What the guest allocates and touches in a round
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "1G")]
    burst: Bytes,
    /// What the host takes meanwhile; half of --mem by default, 0 for quiet rounds only
    #[arg(long, value_name = "SIZE")]
    reclaim: Option<Bytes>,
    /// vCPUs to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..))]
    cpus: Vec<u32>,
    /// Where memory comes from: populate, no-pool, pool, pool-512M [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = candidates::install)]
    candidates: Vec<&'static Candidate>,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    picture: Picture,
}

#[derive(Args)]
struct InterferenceArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    mem: Bytes,
    /// STREAM's three arrays together; more than caches hold
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "192M")]
    bytes: Bytes,
    /// What the loads that allocate hold between two samples
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "64M")]
    beside: Bytes,
    /// Length of a run; each load has two of them a round
    #[arg(long, value_name = "TIME", value_parser = parse_millis, default_value = "2s")]
    time: u64,
    /// Ways to resize
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "llfree,balloon,balloon-huge,virtio-mem", value_parser = candidates::elastic)]
    candidates: Vec<&'static Candidate>,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    picture: Picture,
}

#[derive(Args)]
struct BootArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G")]
    mem: Bytes,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct IdleArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G")]
    mem: Bytes,
    /// How long a round lasts; by default two intervals of automatic reclaim
    #[arg(long, value_name = "TIME", value_parser = parse_round, default_value = "10s")]
    time: Duration,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct AllocArgs {
    /// What the threads do
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "bulk,repeat,random,cross,host")]
    benches: Vec<Bench>,
    /// Block sizes: orders like 0,9 or ranges like 0..=10
    #[arg(long, value_name = "LIST", default_value = "0..=10")]
    orders: Orders,
    /// Threads, each pinned to a core, like 1,2 [default: 1, 2, 4 ... and all cores]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    threads: Vec<u32>,
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    mem: Bytes,
    /// Allocators to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "llfree,llfree-shared,buddy,per-core,queue,bitmap"
    )]
    allocators: Vec<Allocator>,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = rounds())]
    iterations: u32,
    /// Run the loops of one bench once, on one thread and untimed, for an instruction-counting profiler
    #[arg(long, value_name = "BENCH", value_parser = once_bench, conflicts_with_all = ["benches", "threads", "iterations", "json", "csv", "plot"])]
    once: Option<Bench>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    picture: Picture,
}

#[derive(Args)]
struct FragArgs {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    mem: Bytes,
    /// Rounds, each exchanging 10 % of the used frames
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = rounds())]
    rounds: u32,
    /// How a round exchanges frames
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "batch,pairs")]
    exchange: Vec<Exchange>,
    /// Allocators to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "llfree,llfree-shared,buddy,bitmap,per-core"
    )]
    allocators: Vec<Allocator>,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    picture: Picture,
}

#[derive(Args)]
struct FillArgs {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    mem: Bytes,
    /// Allocators to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "llfree,llfree-shared,buddy,per-core,queue,bitmap"
    )]
    allocators: Vec<Allocator>,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
    #[command(flatten)]
    picture: Picture,
}

#[derive(Args)]
struct RecoveryArgs {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    mem: Bytes,
    /// Rounds to measure, after one to warm up
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = rounds())]
    iterations: u32,
    #[command(flatten)]
    output: Output,
}

#[derive(Args)]
struct Output {
    /// Print one JSON array of rows
    #[arg(long)]
    json: bool,
    /// Also write the rows to this file
    #[arg(long, value_name = "FILE")]
    csv: Option<PathBuf>,
}

#[derive(Args)]
struct Picture {
    /// Also draw the rows into this file
    #[arg(long, value_name = "FILE.svg")]
    plot: Option<PathBuf>,
}

fn rounds() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1000)
}

fn parse_millis(text: &str) -> Result<u64, vmm::workload::WorkloadError> {
    parse_time("--time", text)
}

fn parse_round(text: &str) -> Result<Duration, String> {
    let time = parse_duration(text).map_err(|error| error.to_string())?;
    if time < Duration::from_secs(1) { Err("a round lasts at least 1s".to_owned()) } else { Ok(time) }
}

fn once_bench(text: &str) -> Result<Bench, String> {
    let bench = Bench::from_str(text, false).ok().filter(|bench| *bench != Bench::Host);
    bench.ok_or_else(|| "use bulk, repeat, random or cross".to_owned())
}

/// Orders as on the command line: `0..=10`, or `0,6,9`, or both mixed.
#[derive(Clone, PartialEq, Debug)]
struct Orders(Vec<Order>);

impl std::str::FromStr for Orders {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let order = |text: &str| {
            let order = text.trim().parse().ok().and_then(Order::new);
            order.ok_or_else(|| format!("'{text}' is no order; orders are 0 to {}", Order::MAX.get()))
        };
        let mut orders = Vec::new();
        for part in text.split(',') {
            let (first, last) = part.split_once("..=").unwrap_or((part, part));
            let (first, last) = (order(first)?, order(last)?);
            if first > last {
                return Err(format!("'{part}' is empty; write the smaller order first"));
            }
            orders.extend((first.get()..=last.get()).filter_map(Order::new));
        }
        orders.sort_unstable();
        orders.dedup();
        Ok(Self(orders))
    }
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
    File { path: String, source: csv::Error },
    #[error("cannot pin a thread to a core")]
    Cores(#[source] std::io::Error),
    #[error("--threads {threads} needs a core for each, and this process may use {cores}")]
    Threads { threads: u32, cores: usize },
    #[error("--mem has {huge_frames} huge frames, too few for these orders on {threads} threads; use at least {}", Bytes(least * HUGE_SIZE))]
    TooSmall { huge_frames: u32, threads: u32, least: u64 },
    #[error(transparent)]
    Exhausted(#[from] Exhausted),
    #[error("cannot draw: {0}")]
    Plot(String),
    #[error("cannot write the output")]
    Output(#[from] std::io::Error),
}

/// An allocator found no block although memory was free, or did not take one back.
#[derive(Debug, thiserror::Error)]
#[error("an allocation or a free of order {order} failed in {bench} although memory was left")]
struct Exhausted {
    bench: &'static str,
    order: u8,
}

fn main() -> ExitCode {
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or("warn")).init();
    let cli = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => {
            let exit = Exit::of("llfree-bench", &error);
            let _ = if exit.code == 0 {
                std::io::stdout().write_all(exit.text.as_bytes())
            } else {
                std::io::stderr().write_all(exit.text.as_bytes())
            };
            return ExitCode::from(exit.code);
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
    match &cli.figure {
        Figure::Inflate(args) => {
            let files = Files::open(&args.output, None)?;
            let plan = inflate::Plan {
                candidates: args.candidates.clone(),
                mem: args.mem,
                to: args.to,
                backing: args.backing,
                iterations: args.iterations,
            };
            let rows = inflate::run(&plan)?;
            files.write(&rows, &args.output)
        }
        Figure::Install(args) => run_install(args),
        Figure::Interference(args) => {
            let plan = interference::Plan {
                candidates: args.candidates.clone(),
                mem: args.mem.0,
                bytes: args.bytes.0,
                beside: args.beside.0,
                millis: args.time,
                iterations: args.iterations,
            };
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = interference::run(&plan)?;
            files.draw("A guest's pace while its memory is resized", &interference::panels(&rows))?;
            files.write(&rows, &args.output)
        }
        Figure::Boot(args) => {
            let files = Files::open(&args.output, None)?;
            files.write(&boot::run(args.mem, args.iterations)?, &args.output)
        }
        Figure::Idle(args) => {
            let files = Files::open(&args.output, None)?;
            files.write(&idle::run(args.mem, args.time, args.iterations)?, &args.output)
        }
        Figure::Alloc(args) => run_alloc(args),
        Figure::Frag(args) => {
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = frag::run(&args.allocators, &args.exchange, huge_frames(args.mem)?, args.rounds)?;
            files
                .draw("Free huge frames while 10 % of the frames are exchanged in each round", &frag::panels(&rows))?;
            files.write(&rows, &args.output)
        }
        Figure::Fill(args) => {
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = fill::run(&args.allocators, huge_frames(args.mem)?, args.iterations, &crew::cores()?)?;
            files.draw("Order 0 in almost full memory, median", &fill::panels(&rows))?;
            files.write(&rows, &args.output)
        }
        Figure::Recovery(args) => {
            let files = Files::open(&args.output, None)?;
            files.write(&recovery::run(args.mem, args.iterations)?, &args.output)
        }
    }
}

fn run_install(args: &InstallArgs) -> Result<(), BenchError> {
    let candidates =
        if args.candidates.is_empty() { candidates::INSTALL.iter().collect() } else { args.candidates.clone() };
    let mem = args.mem.0 / 2 / HUGE_SIZE * HUGE_SIZE;
    let plan = install::Plan {
        candidates,
        cpus: args.cpus.clone(),
        mem: args.mem.0,
        burst: args.burst.0,
        reclaim: args.reclaim.map_or(mem, |bytes| bytes.0 / HUGE_SIZE * HUGE_SIZE),
        iterations: args.iterations,
    };
    let plan = plan.fitted(available_bytes()?)?;
    if plan.mem != args.mem.0 {
        log::warn!("the host has too little free memory for --mem {}: measuring with {}", args.mem, Bytes(plan.mem));
    }
    let files = Files::open(&args.output, Some(&args.picture))?;
    let rows = install::run(&plan)?;
    let title = format!("Allocations of 2 MiB frames without memory, {} in a row", Bytes(plan.burst));
    files.draw(&title, &install::panels(&rows))?;
    files.write(&rows, &args.output)
}

/// Memory that the host could give without swapping.
fn available_bytes() -> Result<u64, BenchError> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let kib = line.and_then(|line| line.split_whitespace().next()?.parse::<u64>().ok());
    kib.map(|kib| kib * 1024).ok_or_else(|| std::io::Error::other("/proc/meminfo has no MemAvailable").into())
}

fn run_alloc(args: &AllocArgs) -> Result<(), BenchError> {
    let cores = crew::cores()?;
    let mut threads = args.threads.clone();
    threads.sort_unstable();
    threads.dedup();
    if threads.is_empty() {
        let all = cores.len() as u32;
        threads = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < all).chain([all]).collect();
    }
    let plan = alloc::Plan {
        benches: args.benches.clone(),
        orders: args.orders.0.clone(),
        threads,
        allocators: args.allocators.clone(),
        huge_frames: huge_frames(args.mem)?,
        iterations: args.iterations,
        cores,
    };
    if let Some(bench) = args.once {
        return print(&alloc::once(&plan, bench)?);
    }
    let files = Files::open(&args.output, Some(&args.picture))?;
    let rows = alloc::run(&plan)?;
    files.draw(&format!("Nanoseconds an operation, {} of frames, median", args.mem), &alloc::panels(&rows))?;
    files.write(&rows, &args.output)
}

fn huge_frames(mem: Bytes) -> Result<u32, BenchError> {
    frames::huge_frames(mem.0)
        .ok_or_else(|| BenchError::Size(format!("--mem {mem} has more huge frames than can be counted")))
}

/// What is written besides the standard output. Opened before the first round: a file that cannot be
/// written should not cost minutes of measuring first.
struct Files {
    csv: Option<(File, String)>,
    plot: Option<(File, String)>,
}

impl Files {
    fn open(output: &Output, picture: Option<&Picture>) -> Result<Self, BenchError> {
        let create = |path: Option<&PathBuf>| {
            path.map(|path| {
                let name = path.display().to_string();
                let file = File::create(path);
                file.map_err(|error| BenchError::File { path: name.clone(), source: error.into() })
                    .map(|file| (file, name))
            })
            .transpose()
        };
        Ok(Self { csv: create(output.csv.as_ref())?, plot: create(picture.and_then(|picture| picture.plot.as_ref()))? })
    }

    fn draw(&self, title: &str, panels: &[Panel]) -> Result<(), BenchError> {
        let Some((file, path)) = &self.plot else { return Ok(()) };
        let svg = plot::draw(title, panels, 3).map_err(|error| BenchError::Plot(error.to_string()))?;
        let mut file = file;
        file.write_all(svg.as_bytes()).map_err(|error| BenchError::File { path: path.clone(), source: error.into() })
    }

    fn write<R: Table>(self, rows: &[R], output: &Output) -> Result<(), BenchError> {
        if let Some((file, path)) = self.csv {
            series::write_csv(rows, file).map_err(|source| BenchError::File { path, source })?;
        }
        if output.json {
            print(&(serde_json::to_string_pretty(rows).map_err(std::io::Error::from)? + "\n"))
        } else {
            print(&R::table(rows))
        }
    }
}

fn print(text: &str) -> Result<(), BenchError> {
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bad_value_costs_one_line() {
        for (line, word) in [
            ("inflate --mem 3M", "no multiple of 2 MiB"),
            ("inflate --iterations 0", "1..=1000"),
            ("inflate --candidates tape", "tape"),
            ("alloc --orders 11", "orders are 0 to 10"),
            ("alloc --allocators heap", "heap"),
            ("frobnicate", "frobnicate"),
            ("", "a command is missing"),
        ] {
            let args = std::iter::once("llfree-bench").chain(line.split_whitespace());
            let Err(error) = Cli::try_parse_from(args) else { panic!("{line}: accepted") };
            let exit = Exit::of("llfree-bench", &error);
            assert!(exit.code == 1 && exit.text.contains(word), "{line}: {}", exit.text);
            assert_eq!(exit.text.lines().count(), 1, "{line}: {}", exit.text);
        }
    }

    #[test]
    fn orders_are_lists_and_ranges() {
        let orders = |text: &str| {
            let parsed: Result<Orders, _> = text.parse();
            parsed.map(|orders| orders.0.iter().map(|order| order.get()).collect::<Vec<_>>())
        };
        assert_eq!(orders("9,0..=2,1"), Ok(vec![0, 1, 2, 9]));
        assert_eq!(orders("11").expect_err("too large"), "'11' is no order; orders are 0 to 10");
        assert!(orders("3..=1").expect_err("empty").contains("3..=1"));
        assert!(orders("").is_err());
    }
}
