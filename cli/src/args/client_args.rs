//! The commands that talk to running VMs, and what can be written after them.

use crate::completions::vm_names;
use crate::workload::{
    DEFAULT_ORDER, FreeAmount, WorkloadError, parse_amount, parse_millis, parse_order, parse_some, parse_time,
};
use clap::builder::{PossibleValue, PossibleValuesParser, TypedValueParser};
use clap::{Args, Subcommand, ValueEnum};
use llfree_base::choices::Switch;
use llfree_base::units::{Bytes, parse_duration, parse_memory};
use llfree_control::protocol::{BurstTouch, QUANTUM_US};
use std::path::PathBuf;
use std::time::Duration;

/// The VM that a command is about.
#[derive(Clone, PartialEq, Eq, Default, Debug, Args)]
pub struct VmArgs {
    /// The VM's name; not needed while only one is running
    #[arg(value_name = "NAME", add = vm_names())]
    pub vm: Option<String>,
    /// Its name, as an option
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vm", "socket"], add = vm_names())]
    pub name: Option<String>,
    /// Its control socket, instead of a name
    #[arg(long, value_name = "PATH", conflicts_with = "vm")]
    pub socket: Option<PathBuf>,
}

impl VmArgs {
    /// Its name, however that is written.
    pub(super) fn name(&self) -> Option<&str> {
        self.vm.as_deref().or(self.name.as_deref())
    }

    /// How often a VM is named.
    pub(super) fn given(&self) -> usize {
        [self.vm.is_some(), self.name.is_some(), self.socket.is_some()].into_iter().filter(|given| *given).count()
    }
}

/// The same between `guest` and its command, where a name would be taken for a command.
#[derive(Clone, PartialEq, Eq, Default, Debug, Args)]
pub struct OptionalVm {
    /// The VM's name
    #[arg(long, value_name = "NAME", conflicts_with = "socket", hide = true, add = vm_names())]
    pub name: Option<String>,
    /// Its control socket
    #[arg(long, value_name = "PATH", hide = true)]
    pub socket: Option<PathBuf>,
}

