//! The command line: what can be written, and what it means. Definitions only; nothing runs here.
//!
//! [`parse`] turns arguments into a [`Cli`], or into the text and exit code to end with: usage
//! errors are one line like all others, and exit 1, because 2 means a partial result.

use crate::completions::{Shell, vm_names};
use crate::exit;
use clap::error::ErrorKind;
use clap::{ArgMatches, Args, CommandFactory, FromArgMatches, Parser, Subcommand};
use llfree_base::units::{Bytes, parse_memory};
use llfree_harden::Seccomp;
use llfree_metrics::address::Address;
use llfree_monitor::memory::Backing;
use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::time::Duration;

mod client_args;
mod config;
mod launch_args;
mod usage_line;

pub use client_args::{
    ClientCommand, GrowArgs, GuestCommand, MetricsFormat, Patience, ResizeArgs, ShrinkArgs, StopArgs, VmArgs, WaitFor,
};
use config::Config;
pub use launch_args::{AUTO, LaunchArgs, METRICS_INTERVAL, Ready, SerialLine};
use launch_args::{default_cpus, parse_cpus, parse_publish_interval};
use usage_line::one_line;

/// What errors begin with.
const PROGRAM: &str = "llfree-vmm";

/// Command lines to begin with.
pub const EXAMPLES: &str = "\
llfree-vmm --mem 16G                         launch a guest that costs only what it touches
llfree-vmm --mem 4G --cpus 2 --name web --workload \"alloc 1G, verify\"
llfree-vmm guest alloc 8G                    in another terminal: make it use memory
llfree-vmm guest free all                    ... and free it again
llfree-vmm shrink --to 4G --wait 10s         take memory back
llfree-vmm grow --to 16G                     and give it back
llfree-vmm resize --to 8G                    either, whichever it is
llfree-vmm status --watch 1s                 watch it
llfree-vmm --mem 4G --name web --detach      launch in the background: returns when the VM answers
llfree-vmm stop web                          all commands take a name; stop --all stops all VMs
llfree-vmm pause                             freeze the guest ...
llfree-vmm resume                            ... and let it continue
llfree-vmm exporter                          serve the metrics of all VMs to Prometheus
llfree-vmm demo --mem 16G                    all of this in one terminal
llfree-vmm areas                             no VM: take memory back from processes that register
llfree-vmm --mem 4G --kernel vmlinuz --initrd initrd.img --disk rootfs.img  an unmodified Linux";

/// How sizes are written, and what a name defaults to.
pub const SIZES: &str = "\
4096, 512M, 1.5G, 2MiB; K, M, G and T are powers of 1024. Guest memory is a multiple of
2 MiB. With only one VM running, its name can be left out.";

/// What an exit code means.
pub const EXIT_CODES: &str = "\
0 success; 1 error; 2 partial result: a shrink or guest command that fell short (verify
found wrong data, no memory left), or findings from validate; 3 the guest crashed; 4 a Linux guest
rebooted; 5 its kernel panicked; 130 interrupted; 159 the VMM's seccomp filter caught a system call.";

/// What `--help` ends with.
fn help_tail() -> String {
    let examples: String = EXAMPLES.lines().map(|line| format!("  {line}\n")).collect();
    format!("Examples:\n{examples}\nSizes: {SIZES}\n\nExit codes: {EXIT_CODES}")
}

/// Launches and controls a guest whose unused memory the host takes back in microseconds.
#[derive(Clone, Debug, Parser)]
#[command(name = "llfree-vmm", version, after_help = help_tail(), max_term_width = 110)]
#[command(subcommand_value_name = "COMMAND", infer_long_args = false)]
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

