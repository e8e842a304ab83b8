//! The command line: one command per figure, its arguments checked and typed.
//!
//! Text in, values out. Arguments that figures share live in structures that several of them
//! flatten; `--help` shows no difference.

use crate::alloc::Selection;
use crate::allocator::Allocator;
use crate::candidates::{self, Candidate};
use crate::frag::Exchange;
use crate::objects::{self, Cell, Op};
use crate::output::{Output, Picture};
use crate::passes::Bench;
use clap::{Args, Parser, Subcommand, ValueEnum};
use cli::workload::parse_time;
use llfree_base::units::{Bytes, parse_duration, parse_memory};
use llfree_monitor::memory::Backing;
use shared_layout::Order;
use std::time::Duration;

/// Measures llfree-vmm against the limits of the machine that it runs on.
#[derive(Parser)]
#[command(name = "llfree-bench", version, max_term_width = 110)]
#[command(after_help = "\
Examples:
  llfree-bench inflate --mem 4G --to 512M          reclaim, return and install, per 2 MiB frame
  llfree-bench inflate --iterations 15 --csv inflate.csv
  llfree-bench inflate --json 2>progress.log >rows.json
  llfree-bench install --plot install.svg          how long an allocation waits for memory, 1 and 2 vCPUs
  llfree-bench interference --json                 how much STREAM and FTQ lose while memory is resized
  llfree-bench boot --mem 16G --json               from the launch to the agent's first answer
  llfree-bench idle --mem 16G                      host CPU time of an idle VM
  llfree-bench alloc --plot alloc.svg              allocators, all orders, over threads
  llfree-bench alloc --benches bulk,repeat --orders 0,9 --allocators llfree --threads 1
  llfree-bench frag --plot frag.svg                huge frames that become free again
  llfree-bench fill --csv fill.csv                 order 0 in nearly full memory
  llfree-bench recovery --mem 8G                   a persistent instance after a crash
  llfree-bench objects --plot objects.svg          large objects of a process, against lgalloc
  llfree-bench areas                               reclaim from another process, against the raw call

Progress goes to standard error: one line redrawn in place on a terminal, one line per candidate in a pipe, none \
with --quiet. Standard output gets only the rows.

Stop everything else that uses the machine's cores: a large spread between min and max means a disturbed row.")]
pub(crate) struct Cli {
    #[command(subcommand)]
    pub(crate) figure: Figure,
    /// Show no progress on standard error
    #[arg(long, short, global = true)]
    pub(crate) quiet: bool,
}

#[derive(Subcommand)]
pub(crate) enum Figure {
    /// Reclaim, return and install memory, against the raw system calls
    #[command(after_help = INFLATE_HELP)]
    Inflate(InflateArgs),
    /// Allocate frames that have no memory yet, alone and while the host reclaims
    Install(InstallArgs),
    /// Run STREAM and FTQ in a guest while its memory shrinks and grows
    Interference(InterferenceArgs),
    /// Boot a guest, against a bare KVM machine
    Boot(BootArgs),
    /// Leave a VM idle, without and with automatic reclaim
    Idle(IdleArgs),
    /// Allocate and free blocks, against other allocators
    #[command(after_help = ALLOC_HELP)]
    Alloc(AllocArgs),
    /// Exchange frames at random and count the free huge frames
    Frag(FragArgs),
    /// Allocate frames in nearly full memory
    Fill(FillArgs),
    /// Open a persistent instance that was closed cleanly, or was not
    Recovery(RecoveryArgs),
    /// Allocate and free large objects in a process, against lgalloc and others
    Objects(ObjectsArgs),
    /// Take memory back from the area of another process, against the raw system call
    Areas(AreasArgs),
}

const INFLATE_HELP: &str = "\
Examples:
  llfree-bench inflate                             one to three minutes
  llfree-bench inflate --candidates llfree,virtio-mem --iterations 15
  llfree-bench inflate --full                      about five minutes longer
  llfree-bench inflate --json | jq '.[] | select(.op == \"return\")'