/// Requests to a VM that is already running.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum ClientCommand {
    /// Take memory from the guest: lower its limit
    Shrink(ShrinkArgs),
    /// Give memory to the guest: raise its limit
    Grow(GrowArgs),
    /// Set the guest's limit, be it lower or higher than now
    Resize(ResizeArgs),
    /// Take back the memory of free frames; the limit stays the same
    Reclaim {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// At most this much; all that is free by default
        #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
        by: Option<Bytes>,
        /// Take what the guest asks to be left, too; a guest that kills for want of memory may do so then
        #[arg(long)]
        force: bool,
    },
    /// Switch automatic reclaim of free memory on or off
    AutoReclaim {
        /// on, off, or settings: interval=5s,min-age=2,keep=64M,rate=4G/s (shown with their defaults)
        #[arg(value_name = "SPEC", allow_hyphen_values = true)]
        settings: Switch,
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Check that no frame is lost or owned twice; exits with 2 if anything is wrong
    Validate {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Show limit, resident memory, installs, exits and more
    Status {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// Repeat at this interval, with rates
        #[arg(long, value_name = "TIME", value_parser = parse_interval, allow_hyphen_values = true)]
        watch: Option<Duration>,
    },
    /// List the running VMs
    #[command(visible_alias = "ls")]
    List {
        /// Repeat at this interval
        #[arg(long, value_name = "TIME", value_parser = parse_interval, allow_hyphen_values = true)]
        watch: Option<Duration>,
    },
    /// Print the metrics of one VM, or of all, as Prometheus reads them
    Metrics {
        /// The VM; all if none is named.
        #[command(flatten)]
        vm: VmArgs,
        /// openmetrics (the default), or prometheus for the older text format
        #[arg(
            long,
            value_name = "FORMAT",
            default_value = "openmetrics",
            hide_default_value = true,
            hide_possible_values = true
        )]
        format: MetricsFormat,
    },
    /// Run a command in the test guest
    Guest {
        /// The VM.
        #[command(flatten)]
        vm: OptionalVm,
        /// The command.
        #[command(subcommand)]
        command: GuestCommand,
    },
    /// Pause the guest: vCPUs and devices stop, but its memory can still be resized
    Pause {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Resume a paused guest
    Resume {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Stop VMs cleanly; to a Linux guest this looks like a power cut, unless --wait lets it power itself off
    Stop(StopArgs),
    /// Wait until a VM answers, until its guest takes commands, or until it ends
    Wait {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// What to wait for: up, agent or end
        #[arg(long = "for", value_name = "WHAT", default_value = "up", hide_possible_values = true)]
        what: WaitFor,
        /// Give up after this long [default: 30s; 2m for the agent; for the end there is none]
        #[arg(long, value_name = "TIME", value_parser = parse_duration, allow_hyphen_values = true)]
        timeout: Option<Duration>,
    },
    /// Attach to the serial line of a guest; Ctrl-A X leaves it
    Console {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Show a VM's log
    Logs {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// Go on with what comes
        #[arg(short, long)]
        follow: bool,
        /// Only the last N lines
        #[arg(short = 'n', long, value_name = "N")]
        lines: Option<u64>,
    },
    /// Follow what happens to a VM, as JSON lines: up, resized, paused, violation, device_error, end ...
    Events {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
}

impl ClientCommand {
    /// The places where a VM may be named after the command.
    pub(super) fn vm_args(&self) -> Vec<VmArgs> {
        match self {
            Self::Shrink(ShrinkArgs { vm, .. })
            | Self::Grow(GrowArgs { vm, .. })
            | Self::Resize(ResizeArgs { vm, .. })
            | Self::Reclaim { vm, .. }
            | Self::AutoReclaim { vm, .. }
            | Self::Validate { vm }
            | Self::Status { vm, .. }
            | Self::Metrics { vm, .. }
            | Self::Pause { vm }
            | Self::Resume { vm }
            | Self::Wait { vm, .. }
            | Self::Console { vm }
            | Self::Logs { vm, .. }
            | Self::Events { vm } => vec![vm.clone()],
            Self::Stop(StopArgs { name, socket, .. }) => {
                vec![VmArgs { vm: None, name: name.clone(), socket: socket.clone() }]
            }
            Self::Guest { vm, command } => {
                vec![VmArgs { vm: None, name: vm.name.clone(), socket: vm.socket.clone() }, command.vm().clone()]
            }
            Self::List { .. } => Vec::new(),
        }
    }
}

/// How metrics are written.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum MetricsFormat {
    /// OpenMetrics 1.0.
    Openmetrics,
    /// Prometheus' text format 0.0.4.
    Prometheus,
}

/// What `wait` waits for.
#[derive(Clone, Copy, PartialEq, Eq, Debug, ValueEnum)]
pub enum WaitFor {
    /// The VM answers.
    Up,
    /// Its guest takes commands.
    Agent,
    /// It is gone.
    End,
}

/// Arguments of a shrink.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
#[command(group = clap::ArgGroup::new("goal").required(true).args(["to", "by"]))]
pub struct ShrinkArgs {
    /// The VM.
    #[command(flatten)]
    pub vm: VmArgs,
    /// The new limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub to: Option<Bytes>,
    /// The amount to take off the current limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub by: Option<Bytes>,
    /// Take what the guest asks to be left, too; a guest that kills for want of memory may do so then.
    /// What is missing is not pursued
    #[arg(long)]
    pub force: bool,
    /// How this command waits.
    #[command(flatten)]
    pub patience: Patience,
}

/// Arguments of a grow.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
#[command(group = clap::ArgGroup::new("goal").required(true).args(["to", "by"]))]
pub struct GrowArgs {
    /// The VM.
    #[command(flatten)]
    pub vm: VmArgs,
    /// The new limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub to: Option<Bytes>,
    /// The amount to add to the current limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub by: Option<Bytes>,
}

/// Arguments of a resize.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct ResizeArgs {
    /// The VM.
    #[command(flatten)]
    pub vm: VmArgs,
    /// The new limit
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub to: Bytes,
    /// How this command waits.
    #[command(flatten)]
    pub patience: Patience,
}

/// How long a shrink is waited for, and what becomes of one that falls short.
#[derive(Clone, Copy, PartialEq, Eq, Default, Debug, Args)]
pub struct Patience {
    /// Give the guest this long to free memory before this command returns; with an --elastic device 0s
    /// means as long as it makes progress
    #[arg(long, value_name = "TIME", value_parser = parse_duration, default_value = "0s", allow_hyphen_values = true)]
    pub wait: Duration,
    /// Give up what is missing then; by default the VM goes on until the limit is reached or another
    /// resize replaces it
    #[arg(long)]
    pub once: bool,
}

/// Arguments of a stop.
#[derive(Clone, PartialEq, Eq, Default, Debug, Args)]
pub struct StopArgs {
    /// The VMs' names; not needed while only one is running
    #[arg(value_name = "NAME", add = vm_names())]
    pub vms: Vec<String>,
    /// A VM's name, as an option
    #[arg(long, value_name = "NAME", conflicts_with_all = ["vms", "socket", "all"], add = vm_names())]
    pub name: Option<String>,
    /// Its control socket, instead of a name
    #[arg(long, value_name = "PATH", conflicts_with_all = ["vms", "all"])]
    pub socket: Option<PathBuf>,
    /// Stop every running VM
    #[arg(long, conflicts_with = "vms")]
    pub all: bool,
    /// Press the guest's power button first, and give it this long to power itself off
    #[arg(long, value_name = "TIME", value_parser = parse_duration, allow_hyphen_values = true)]
    pub wait: Option<Duration>,
    /// Kill the process of a VM that does not end within 3 s
    #[arg(long)]
    pub force: bool,
}

/// Commands of the test guest.
#[derive(Clone, PartialEq, Eq, Debug, Subcommand)]
pub enum GuestCommand {
    /// Allocate memory, then touch and stamp every page of it
    Alloc {
        /// Amount to allocate
        #[arg(value_name = "SIZE", value_parser = parse_amount, allow_hyphen_values = true)]
        bytes: u64,
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// Allocate blocks of 2^K pages, 0 (4 KiB) to 10 (4 MiB)
        #[arg(long, value_name = "K", value_parser = parse_order, default_value_t = DEFAULT_ORDER, allow_hyphen_values = true)]
        order: u8,
    },
    /// Check every stamp
    Verify {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Free memory
    Free {
        /// Amount to free, or all
        #[arg(value_name = "SIZE|all", allow_hyphen_values = true)]
        amount: FreeAmount,
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// Free blocks at random instead of newest first
        #[arg(long)]
        random: bool,
    },
    /// Allocate and free blocks of mixed sizes and lifetimes
    Churn {
        /// How long to run
        #[arg(value_name = "TIME", value_parser = parse_millis, allow_hyphen_values = true)]
        millis: u64,
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Allocate 2 MiB frames one by one and time each
    Burst {
        /// Amount to allocate
        #[arg(value_name = "SIZE", value_parser = parse_burst, allow_hyphen_values = true)]
        bytes: u64,
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
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
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
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
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
        /// Length of a quantum
        #[arg(long, value_name = "TIME", value_parser = parse_quantum, default_value = "1ms", allow_hyphen_values = true)]
        quantum: Duration,
        /// Allocate, touch and free this much between quanta
        #[arg(long, value_name = "SIZE", default_value = "0", hide_default_value = true, allow_hyphen_values = true)]
        beside: Bytes,
    },
    /// Give back cached frames so that the host can take them
    Idle {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
    /// Report what is allocated and free
    Stats {
        /// The VM.
        #[command(flatten)]
        vm: VmArgs,
    },
}

impl GuestCommand {
    /// The VM.
    fn vm(&self) -> &VmArgs {
        match self {
            Self::Alloc { vm, .. }
            | Self::Verify { vm }
            | Self::Free { vm, .. }
            | Self::Churn { vm, .. }
            | Self::Burst { vm, .. }
            | Self::Stream { vm, .. }
            | Self::Ftq { vm, .. }
            | Self::Idle { vm }
            | Self::Stats { vm } => vm,
        }
    }
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
    if possible { Ok(quantum) } else { Err("a quantum is 10us to 1s".to_owned()) }
}

pub(super) fn parse_interval(text: &str) -> Result<Duration, String> {
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
