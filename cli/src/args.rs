//! The command line: what can be written, and what it means. Definitions only; nothing runs here.
//!
//! [`parse`] turns arguments into a [`Cli`], or into the text and exit code to end with: usage
//! errors are one line like all others, and exit 1, because 2 means a partial result.

use crate::exit;
use crate::workload::{
    DEFAULT_ORDER, FreeAmount, WorkloadError, parse_amount, parse_millis, parse_order, parse_some, parse_time,
};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand};
use llfree_base::choices::Switch;
use llfree_base::units::{Bytes, parse_duration, parse_memory};
use llfree_control::protocol::{BurstTouch, QUANTUM_US};
use llfree_harden::Seccomp;
use llfree_monitor::memory::Backing;
use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

mod launch_args;

pub use launch_args::{AUTO, LaunchArgs};
use launch_args::{default_cpus, parse_cpus};

const HELP_TAIL: &str = "\
Examples:
  llfree-vmm --mem 16G                         launch a guest that costs only what it touches
  llfree-vmm --mem 4G --cpus 2 --name web --workload \"alloc 1G, verify\"
  llfree-vmm guest alloc 8G                    in another terminal: make it use memory
  llfree-vmm guest free all                    ... and free it again
  llfree-vmm shrink --to 4G --wait 10s         take memory back
  llfree-vmm grow --to 16G                     and give it back
  llfree-vmm status --watch 1s                 watch it
  llfree-vmm pause                             freeze the guest ...
  llfree-vmm resume                            ... and let it continue
  llfree-vmm demo --mem 16G                    all of this in one terminal
  llfree-vmm --mem 4G --kernel vmlinuz --initrd initrd.img --disk rootfs.img  an unmodified Linux

Sizes: 4096, 512M, 1.5G, 2MiB; K, M, G and T are powers of 1024. Guest memory is a multiple of
2 MiB. With only one VM running, --name can be left out.

Exit codes: 0 success; 1 error; 2 partial result: a shrink or guest command that fell short (verify
found wrong data, no memory left), or findings from validate; 3 the guest crashed; 4 a Linux guest
rebooted; 5 its kernel panicked; 130 interrupted; 159 the VMM's seccomp filter caught a system call.";

/// Launches and controls a guest whose unused memory the host takes back in microseconds.
#[derive(Clone, Debug, Parser)]
#[command(name = "llfree-vmm", version, after_help = HELP_TAIL, max_term_width = 110)]
#[command(disable_help_subcommand = true, subcommand_value_name = "COMMAND", infer_long_args = false)]
#[command(override_usage = "llfree-vmm --mem SIZE [OPTIONS]\n       llfree-vmm COMMAND [OPTIONS]")]
pub struct Cli {
    /// Options of every command.
    #[command(flatten)]
    pub global: Global,
    /// Options of a launch.
    #[command(flatten)]
    pub launch: LaunchArgs,
    /// The command, unless it is a launch.
    #[command(subcommand)]
    pub command: Option<Command>,
}

/// Options of every command.
#[derive(Clone, PartialEq, Eq, Default, Debug, Args)]
pub struct Global {
    /// Print JSON instead of text
    #[arg(long, global = true)]
    pub json: bool,
    /// The VM's name; a launch defaults to the first unused one of vm0, vm1 ...
    #[arg(long, global = true, value_name = "NAME")]
    pub name: Option<String>,
    /// The VM's control socket, instead of a name
    #[arg(long, global = true, value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// Log more; twice for debug output
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// Everything but a launch.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum Command {
    /// Send a request to a running VM.
    #[command(flatten)]
    Client(ClientCommand),
    /// Run through the whole story in one terminal: boot, touch, free, shrink, verify, grow
    Demo(DemoArgs),
}

/// Requests to a VM that is already running.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum ClientCommand {
    /// Take memory from the guest: lower its limit
    Shrink(ShrinkArgs),
    /// Give memory to the guest: raise its limit
    Grow {
        /// The new limit
        #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
        to: Bytes,
    },
    /// Take back the memory of free frames; the limit stays the same
    Reclaim {
        /// At most this much; all that is free by default
        #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
        by: Option<Bytes>,
    },
    /// Switch automatic reclaim of free memory on or off
    AutoReclaim {
        /// on, off, or settings: interval=5s,min-age=2,keep=64M,rate=4G/s (shown with their defaults)
        #[arg(value_name = "SPEC", allow_hyphen_values = true)]
        settings: Switch,
    },
    /// Check that no frame is lost or owned twice; exits with 2 if anything is wrong
    Validate,
    /// Show limit, resident memory, installs, exits and more
    Status {
        /// Repeat at this interval
        #[arg(long, value_name = "TIME", value_parser = parse_interval, allow_hyphen_values = true)]
        watch: Option<Duration>,
    },
    /// List the running VMs
    List,
    /// Run a command in the test guest
    #[command(subcommand)]
    Guest(GuestCommand),
    /// Pause the guest: vCPUs and devices stop, but its memory can still be resized
    Pause,
    /// Resume a paused guest
    Resume,
    /// Stop a VM cleanly; to a Linux guest this looks like a power cut
    Stop,
}

