//! `llfree-bench`: the project's figures, one module each.
//!
//! Every figure is measured against a limit or a baseline in the same run, after a warm-up round,
//! the candidates taking turns: absolute times differ between machines and from minute to minute,
//! their ratios hardly. A module yields rows of its own; `args` reads the command line, `output` writes
//! them, and this file leads from the one to the other.

mod alloc;
mod allocator;
mod areas;
mod args;
mod baselines;
mod boot;
mod candidates;
mod crew;
mod error;
mod fill;
mod frag;
mod frames;
mod guest;
mod idle;
mod inflate;
mod install;
mod interference;
mod interrupt;
mod latency;
mod loads;
mod measured;
mod mover;
mod objects;
mod output;
mod passes;
mod plot;
mod progress;
mod recovery;
mod room;
mod series;
mod tables;
mod turns;

use alloc::Selection;
use args::{AllocArgs, Cli, Figure, InstallArgs, ObjectsArgs};
use clap::Parser;
use cli::args::Exit;
use error::{BenchError, SizeError};
use llfree_base::memory_room::Room;
use llfree_base::panics;
use llfree_base::units::Bytes;
use output::Files;
use progress::Show;
use shared_layout::HUGE_SIZE;
use std::io::Write;
use std::process::ExitCode;

fn main() -> ExitCode {
    panics::end_the_process();
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
    match interrupt::watch().map_err(BenchError::from).and_then(|()| run(&cli)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let _ = writeln!(std::io::stderr(), "llfree-bench: error: {}", llfree_base::error_line(&error));
            if matches!(error, BenchError::Interrupted) { ExitCode::from(interrupt::EXIT) } else { ExitCode::FAILURE }
        }
    }
}

fn run(cli: &Cli) -> Result<(), BenchError> {
    let show = if cli.quiet { Show::Nothing } else { Show::Progress };
    match &cli.figure {
        Figure::Inflate(args) => {
            let files = Files::open(&args.output, None)?;
            let plan = inflate::Plan {
                candidates: args.candidates.clone(),
                mem: args.mem,
                to: args.to,
                backing: args.backing,
                iterations: args.rounds.iterations,
                pages: if args.full { inflate::Allowance::ALL } else { inflate::Allowance::PAGES },
            };
            files.publish_rows(inflate::run(&plan, show)?, &args.output)
        }
        Figure::Install(args) => run_install(args, show),
        Figure::Interference(args) => {
            let plan = interference::Plan {
                candidates: args.candidates.clone(),
                mem: args.mem.0,
                bytes: args.bytes.0,
                beside: args.beside.0,
                millis: args.time,
                iterations: args.rounds.iterations,
            };
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = interference::run(&plan, show)?;
            files.publish(rows, &args.output, |rows| {
                ("A guest's pace while its memory is resized".to_owned(), interference::panels(rows))
            })
        }
        Figure::Boot(args) => {
            let files = Files::open(&args.output, None)?;
            files.publish_rows(boot::run(args.mem, args.rounds.iterations, show)?, &args.output)
        }
        Figure::Idle(args) => {
            let files = Files::open(&args.output, None)?;
            files.publish_rows(idle::run(args.mem, args.time, args.iterations, show)?, &args.output)
        }
        Figure::Alloc(args) => run_alloc(args, show),
        Figure::Frag(args) => {
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = frag::run(&args.allocators, &args.exchange, huge_frames(args.mem)?, args.rounds, show)?;
            files.publish(rows, &args.output, |rows| {
                let title = "Free huge frames while 10 % of the frames are exchanged in each round";
                (title.to_owned(), frag::panels(rows))
            })
        }
        Figure::Fill(args) => {
            let files = Files::open(&args.output, Some(&args.picture))?;
            let rows = fill::run(
                &args.tables.compared.allocators,
                huge_frames(args.tables.mem)?,
                args.tables.iterations,
                &crew::cores()?,
                show,
            )?;
            files.publish(rows, &args.output, |rows| {
                ("Order 0 in almost full memory, median".to_owned(), fill::panels(rows))
            })
        }
        Figure::Recovery(args) => {
            let files = Files::open(&args.output, None)?;
            room::check(room::of_regions(args.mem))?;
            files.publish_rows(recovery::run(args.mem, args.iterations, show)?, &args.output)
        }
        Figure::Objects(args) => run_objects(args, show),
        Figure::Areas(args) if args.tenant => areas::tenant(args.mem),
        Figure::Areas(args) => {
            let files = Files::open(&args.output, Some(&args.picture))?;
            // The tenant's, and another one here.
            room::check(args.mem.0.saturating_mul(2))?;
            let rows = areas::run(args.mem, args.rounds.iterations, show)?;
            files.publish(rows, &args.output, |rows| ("Areas, median".to_owned(), areas::panels(rows)))
        }
    }
}

