//! [`LaunchArgs`]: the flags of a launch.

use crate::workload::Workload;
use clap::Args;
use guest_abi::header::MAX_VCPUS;
use llfree_base::choices::Switch;
use llfree_base::units::{Bytes, parse_duration, parse_memory};
use llfree_harden::Seccomp;
use llfree_metrics::address::Address;
use llfree_monitor::OnViolation;
use llfree_monitor::install_config::{InstallConfig, InstallPool};
use llfree_monitor::memory::{Backing, UseUserfaultfd};
use std::path::PathBuf;
use std::time::Duration;
use vmm::devices::blk::DiskConfig;
use vmm::devices::net::NetConfig;
use vmm::elastic::Elastic;

/// The cgroup that needs no path.
pub const AUTO: &str = "auto";

/// Options of a launch.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
#[command(next_help_heading = "Launch a VM")]
pub struct LaunchArgs {
    /// Take flags from this file as well: TOML, with flags' names as keys, like mem = "16G"
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Print such a file with what the flags say, and launch nothing
    #[arg(long)]
    pub print_config: bool,
    /// Maximum guest memory; only what the guest touches costs host memory
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub mem: Option<Bytes>,
    /// The limit to start with, if that is not all of --mem; grow raises it
    #[arg(long, value_name = "SIZE", value_parser = parse_memory, allow_hyphen_values = true)]
    pub limit: Option<Bytes>,
    /// vCPUs; 2 by default, or 1 on a host with one core
    #[arg(long, value_name = "N", value_parser = parse_cpus, allow_hyphen_values = true)]
    pub cpus: Option<u32>,
    /// What to run instead of the built-in guest: Linux (bzImage or PVH vmlinux), or your own ELF file
    #[arg(long, value_name = "FILE")]
    pub kernel: Option<PathBuf>,
    /// Linux: the initial RAM file system
    #[arg(long, value_name = "FILE")]
    pub initrd: Option<PathBuf>,
    /// Linux: the kernel's command line [default: "console=ttyS0"]
    #[arg(long, value_name = "TEXT", allow_hyphen_values = true)]
    pub append: Option<String>,
    /// Linux: a raw disk image or block device, like rootfs.img or data.img,ro; may be repeated
    #[arg(long, value_name = "PATH[,ro][,serial=TEXT]", action = clap::ArgAction::Append)]
    pub disk: Vec<DiskConfig>,
    /// Linux: a network card on a host tap device, like tap=tap0; may be repeated
    #[arg(long, value_name = "tap=NAME[,mac=MAC]", action = clap::ArgAction::Append)]
    pub net: Vec<NetConfig>,
    /// Guest commands to run at boot, like "alloc 8G, verify, free all"; may end in "stop". With
    /// Linux they wait for its agent, for at most two minutes
    #[arg(long, value_name = "SPEC")]
    pub workload: Option<Workload>,
    /// What guest memory is made of: anon (the default), memfd or hugetlb
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    pub backing: Option<Backing>,
    /// How memory is taken and given back: llfree (the default), balloon, balloon-huge, virtio-mem or none;
    /// options follow, like llfree,grow-on-need=on, llfree,start=installed (all memory from the start),
    /// balloon,reporting=on,deflate-on-oom=on,stats=1s or virtio-mem,boot=256M. A Linux guest that is not told has
    /// llfree if its kernel says that it shares its free memory, else that balloon
    #[arg(long, value_name = "KIND", hide_possible_values = true)]
    pub elastic: Option<Elastic>,
    /// Reclaim free memory automatically: on, off (the default), or settings like
    /// interval=5s,min-age=2,keep=64M,rate=4G/s
    #[arg(long, value_name = "SPEC", allow_hyphen_values = true)]
    pub auto_reclaim: Option<Switch>,
    /// Cores to pin the vCPUs to, in turn, like 0,2 or 0-3; not pinned by default
    #[arg(long, value_name = "CORES", value_parser = parse_cores, allow_hyphen_values = true)]
    pub pin: Vec<Cores>,
    /// Zeroed memory kept ready for installs, like 64M or 64M,rate=4G/s; 0 for none [default: as recent installs
    /// call for, at most 64M or an eighth of --mem; none in an idle VM]
    #[arg(long, value_name = "SIZE[,rate=SIZE/s]", allow_hyphen_values = true)]
    pub install_pool: Option<InstallPool>,
    /// What happens when the guest touches memory without asking. stop: it is stopped; install (the
    /// default): it gets memory within its limit, and is stopped beyond it; log: it is never stopped,
    /// and gets memory beyond the limit on loan for a moment
    #[arg(long, value_name = "POLICY")]
    pub on_violation: Option<OnViolation>,
    /// Catch such touches with userfaultfd: auto (the default: where permitted), on (required), off
    #[arg(long, value_name = "WHEN", value_parser = parse_userfaultfd)]
    pub userfaultfd: Option<UseUserfaultfd>,
    /// How a forbidden system call is handled: on (the default) ends the VM, log only records it in
    /// the kernel's audit log, off disables all sandboxing
    #[arg(long, value_name = "MODE", hide_possible_values = true)]
    pub seccomp: Option<Seccomp>,
    /// Run in a dedicated memory cgroup (v2) whose memory.max follows the limit, created below PATH,
    /// or next to the caller's cgroup (auto)
    #[arg(long, value_name = "PATH", num_args = 0..=1, require_equals = true, default_missing_value = AUTO)]
    pub cgroup: Option<PathBuf>,
    /// Go on in the background: returns when the VM answers, or with the launch's error and exit code
    #[arg(long)]
    pub detach: bool,
    /// When a service manager (NOTIFY_SOCKET) hears that the VM is ready: up, when it answers, or agent, when a
    /// Linux guest's agent is there (the default for Linux)
    #[arg(long, value_name = "WHEN", hide_possible_values = true)]
    pub ready: Option<Ready>,
    /// Write the process id there while the VM runs
    #[arg(long, value_name = "FILE")]
    pub pid_file: Option<PathBuf>,
    /// Append the log there once the VM is up, instead of to stderr; SIGHUP opens the file anew, for log
    /// rotation, and no longer ends the VM
    #[arg(long, value_name = "FILE")]
    pub log_file: Option<PathBuf>,
    /// Linux: where the serial console goes: stdio (the default), file:PATH, off, or socket (the default with
    /// --detach), to which 'llfree-vmm console' attaches
    #[arg(long, value_name = "WHERE", value_parser = parse_serial)]
    pub serial: Option<SerialLine>,
    /// Serve metrics to Prometheus by HTTP: PORT (on the loopback device), ADDRESS:PORT or unix:PATH
    #[arg(long, value_name = "WHERE")]
    pub metrics_listen: Option<Address>,
    /// Write metrics there again and again, for node_exporter's textfile collector; the file goes with the VM
    #[arg(long, value_name = "FILE")]
    pub metrics_file: Option<PathBuf>,
    /// How often that file is written [default: 15s]
    #[arg(long, value_name = "TIME", value_parser = parse_publish_interval, requires = "metrics_file", allow_hyphen_values = true)]
    pub metrics_interval: Option<Duration>,
}