/// Arguments of a shrink.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
#[command(group = clap::ArgGroup::new("goal").required(true).args(["to", "by"]))]
pub struct ShrinkArgs {
    /// The new limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub to: Option<Bytes>,
    /// The amount to take off the current limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub by: Option<Bytes>,
    /// Give the guest this long to free memory; with an --elastic device 0s means as long
    /// as it makes progress
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0s", allow_hyphen_values = true)]
    pub wait: Duration,
}

/// Options of the demo.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct DemoArgs {
    /// Maximum guest memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, default_value = "16G", allow_hyphen_values = true)]
    pub mem: Bytes,
    /// How much of it the guest touches; half by default
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub touch: Option<Bytes>,
    /// vCPUs; 2 by default, or 1 on a host with one core
    #[arg(long, value_name = "N", value_parser = parse_cpus, allow_hyphen_values = true)]
    pub cpus: Option<u32>,
    /// What guest memory is made of: anon (the default), memfd or hugetlb
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    pub backing: Option<Backing>,
    /// How a forbidden system call is handled: on (the default), log or off
    #[arg(long, value_name = "MODE", hide_possible_values = true)]
    pub seccomp: Option<Seccomp>,
}

impl DemoArgs {
    /// vCPUs, the default filled in.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus.unwrap_or_else(default_cpus)
    }
}

/// Commands of the test guest.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum GuestCommand {
    /// Allocate memory, then touch and stamp every page of it
    Alloc {
        /// Amount to allocate
        #[arg(value_name = "SIZE", value_parser = parse_amount, allow_hyphen_values = true)]
        bytes: u64,
        /// Allocate blocks of 2^K pages, 0 (4 KiB) to 10 (4 MiB)
        #[arg(long, value_name = "K", value_parser = parse_order, default_value_t = DEFAULT_ORDER, allow_hyphen_values = true)]
        order: u8,
    },
    /// Check every stamp
    Verify,
    /// Free memory
    Free {
        /// Amount to free, or all
        #[arg(value_name = "SIZE|all", allow_hyphen_values = true)]
        amount: FreeAmount,
        /// Free blocks at random instead of newest first
        #[arg(long)]
        random: bool,
    },
    /// Allocate and free blocks of mixed sizes and lifetimes
    Churn {
        /// How long to run
        #[arg(value_name = "TIME", value_parser = parse_millis, allow_hyphen_values = true)]
        millis: u64,
    },
    /// Allocate 2 MiB frames one by one and time each
    Burst {
        /// Amount to allocate
        #[arg(value_name = "SIZE", value_parser = parse_burst, allow_hyphen_values = true)]
        bytes: u64,
        /// What to write to: one word of each page, one of each 2 MiB frame, or nothing
        #[arg(long, value_name = "WHAT", value_parser = burst_touch(), default_value = "pages", hide_default_value = true)]
        touch: BurstTouch,
        /// Keep and stamp the memory instead of freeing it
        #[arg(long)]
        keep: bool,
        /// Ask the host for one frame at a time and none in advance
        #[arg(long)]
        single: bool,
    },
    /// Measure memory bandwidth over time (STREAM triad)
    Stream {
        /// How long to run
        #[arg(value_name = "TIME", value_parser = parse_stream_millis, allow_hyphen_values = true)]
        millis: u64,
        /// Total size of the arrays
        #[arg(long, value_name = "SIZE", value_parser = parse_stream_bytes, default_value = "192M", allow_hyphen_values = true)]
        bytes: u64,
        /// Allocate, touch and free this much between samples
        #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, allow_hyphen_values = true)]
        beside: Bytes,
    },
    /// Measure available CPU time over time (fixed time quanta)
    Ftq {
        /// How long to run
        #[arg(value_name = "TIME", value_parser = parse_ftq_millis, allow_hyphen_values = true)]
        millis: u64,
        /// Length of a quantum
        #[arg(long, value_name = "TIME", value_parser = parse_quantum, default_value = "1ms", allow_hyphen_values = true)]
        quantum: Duration,
        /// Allocate, touch and free this much between quanta
        #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, allow_hyphen_values = true)]
        beside: Bytes,
    },
    /// Give back cached frames so that the host can take them
    Idle,
    /// Report what is allocated and free
    Stats,
}

fn parse_burst(text: &str) -> Result<u64, WorkloadError> {
    parse_some("burst", text)
}

fn parse_stream_bytes(text: &str) -> Result<u64, WorkloadError> {
    parse_some("stream", text)
}