All times are microseconds per 2 MiB frame: the total divided by the frames that moved. Each row gives their number \
(frames, the median of all rounds) and the number of rounds behind min, median and max. A balloon of 4 KiB pages \
takes some 10 ms per frame, so it gets a smaller guest of the same proportions, at most 112 frames per round, and 3 \
rounds spread over the run.";

#[derive(Args)]
pub(crate) struct InflateArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "2G")]
    pub(crate) mem: Bytes,
    /// The limit that each round shrinks to
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "256M")]
    pub(crate) to: Bytes,
    /// What guest memory is made of: anon, memfd or hugetlb
    #[arg(long, value_name = "KIND", default_value = "anon")]
    pub(crate) backing: Backing,
    /// Ways to take memory and to give it back
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = candidates::PUBLISHED, value_parser = candidates::elastic)]
    pub(crate) candidates: Vec<&'static Candidate>,
    /// Let balloons of 4 KiB pages move as many frames, in as many rounds, as the other candidates
    #[arg(long)]
    pub(crate) full: bool,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args)]
pub(crate) struct InstallArgs {
    /// Guest memory; scaled down, with the sizes below, if the host has less than twice what is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    pub(crate) mem: Bytes,
    /// Memory that the guest allocates and touches in a round
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "1G")]
    pub(crate) burst: Bytes,
    /// Memory that the host takes meanwhile; half of --mem by default, 0 for quiet rounds only
    #[arg(long, value_name = "SIZE")]
    pub(crate) reclaim: Option<Bytes>,
    /// vCPUs to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) cpus: Vec<u32>,
    /// Where memory comes from: populate, no-pool, pool, pool-512M [default: all]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = candidates::install)]
    pub(crate) candidates: Vec<&'static Candidate>,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct InterferenceArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    pub(crate) mem: Bytes,
    /// Total size of STREAM's three arrays; should exceed the caches
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "192M")]
    pub(crate) bytes: Bytes,
    /// Memory that the allocating loads hold between samples
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "64M")]
    pub(crate) beside: Bytes,
    /// Length of a run; each load has two runs per round
    #[arg(long, value_name = "TIME", value_parser = parse_millis, default_value = "2s")]
    pub(crate) time: u64,
    /// Ways to resize
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = candidates::PUBLISHED, value_parser = candidates::elastic)]
    pub(crate) candidates: Vec<&'static Candidate>,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct BootArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G")]
    pub(crate) mem: Bytes,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args)]
pub(crate) struct IdleArgs {
    /// Guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G")]
    pub(crate) mem: Bytes,
    /// Length of a round; the default is two intervals of automatic reclaim
    #[arg(long, value_name = "TIME", value_parser = parse_round, default_value = "10s")]
    pub(crate) time: Duration,
    /// Rounds to measure, after a warm-up round
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = rounds())]
    pub(crate) iterations: u32,
    #[command(flatten)]
    pub(crate) output: Output,
}

const ALLOC_HELP: &str = "\
Examples:
  llfree-bench alloc                               every workload, at one or two sizes
  llfree-bench alloc --full --csv alloc.csv        all sizes up to 1 TiB, all orders, more operations
  llfree-bench alloc --benches mixed,refuse --allocators llfree --threads 1
  llfree-bench alloc --benches bulk --mem 64G      a size of your own for all that is measured
  llfree-bench alloc --benches all --markdown      tables for a document

Workloads (benches), and the sizes of a default run:
  bulk, repeat, random, cross, host     loops over one order, 4 GiB
  mixed-50, -80, -90, -95               all orders at once, with so many percent used, 1 GiB
  worn-95                               the last one after 12 million steps of each thread, 1 GiB
  half-fragmented                       half of memory free, every second frame of the rest used, 8 GiB
  refuse                                out of memory: the first time, again, after a free, 1 and 8 GiB
  shrunk                                the same where a host holds every second huge frame, 8 GiB
  oversubscribed-few, -mixed            2 and 64 threads, whatever the cores, 8 GiB
  replace-50, -90                       frames freed and allocated one by one at random, 8 GiB
  fresh, aged                           single allocations in unused and in half-free memory, 8 GiB
  full-99, -99.9                        frames in nearly full memory, 8 GiB
  epoch                                 the first allocations after the host returned memory, 64 GiB
  cache                                 the allocator's own data in the caches and out of them, 1 and 64 GiB