/// Options of every command, and the VM that it is about.
#[derive(Clone, PartialEq, Eq, Default, Debug, Args)]
pub struct Global {
    /// Print JSON instead of text, errors too
    #[arg(long, global = true)]
    pub json: bool,
    /// The VM's name; a launch defaults to the first unused one of vm0, vm1 ...
    #[arg(long, value_name = "NAME", add = vm_names())]
    pub name: Option<String>,
    /// The VM's control socket, instead of a name
    #[arg(long, value_name = "PATH")]
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
    /// Take memory back from processes that register their areas: status, shrink and the rest work on these, too
    Areas(AreasArgs),
    /// Serve the metrics of all VMs of this user to Prometheus, until a signal ends it
    Exporter(ExporterArgs),
    /// Show all VMs on a live screen, with keys to sort, shrink and grow them
    Top {
        /// Time between two looks
        #[arg(long, value_name = "TIME", value_parser = client_args::parse_interval, default_value = "1s")]
        #[arg(allow_hyphen_values = true)]
        interval: Duration,
    },
    /// Print what makes a shell complete commands, flags and names of VMs, like: source <(llfree-vmm completions bash)
    Completions {
        /// bash, zsh or fish
        #[arg(value_name = "SHELL", hide_possible_values = true)]
        shell: Shell,
    },
}

/// Options of the exporter.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct ExporterArgs {
    /// Where scrapers come to: PORT (on the loopback device), ADDRESS:PORT or unix:PATH [default: 127.0.0.1:9837,
    /// unless there is a --file]
    #[arg(long, value_name = "WHERE")]
    pub listen: Option<Address>,
    /// Write metrics there again and again, for node_exporter's textfile collector
    #[arg(long, value_name = "FILE")]
    pub file: Option<PathBuf>,
    /// How often that file is written [default: 15s]
    #[arg(long, value_name = "TIME", value_parser = parse_publish_interval, requires = "file", allow_hyphen_values = true)]
    pub interval: Option<Duration>,
}

/// Options of the keeper of areas.
#[derive(Clone, PartialEq, Eq, Debug, Args)]
pub struct AreasArgs {
    /// Where processes register; by default 'areas' beside the control sockets
    #[arg(long, value_name = "PATH")]
    pub register: Option<PathBuf>,
    /// Areas at once
    #[arg(long, value_name = "N", default_value_t = 64)]
    pub max_areas: usize,
    /// Their sizes added up: address space, not memory
    #[arg(long, value_name = "SIZE", default_value = "16T")]
    pub max_memory: Bytes,
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

/// An end without a run: help, a version, or a usage error.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Exit {
    /// The text to print, its newline included.
    pub text: String,
    /// Help and version go to stdout with code 0, errors to stderr with code 1.
    pub code: u8,
}

/// Parses a command line, the program's name first, and the file that its `--config` names.
///
/// # Errors
/// Help, version, a config to print or a usage error: what to print and how to exit.
pub fn parse<I, T>(args: I) -> Result<Cli, Exit>
where
    I: IntoIterator<Item = T>,
    T: Into<OsString> + Clone,
{
    let args: Vec<OsString> = args.into_iter().map(Into::into).collect();
    if !args.iter().any(|arg| arg.as_encoded_bytes().starts_with(b"--config")) {
        return parse_all(args).map_err(|error| Exit::of(PROGRAM, &error)).and_then(|(cli, all)| finish(cli, &all));
    }
    // What is missing may be in the file, and what is wrong is said below.
    let given = Cli::command().ignore_errors(true).try_get_matches_from(&args);
    let given = given.ok().filter(|given| given.subcommand_name().is_none());
    let path = given.as_ref().and_then(|given| given.get_one::<PathBuf>("config").cloned());
    match (given, path) {
        (Some(given), Some(path)) => parse_with_config(&args, &given, &path),
        _ => parse_all(args).map_err(|error| Exit::of(PROGRAM, &error)).and_then(|(cli, all)| finish(cli, &all)),
    }
}

fn parse_with_config(args: &[OsString], given: &ArgMatches, path: &Path) -> Result<Cli, Exit> {
    match Cli::command().try_get_matches_from(args) {
        Err(error) if error.kind() != ErrorKind::MissingRequiredArgument => return Err(Exit::of(PROGRAM, &error)),
        _ => {}
    }
    let config = Config::read(path, &Cli::command()).map_err(|line| Exit::error(PROGRAM, &line))?;
    let of_file = config.arguments(given).map_err(|line| Exit::error(PROGRAM, &line))?;
    let (program, rest) = args.split_at(args.len().min(1));
    let all = program.iter().chain(&of_file).chain(rest).cloned().collect();
    let (cli, all) = parse_all(all).map_err(|error| match error.kind() {
        ErrorKind::DisplayHelp | ErrorKind::DisplayVersion => Exit::of(PROGRAM, &error),
        _ => Exit::error(PROGRAM, &config.place(&one_line(&error.to_string()))),
    })?;
    finish(cli, &all)
}