fn parse_stream_millis(text: &str) -> Result<u64, WorkloadError> {
    parse_time("stream", text)
}

fn parse_ftq_millis(text: &str) -> Result<u64, WorkloadError> {
    parse_time("ftq", text)
}

fn parse_quantum(text: &str) -> Result<Duration, String> {
    let quantum = parse_duration(text).map_err(|error| error.to_string())?;
    let possible = u64::try_from(quantum.as_micros()).is_ok_and(|us| QUANTUM_US.contains(&us));
    if possible { Ok(quantum) } else { Err("a quantum is 0.01ms to 1s".to_owned()) }
}

fn parse_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text).map_err(|error| error.to_string())?;
    if interval < Duration::from_millis(10) { Err("the shortest interval is 10ms".to_owned()) } else { Ok(interval) }
}

/// The extent of a burst's touches, by its name on the wire.
fn burst_touch() -> impl TypedValueParser<Value = BurstTouch> {
    let value = |touch: BurstTouch| {
        PossibleValue::new(touch.name()).help(match touch {
            BurstTouch::Nothing => "Nothing",
            BurstTouch::Frames => "One word of each 2 MiB frame",
            BurstTouch::Pages => "One word of each 4 KiB page",
        })
    };
    PossibleValuesParser::new(BurstTouch::ALL.map(value))
        // The parser takes no other name.
        .map(|name| BurstTouch::ALL.into_iter().find(|touch| touch.name() == name).unwrap_or_default())
}

/// An end without a run: help, a version, or a usage error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exit {
    /// The text to print, its newline included.
    pub text: String,
    /// Help and version go to stdout with code 0, errors to stderr with code 1.
    pub code: u8,
}

/// Parses a command line, the program's name first.
///
/// # Errors
/// Help, version or a usage error: what to print and how to exit.
pub fn parse<I, T>(args: I) -> Result<Cli, Exit>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    Cli::try_parse_from(args).and_then(check).map_err(|error| Exit::of("llfree-vmm", &error))
}

/// Checks that clap's own rules cannot express, because launch flags and subcommands share a level.
fn check(cli: Cli) -> Result<Cli, clap::Error> {
    let refuse = |kind, message: String| Err(Cli::command().error(kind, message));
    if cli.global.name.is_some() && cli.global.socket.is_some() {
        return refuse(ErrorKind::ArgumentConflict, "--name and --socket exclude each other".to_owned());
    }
    if cli.global.name.is_some() || cli.global.socket.is_some() {
        match cli.command {
            Some(Command::Demo(_)) => {
                let message = "the demo has no control socket, so --name and --socket do not apply";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            Some(Command::Client(ClientCommand::List)) => {
                let message = "list shows all VMs; use --name and --socket with status";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            _ => {}
        }
    }
    let launch = &cli.launch;
    let given = launch.given();
    match (&cli.command, given) {
        (Some(Command::Demo(_)), Some(flag)) => {
            refuse(ErrorKind::ArgumentConflict, format!("write {flag} after 'demo', if it takes that flag"))
        }
        (Some(_), Some(flag)) => {
            refuse(ErrorKind::ArgumentConflict, format!("{flag} is for a launch and makes no sense before a command"))
        }
        (None, None) => refuse(
            ErrorKind::MissingRequiredArgument,
            "nothing to do; launch a VM with --mem SIZE, or give a command".to_owned(),
        ),
        (None, Some(_)) if launch.mem.is_none() => {
            refuse(ErrorKind::MissingRequiredArgument, "a launch needs --mem SIZE, like --mem 16G".to_owned())
        }
        _ => Ok(cli),
    }
}

impl Exit {
    /// What `program` prints when clap has no command line for it: usage errors in one line.
    #[must_use]
    pub fn of(program: &str, error: &clap::Error) -> Self {
        let text = error.to_string();
        if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
            return Self { text, code: exit::OK };
        }
        let text = if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
            "a command is missing".to_owned()
        } else {
            one_line(&text)
        };
        Self { text: format!("{program}: error: {text} (see {program} --help)\n"), code: exit::ERROR }
    }
}

/// The message of clap's report and its tips, without the usage that follows.
fn one_line(report: &str) -> String {
    let report = report.strip_prefix("error: ").unwrap_or(report);
    let body = report.split("\nUsage:").next().unwrap_or(report);
    let body = body.split("\nFor more information").next().unwrap_or(body);
    let lines: Vec<String> = body
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .filter(|l| !l.is_empty())
        .collect();
    let line = lines.join("; ").replace(":; ", ": ").replace("; [possible", " [possible").replace("; tip: ", "; ");
    // An argument may hold anything; a terminal should not have to take it.
    line.chars().flat_map(|c| if c.is_control() { c.escape_debug().collect::<Vec<_>>() } else { vec![c] }).collect()
}