fn run_install(args: &InstallArgs, show: Show) -> Result<(), BenchError> {
    let candidates =
        if args.candidates.is_empty() { candidates::INSTALL.iter().collect() } else { args.candidates.clone() };
    let mem = args.mem.0 / 2 / HUGE_SIZE * HUGE_SIZE;
    let plan = install::Plan {
        candidates,
        cpus: args.cpus.clone(),
        mem: args.mem.0,
        burst: args.burst.0,
        reclaim: args.reclaim.map_or(mem, |bytes| bytes.0 / HUGE_SIZE * HUGE_SIZE),
        iterations: args.rounds.iterations,
    };
    let room = Room::now()?;
    let plan = plan.fitted(room.available)?;
    if plan.mem != args.mem.0 {
        let (available, less) = (Bytes(room.available), Bytes(plan.mem));
        log::warn!(
            "{} has {available} available, too little for --mem {}: measuring with {less}",
            room.available_in,
            args.mem
        );
    }
    let files = Files::open(&args.output, Some(&args.picture))?;
    let rows = install::run(&plan, show)?;
    let title = format!("Allocations of 2 MiB frames without memory, {} in a row", Bytes(plan.burst));
    files.publish(rows, &args.output, |rows| (title, install::panels(rows)))
}

fn run_alloc(args: &AllocArgs, show: Show) -> Result<(), BenchError> {
    let cores = crew::cores()?;
    let mut threads = args.threads.clone();
    threads.sort_unstable();
    threads.dedup();
    if threads.is_empty() {
        let all = cores.len() as u32;
        threads = std::iter::successors(Some(1), |n| Some(n * 2)).take_while(|n| *n < all).chain([all]).collect();
    }
    let plan = alloc::Plan {
        entries: Selection::join(&args.benches),
        orders: args.orders.as_ref().map(|orders| orders.0.clone()),
        threads,
        allocators: args.compared.allocators.clone(),
        huge_frames: args.mem.map(huge_frames).transpose()?,
        full: args.full,
        operations: args.operations,
        iterations: args.iterations,
        cores,
    };
    if let Some(bench) = args.once {
        let huge_frames = huge_frames(args.mem.unwrap_or(Bytes(4 << 30)))?;
        let plan = alloc::Plan { entries: Vec::new(), huge_frames: Some(huge_frames), ..plan };
        return output::print(alloc::once(&plan, bench, huge_frames)?.as_bytes());
    }
    let files = Files::open(&args.output, Some(&args.picture))?;
    let rows = alloc::run(&plan, show)?;
    let markdown = args.markdown.then_some(alloc::markdown as fn(&[alloc::Row]) -> String);
    files.publish_as(rows, &args.output, markdown, |rows| {
        ("Nanoseconds an operation, median".to_owned(), alloc::panels(rows))
    })
}

fn run_objects(args: &ObjectsArgs, show: Show) -> Result<(), BenchError> {
    if let Some(cell) = &args.once {
        return output::print(objects::once(cell)?.as_bytes());
    }
    // What a batch or the steady loop touches at once, or a few of the largest.
    let largest = args.sizes.iter().map(|size| size.0).max().unwrap_or(0);
    room::check(largest.saturating_mul(4).max(1 << 30))?;
    let plan = objects::Plan {
        allocators: args.allocators.clone(),
        sizes: args.sizes.clone(),
        threads: args.threads.clone(),
        ops: args.ops.clone(),
        iterations: args.rounds.iterations,
        settle: args.settle,
    };
    let files = Files::open(&args.output, Some(&args.picture))?;
    let rows = objects::run(&plan, show)?;
    files.publish(rows, &args.output, |rows| ("Large objects, median".to_owned(), objects::panels(rows)))
}

/// The frames of tables that fit into the host's memory.
fn huge_frames(mem: Bytes) -> Result<u32, BenchError> {
    room::check(room::of_tables(mem))?;
    frames::huge_frames(mem.0).ok_or(BenchError::Size(SizeError::TooManyFrames(mem)))
}