/// How often metrics are written to a file, if nothing else is said: as often as Prometheus scrapes.
pub const METRICS_INTERVAL: Duration = Duration::from_secs(15);

/// When a VM is ready.
#[derive(Clone, Copy, PartialEq, Eq, Debug, clap::ValueEnum)]
pub enum Ready {
    /// It answers.
    Up,
    /// So does its guest's agent.
    Agent,
}

/// Where the guest's serial line goes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum SerialLine {
    /// To stdout, and from stdin.
    Stdio,
    /// To a file.
    File(PathBuf),
    /// To whoever attaches.
    Socket,
    /// Nowhere.
    Off,
}

/// Cores in the order in which vCPUs are pinned to them.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Cores(pub Vec<u32>);

impl LaunchArgs {
    /// The way that frames get their memory.
    #[must_use]
    pub fn install_config(&self) -> InstallConfig {
        InstallConfig {
            pool: self.install_pool,
            on_violation: self.on_violation,
            userfaultfd: self.userfaultfd.unwrap_or_default(),
        }
    }

    /// vCPUs, the default filled in.
    #[must_use]
    pub fn cpus(&self) -> u32 {
        self.cpus.unwrap_or_else(default_cpus)
    }

    /// Where the serial line goes, the default filled in.
    #[must_use]
    pub fn serial(&self) -> SerialLine {
        let default = if self.detach { SerialLine::Socket } else { SerialLine::Stdio };
        self.serial.clone().unwrap_or(default)
    }

    /// The cores to pin vCPUs to.
    #[must_use]
    pub fn pin(&self) -> Vec<u32> {
        self.pin.iter().flat_map(|cores| &cores.0).copied().collect()
    }