Times are nanoseconds an operation. Loops are timed as a whole. Ops with a percentile, and the means beside them, are of \
single operations, read from the time stamp counter, without the timer's own time. 'operations' says how many a round \
had: a round that takes too long ends with fewer. Other allocators take part in loops and up to 1 GiB.";

#[derive(Args)]
pub(crate) struct AllocArgs {
    /// Workloads, or families of them like mixed
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "all")]
    pub(crate) benches: Vec<Selection>,
    /// Block sizes: orders like 0,9 or ranges like 0..=10 [default: those of each workload]
    #[arg(long, value_name = "LIST")]
    pub(crate) orders: Option<Orders>,
    /// Threads, each pinned to a core, like 1,2 [default: 1, 2, 4 ... and all cores]
    #[arg(long, value_name = "LIST", value_delimiter = ',', value_parser = clap::value_parser!(u32).range(1..))]
    pub(crate) threads: Vec<u32>,
    /// Memory to manage, none of it touched [default: the sizes of each workload]
    #[arg(long, value_name = "SIZE", value_parser = parse_memory)]
    pub(crate) mem: Option<Bytes>,
    /// All sizes and orders of each workload, and more operations
    #[arg(long)]
    pub(crate) full: bool,
    /// Operations of a thread in a round, where a workload has a number of them [default: 100000 and more]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1_000..=10_000_000))]
    pub(crate) operations: Option<u64>,
    #[command(flatten)]
    pub(crate) compared: Compared,
    /// Rounds to measure, after a warm-up round; workloads that take long to set up have 3 or 5 at most
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = rounds())]
    pub(crate) iterations: u32,
    /// Run the loops of one bench once, untimed and on one thread, for an instruction-counting profiler
    #[arg(long, value_name = "BENCH", value_parser = once_bench, conflicts_with_all = ["benches", "threads", "iterations", "json", "csv", "plot", "full", "operations", "markdown"])]
    pub(crate) once: Option<Bench>,
    /// Print the rows as tables in Markdown
    #[arg(long, conflicts_with = "json")]
    pub(crate) markdown: bool,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct FragArgs {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    pub(crate) mem: Bytes,
    /// Rounds; each exchanges 10 % of the used frames
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = rounds())]
    pub(crate) rounds: u32,
    /// How a round exchanges frames
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "batch,pairs")]
    pub(crate) exchange: Vec<Exchange>,
    /// Allocators to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "llfree,llfree-shared,buddy,bitmap,per-core"
    )]
    pub(crate) allocators: Vec<Allocator>,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct FillArgs {
    #[command(flatten)]
    pub(crate) tables: Tables,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct RecoveryArgs {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "8G")]
    pub(crate) mem: Bytes,
    /// Rounds to measure, after a warm-up round
    #[arg(long, value_name = "N", default_value_t = 100, value_parser = rounds())]
    pub(crate) iterations: u32,
    #[command(flatten)]
    pub(crate) output: Output,
}

#[derive(Args)]
pub(crate) struct ObjectsArgs {
    /// Sizes of an object
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "64K,1M,2M,4M,8M,16M,32M,64M,256M,1G")]
    pub(crate) sizes: Vec<Bytes>,
    /// Threads to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "1,2", value_parser = clap::value_parser!(u32).range(1..=64))]
    pub(crate) threads: Vec<u32>,
    /// What they do
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "pair,pair-touched,batch,batch-touched")]
    pub(crate) ops: Vec<Op>,
    /// Allocators to compare
    #[arg(long, value_name = "LIST", value_delimiter = ',', default_value = "llfree,lgalloc")]
    pub(crate) allocators: Vec<objects::Allocator>,
    /// Seconds after the last free of each, at the end of which one looks at the resident memory once more
    #[arg(long, value_name = "SECONDS", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..=60))]
    pub(crate) settle: u64,
    /// Run one cell in this process: allocator:bytes:threads:op
    #[arg(long, value_name = "CELL", hide = true)]
    pub(crate) once: Option<Cell>,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

