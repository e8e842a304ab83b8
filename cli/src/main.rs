//! The binary: reads the command line, runs one thing, prints errors as one line (a crashed guest's
//! registers below it).

use cli::args::{self, Cli, Command};
use cli::client_commands::{self, Output};
use cli::{advice, demo, exit, run};
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
    ExitCode::from(execute(&cli))
}

fn start_logging(verbose: u8) {
    let level = ["warn", "info", "debug", "trace"][usize::from(verbose.min(3))];
    env_logger::Builder::from_env(env_logger::Env::default().default_filter_or(level)).init();
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
    let _ = writeln!(std::io::stderr(), "llfree-vmm: error: {error}");
    code
}