fn parse_all(args: Vec<OsString>) -> Result<(Cli, ArgMatches), clap::Error> {
    let matches = Cli::command().try_get_matches_from(args)?;
    let cli = Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut Cli::command()))?;
    Ok((check(cli)?, matches))
}

/// Ends here if the flags are to be printed.
fn finish(cli: Cli, all: &ArgMatches) -> Result<Cli, Exit> {
    if !cli.launch.print_config {
        return Ok(cli);
    }
    let text = config::print(all, &Cli::command(), cli.global.json).map_err(|line| Exit::error(PROGRAM, &line))?;
    Err(Exit { text, code: exit::OK })
}

/// Checks that clap's own rules cannot express, because launch flags and subcommands share a level. A VM that is named
/// after the command is as good as one named before it.
fn check(mut cli: Cli) -> Result<Cli, clap::Error> {
    let refuse = |kind, message: String| Err(Cli::command().error(kind, message));
    if let Some(Command::Client(command)) = &cli.command {
        for vm in command.vm_args() {
            let twice = |given: bool| given && (cli.global.name.is_some() || cli.global.socket.is_some());
            if twice(vm.given() > 0) || vm.given() > 1 {
                return refuse(
                    ErrorKind::ArgumentConflict,
                    "name the VM once: NAME, --name NAME or --socket PATH".to_owned(),
                );
            }
            cli.global.name = cli.global.name.or_else(|| vm.name().map(str::to_owned));
            cli.global.socket = cli.global.socket.or_else(|| vm.socket.clone());
        }
    }
    if cli.global.name.is_some() && cli.global.socket.is_some() {
        return refuse(ErrorKind::ArgumentConflict, "--name and --socket exclude each other".to_owned());
    }
    if cli.global.name.is_some() || cli.global.socket.is_some() {
        match cli.command {
            Some(Command::Demo(_)) => {
                let message = "the demo has no control socket, so --name and --socket do not apply";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            Some(Command::Areas(_)) => {
                let message = "areas have the names that their processes give them; use --register for the socket";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            Some(Command::Completions { .. }) => {
                return refuse(ErrorKind::ArgumentConflict, "completions are of no VM".to_owned());
            }
            Some(Command::Exporter(_)) => {
                let message = "the exporter serves all VMs; use --metrics-listen at the launch of one";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            Some(Command::Top { .. }) => {
                let message = "top shows all VMs; use --name and --socket with status --watch";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            Some(Command::Client(ClientCommand::List { .. })) => {
                let message = "list shows all VMs; use --name and --socket with status";
                return refuse(ErrorKind::ArgumentConflict, message.to_owned());
            }
            _ => {}
        }
    }
    if cli.global.json && matches!(cli.command, Some(Command::Client(ClientCommand::Metrics { .. }))) {
        let message = "metrics have a format of their own; use --json with status and list";
        return refuse(ErrorKind::ArgumentConflict, message.to_owned());
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
        (None, Some(_)) => match (launch.limit, launch.mem) {
            (_, None) => {
                refuse(ErrorKind::MissingRequiredArgument, "a launch needs --mem SIZE, like --mem 16G".to_owned())
            }
            (Some(limit), Some(mem)) if limit > mem => {
                let message = format!("--limit {limit} is above --mem {mem}, the most that the guest can have");
                refuse(ErrorKind::ArgumentConflict, message)
            }
            _ => Ok(cli),
        },
        (Some(_), None) => Ok(cli),
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
        Self::error(program, &text)
    }

    /// A usage error, in one line.
    fn error(program: &str, line: &str) -> Self {
        Self { text: format!("{program}: error: {line} (see {program} --help)\n"), code: exit::ERROR }
    }
}