#[derive(Args)]
pub(crate) struct AreasArgs {
    /// The size of the area, all of which is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "512M")]
    pub(crate) mem: Bytes,
    /// Be the other process
    #[arg(long, hide = true)]
    pub(crate) tenant: bool,
    #[command(flatten)]
    pub(crate) rounds: Rounds,
    #[command(flatten)]
    pub(crate) output: Output,
    #[command(flatten)]
    pub(crate) picture: Picture,
}

/// The number of times that a figure of a VM is measured.
#[derive(Args)]
pub(crate) struct Rounds {
    /// Rounds to measure, after a warm-up round
    #[arg(long, value_name = "N", default_value_t = 7, value_parser = rounds())]
    pub(crate) iterations: u32,
}

/// Arguments of figures that compare allocators alone.
#[derive(Args)]
pub(crate) struct Tables {
    /// Memory to manage; none of it is touched
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "4G")]
    pub(crate) mem: Bytes,
    #[command(flatten)]
    pub(crate) compared: Compared,
    /// Rounds to measure, after a warm-up round
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = rounds())]
    pub(crate) iterations: u32,
}

/// What is compared.
#[derive(Args)]
pub(crate) struct Compared {
    /// Allocators to compare
    #[arg(
        long,
        value_name = "LIST",
        value_delimiter = ',',
        default_value = "llfree,llfree-shared,buddy,per-core,queue,bitmap"
    )]
    pub(crate) allocators: Vec<Allocator>,
}

fn rounds() -> clap::builder::RangedI64ValueParser<u32> {
    clap::value_parser!(u32).range(1..=1000)
}

fn parse_millis(text: &str) -> Result<u64, cli::workload::WorkloadError> {
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
pub(crate) struct Orders(pub(crate) Vec<Order>);

impl std::str::FromStr for Orders {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let order = |text: &str| {
            let order = text.trim().parse().ok().and_then(Order::new);
            order.ok_or_else(|| format!("'{text}' is not an order; orders are 0 to {}", Order::MAX.get()))
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

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use cli::args::Exit;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    /// A promise or a figure names the command that measures it.
    #[test]
    fn commands_on_the_pages_are_understood() {
        let top = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
        for (page, least) in [("SPECIFICATION.md", 5), ("README.md", 8), ("docs/benchmarks.md", 10)] {
            let text = std::fs::read_to_string(top.join(page)).expect("the page is there");
            // `reference` is the name of what a reader adds.
            let code = text.split('`').filter(|code| code.starts_with("llfree-bench ") && !code.contains("reference"));
            let commands: Vec<_> = code.map(|code| code.split_whitespace().collect::<Vec<_>>()).collect();
            assert!(commands.len() >= least, "only {} commands on {page}", commands.len());
            for command in commands {
                if let Err(error) = Cli::try_parse_from(&command) {
                    panic!("{page}: {}: {error}", command.join(" "));
                }
            }
        }
    }

    #[test]
    fn a_bad_value_costs_one_line() {
        for (line, word) in [
            ("inflate --mem 3M", "not a multiple of 2 MiB"),
            ("inflate --iterations 0", "1..=1000"),
            ("inflate --candidates tape", "tape"),
            ("alloc --benches mix", "no workload"),
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
        assert_eq!(orders("11").expect_err("too large"), "'11' is not an order; orders are 0 to 10");
        assert!(orders("3..=1").expect_err("empty").contains("3..=1"));
        assert!(orders("").is_err());
    }
}