    /// The backing of guest memory, the default filled in.
    #[must_use]
    pub fn backing(&self) -> Backing {
        self.backing.unwrap_or_default()
    }

    /// The first flag of a launch that was given.
    pub(super) fn given(&self) -> Option<&'static str> {
        let flags = [
            ("--config", self.config.is_some()),
            ("--print-config", self.print_config),
            ("--mem", self.mem.is_some()),
            ("--limit", self.limit.is_some()),
            ("--cpus", self.cpus.is_some()),
            ("--kernel", self.kernel.is_some()),
            ("--initrd", self.initrd.is_some()),
            ("--append", self.append.is_some()),
            ("--disk", !self.disk.is_empty()),
            ("--net", !self.net.is_empty()),
            ("--workload", self.workload.is_some()),
            ("--backing", self.backing.is_some()),
            ("--elastic", self.elastic.is_some()),
            ("--pin", !self.pin.is_empty()),
            ("--seccomp", self.seccomp.is_some()),
            ("--cgroup", self.cgroup.is_some()),
            ("--auto-reclaim", self.auto_reclaim.is_some()),
            ("--install-pool", self.install_pool.is_some()),
            ("--on-violation", self.on_violation.is_some()),
            ("--userfaultfd", self.userfaultfd.is_some()),
            ("--detach", self.detach),
            ("--ready", self.ready.is_some()),
            ("--pid-file", self.pid_file.is_some()),
            ("--log-file", self.log_file.is_some()),
            ("--serial", self.serial.is_some()),
            ("--metrics-listen", self.metrics_listen.is_some()),
            ("--metrics-file", self.metrics_file.is_some()),
            ("--metrics-interval", self.metrics_interval.is_some()),
        ];
        flags.iter().find(|(_, given)| *given).map(|(flag, _)| *flag)
    }
}

/// Two, unless the host has fewer cores than that.
pub(super) fn default_cpus() -> u32 {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    if cores < 2 { 1 } else { 2 }
}

pub(super) fn parse_publish_interval(text: &str) -> Result<Duration, String> {
    let interval = parse_duration(text).map_err(|error| error.to_string())?;
    if interval < Duration::from_secs(1) { Err("the shortest interval is 1s".to_owned()) } else { Ok(interval) }
}

fn parse_userfaultfd(text: &str) -> Result<UseUserfaultfd, String> {
    match text {
        "auto" => Ok(UseUserfaultfd::Auto),
        "on" => Ok(UseUserfaultfd::On),
        "off" => Ok(UseUserfaultfd::Off),
        _ => Err("use auto, on or off".to_owned()),
    }
}

pub(super) fn parse_cpus(text: &str) -> Result<u32, String> {
    match text.parse::<u32>() {
        Ok(count) if (1..=MAX_VCPUS).contains(&count) => Ok(count),
        Ok(count) => Err(format!("{count} vCPUs are out of range; choose 1 to {MAX_VCPUS}")),
        Err(_) => Err(format!("not a number of vCPUs; choose 1 to {MAX_VCPUS}")),
    }
}

/// The most cores that a machine has, so that a range is no way to fill memory.
const MOST_CORES: u32 = 1 << 16;

fn parse_cores(text: &str) -> Result<Cores, String> {
    let number = |text: &str| {
        let core = text.trim().parse::<u32>().ok().filter(|core| *core < MOST_CORES);
        core.ok_or_else(|| "not the number of a core; write numbers and ranges, like 0,2 or 0-3".to_owned())
    };
    let mut cores = Vec::new();
    for part in text.split(',') {
        match part.split_once('-') {
            Some((first, last)) => {
                let (first, last) = (number(first)?, number(last)?);
                if first > last {
                    return Err(format!("the range {first}-{last} is empty; write {last}-{first}"));
                }
                cores.extend(first..=last);
            }
            None => cores.push(number(part)?),
        }
    }
    Ok(Cores(cores))
}

fn parse_serial(text: &str) -> Result<SerialLine, String> {
    match text {
        "stdio" => Ok(SerialLine::Stdio),
        "socket" => Ok(SerialLine::Socket),
        "off" => Ok(SerialLine::Off),
        _ => match text.strip_prefix("file:") {
            Some(path) if !path.is_empty() => Ok(SerialLine::File(path.into())),
            _ => Err("use stdio, file:PATH, socket or off".to_owned()),
        },
    }
}
