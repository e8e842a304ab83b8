//! The binary: reads the command line, runs one thing, prints errors as one line (a crashed guest's
//! registers below it).

use clap::CommandFactory;
use cli::args::{self, Cli, Command};
use cli::background::{self, Background, CallerEnd, Side};
use cli::client_commands::{self, Output};
use cli::failure::{Fails, Failure};
use cli::log_ring;
use cli::log_writer::LOG;
use cli::run::{self, RunError};
use cli::{areas, completions, demo, exit, exporter, service_manager, top};
use env_logger::fmt::Formatter;
use env_logger::{Builder, Env, Logger, Target, WriteStyle};
use llfree_base::panics;
use log::{Log, Metadata, Record};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{self, IsTerminal, Write};
use std::process::ExitCode;
use std::time::SystemTime;

fn main() -> ExitCode {
    panics::end_the_process();
    // Tests make the whole binary fail through a variable.
    #[cfg(feature = "fault-injection")]
    let _scenario = llfree_base::faults::Scenario::start();
    // A shell that asks what may follow takes no other answer.
    match completions::answer(Cli::command) {
        Ok(false) => {}
        Ok(true) => return ExitCode::SUCCESS,
        Err(error) => {
            let _ = error.print();
            return ExitCode::FAILURE;
        }
    }
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(end) => return ExitCode::from(refuse(&end)),
    };
    if cli.launch.detach && service_manager::has_passed_a_socket() {
        return ExitCode::from(fail(&RunError::PassedToCaller, cli.global.json));
    }
    // A fork: there must be no other thread yet, and no log that two processes write.
    let background = match (&cli.command, cli.launch.detach) {
        (None, true) => match background::fork() {
            Ok(Side::Launch(background)) => Some(background),
            Ok(Side::Caller(end)) => return ExitCode::from(end_caller(&end, cli.global.json)),
            Err(error) => {
                let error = RunError::Host { step: "start a process in the background", source: error };
                return ExitCode::from(fail(&error, cli.global.json));
            }
        },
        _ => None,
    };
    start_logging(cli.global.verbose);
    report_panics();
    let code = execute(&cli, background);
    LOG.finish();
    ExitCode::from(code)
}

fn start_logging(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let mut builder = Builder::from_env(Env::default().default_filter_or(level));
    // The logger cannot see what lies behind a writer of ours, and would use no colour.
    let plain = std::env::var_os("TERM").is_none_or(|term| term == "dumb") || std::env::var_os("NO_COLOR").is_some();
    if std::env::var_os("RUST_LOG_STYLE").is_none() && io::stderr().is_terminal() && !plain {
        builder.write_style(WriteStyle::Always);
    }
    let logger = builder.format(write_line).target(Target::Pipe(Box::new(log_ring::Tee))).build();
    log::set_max_level(logger.filter());
    // It fails if there is a logger already, and here is the only place that sets one.
    let _ = log::set_boxed_logger(Box::new(ToTheEnd(logger)));
}

/// A line of the log; what goes over several lines is indented from the second on.
fn write_line(to: &mut Formatter, record: &Record<'_>) -> io::Result<()> {
    let time = humantime::format_rfc3339_seconds(SystemTime::now());
    let level = record.level();
    let style = to.default_level_style(level);
    let text = record.args().to_string().replace('\n', "\n    ");
    writeln!(to, "[{time} {style}{level:<5}{style:#} {}] {text}", record.target())
}

/// A logger whose flush waits for the lines to be written, for a moment: what a thread says just before it
/// ends the process is said.
struct ToTheEnd(Logger);

impl Log for ToTheEnd {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        self.0.enabled(metadata)
    }

    fn log(&self, record: &Record<'_>) {
        self.0.log(record);
    }

    fn flush(&self) {
        LOG.finish();
    }
}

const NO_TRACE: &str =
    "no backtrace: the threads of a VM may not read the names of functions; with --seccomp off there is one\n";

/// A panic ends the process, whether or not somebody reads of it.
fn report_panics() {
    panics::end_the_process_after(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?").to_owned();
        let trace = Backtrace::capture();
        let trace = match trace.status() {
            // To name functions takes files, and the call to open the first of them would be this process's last.
            BacktraceStatus::Captured if llfree_harden::is_bounded() => NO_TRACE.to_owned(),
            BacktraceStatus::Captured => format!("{trace}"),
            _ => String::new(),
        };
        LOG.print_last(format!("llfree-vmm: thread '{name}' {panic}; please report this\n{trace}").as_bytes());
    });
}

fn execute(cli: &Cli, background: Option<Background>) -> u8 {
    // Not locked: a workload prints from a thread of its own.
    let mut stdout = io::stdout();
    let json = cli.global.json;
    let mut output = Output { terminal: stdout.is_terminal(), to: &mut stdout, json };
    let result = match &cli.command {
        None => run::run(&cli.global, &cli.launch, background, &mut output),
        Some(Command::Demo(args)) => demo::run(args, &mut output),
        Some(Command::Areas(args)) => match areas::run(args, &mut output) {
            Ok(code) => return code,
            Err(error) => return fail(&error, json),
        },
        Some(Command::Completions { shell }) => {
            completions::write(*shell, output.to).map(|()| exit::OK).map_err(RunError::Output)
        }
        Some(Command::Exporter(args)) => match exporter::run(args, &mut output) {
            Ok(code) => return code,
            Err(error) => return fail(&error, json),
        },
        Some(Command::Top { interval }) => match top::run(*interval, &output) {
            Ok(code) => return code,
            Err(error) => return fail(&error, json),
        },
        Some(Command::Client(command)) => match client_commands::run(&cli.global, command, &mut output) {
            Ok(code) => return code,
            Err(error) => return fail(&error, json),
        },
    };
    result.unwrap_or_else(|error| fail(&error, json))
}

/// Prints an error: for people on stderr, in one line unless a guest crashed; for programs on stdout, too.
fn fail(error: &impl Fails, json: bool) -> u8 {
    let failure = error.failure();
    report(&failure, json);
    failure.exit_code
}

fn report(failure: &Failure, json: bool) {
    // Nobody is left to tell if these fail.
    if json {
        let _ = io::stdout().write_all(failure.to_line().as_bytes());
    }
    LOG.print_last(format!("llfree-vmm: error: {}\n", failure.message).as_bytes());
}

/// Prints help, a version or a usage error.
fn refuse(end: &args::Exit) -> u8 {
    if end.code == exit::OK {
        let _ = io::stdout().write_all(end.text.as_bytes());
        return end.code;
    }
    let message = end.text.trim_end().trim_start_matches("llfree-vmm: error: ").to_owned();
    let failure = Failure { kind: "usage".to_owned(), reason: None, message, exit_code: end.code };
    // What was not understood is not there to be asked.
    report(&failure, std::env::args_os().any(|arg| arg == "--json"));
    end.code
}

/// The end of the process that launched a VM in the background.
fn end_caller(end: &CallerEnd, json: bool) -> u8 {
    if end.is_silent {
        let source = io::Error::other("the launch ended when it had left the terminal; see its log file");
        fail(&RunError::Host { step: "go on in the background", source }, json);
    }
    let _ = io::stdout().write_all(&end.words);
    end.code
}
