//! The binary: reads the command line, runs one thing, prints errors as one line (a crashed guest's
//! registers below it).

use cli::args::{self, Cli, Command};
use cli::client_commands::{self, Output};
use cli::log_writer::LOG;
use cli::{advice, demo, exit, run};
use env_logger::{Builder, Env, Logger, Target, WriteStyle};
use log::{Log, Metadata, Record};
use std::backtrace::{Backtrace, BacktraceStatus};
use std::io::{IsTerminal, Write};
use std::process::ExitCode;

fn main() -> ExitCode {
    // Tests make the whole binary fail through a variable.
    #[cfg(feature = "fault-injection")]
    let _scenario = llfree_base::faults::Scenario::start();
    let cli = match args::parse(std::env::args_os()) {
        Ok(cli) => cli,
        Err(end) => {
            // Nobody is left to tell if these fail.
            let _ = if end.code == exit::OK {
                std::io::stdout().write_all(end.text.as_bytes())
            } else {
                std::io::stderr().write_all(end.text.as_bytes())
            };
            return ExitCode::from(end.code);
        }
    };
    start_logging(cli.global.verbose);
    report_panics();
    let code = execute(&cli);
    LOG.finish();
    ExitCode::from(code)
}

fn start_logging(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    let mut builder = Builder::from_env(Env::default().default_filter_or(level));
    // The logger cannot see what lies behind a writer of ours, and would use no colour.
    let plain = std::env::var_os("TERM").is_none_or(|term| term == "dumb") || std::env::var_os("NO_COLOR").is_some();
    if std::env::var_os("RUST_LOG_STYLE").is_none() && std::io::stderr().is_terminal() && !plain {
        builder.write_style(WriteStyle::Always);
    }
    let logger = builder.target(Target::Pipe(Box::new(&LOG))).build();
    log::set_max_level(logger.filter());
    // It fails if there is a logger already, and here is the only place that sets one.
    let _ = log::set_boxed_logger(Box::new(ToTheEnd(logger)));
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

/// A panic ends the process, whether or not somebody reads of it.
fn report_panics() {
    std::panic::set_hook(Box::new(|panic| {
        let thread = std::thread::current();
        let name = thread.name().unwrap_or("?").to_owned();
        let trace = Backtrace::capture();
        let trace = if trace.status() == BacktraceStatus::Captured { format!("{trace}") } else { String::new() };
        LOG.print_last(format!("llfree-vmm: thread '{name}' {panic}; please report this\n{trace}").as_bytes());
    }));
}

fn execute(cli: &Cli) -> u8 {
    // Not locked: a workload prints from a thread of its own.
    let mut stdout = std::io::stdout();
    let mut output = Output { terminal: stdout.is_terminal(), to: &mut stdout, json: cli.global.json };
    let result = match &cli.command {
        None => run::run(&cli.global, &cli.launch, &mut output),
        Some(Command::Demo(args)) => demo::run(args, &mut output),
        Some(Command::Client(command)) => match client_commands::run(&cli.global, command, &mut output) {
            Ok(code) => return code,
            Err(error) => return fail(&advice::line(&error), error.exit_code()),
        },
    };
    result.unwrap_or_else(|error| fail(&error.report(), error.exit_code()))
}

/// Prints an error, which is one line unless a guest crashed.
fn fail(error: &str, code: u8) -> u8 {
    LOG.print_last(format!("llfree-vmm: error: {error}\n").as_bytes());
    code
}
