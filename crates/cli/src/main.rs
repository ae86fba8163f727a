//! The `ruse` program: words on the command line to a machine, and a machine's end to an exit code.

mod attach;
mod console;
mod detach;
mod disk;
mod doctor;
mod escape;
mod failure;
mod guest;
mod hotplug;
mod image;
mod manage;
mod monitor;
mod options;
mod outcome;
mod output;
mod progress;
mod run;
mod signals;
mod ssh;
mod terminal;

use std::env;
use std::io;
use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use ruse_manager::protocol::Request;

use crate::failure::Failure;
use crate::options::{Cli, Command};

fn main() -> ExitCode {
    let started = Instant::now();
    terminal::restore_on_panic();
    let result = parse().and_then(|cli| match cli.command {
        Command::Run(options) => {
            start_log(options.verbose);
            run::run(&options, started)
        }
        Command::Disk { command } => {
            start_log(false);
            disk::disk(&command)
        }
        Command::Doctor(options) => doctor::doctor(&options),
        Command::Image { command } => image::image(&command),
        Command::Ps(options) => manage::ps(&options),
        Command::Info(options) => manage::info(&options),
        Command::Console(machine) => attach::console(&machine),
        Command::Ssh(options) => ssh::ssh(&options),
        Command::Exec(options) => ssh::exec(&options),
        Command::Cp(options) => ssh::cp(&options),
        Command::VsockProxy(options) => ssh::proxy(&options),
        Command::Stop(options) => manage::stop(&options),
        Command::Pause(machine) => manage::request(&machine, Request::Pause),
        Command::Resume(machine) => manage::request(&machine, Request::Resume),
        Command::Reset(machine) => manage::request(&machine, Request::Reset),
        Command::Memory(options) => manage::memory(&options),
        Command::Balloon(options) => manage::balloon(&options),
        Command::Attach(options) => hotplug::attach(&options),
        Command::Detach(options) => hotplug::detach(&options),
        Command::Link(options) => hotplug::link(&options),
    });
    let code = match result {
        Ok(code) => code,
        Err(failure) => {
            failure.print();
            failure.code
        }
    };
    ExitCode::from(code)
}

/// Reads the command line. What clap has to say in several lines is said in one.
fn parse() -> Result<Cli, Failure> {
    use clap::error::ErrorKind;
    Cli::try_parse().or_else(|error| match error.kind() {
        ErrorKind::DisplayHelp
        | ErrorKind::DisplayVersion
        | ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand => {
            // `exit` prints where it belongs, and a closed pipe is no error.
            error.exit()
        }
        _ => Err(Failure::input(failure::one_line(&error.to_string()))),
    })
}

/// Messages of the libraries go to standard error: errors and warnings, with `-v` more, or what RUSE_LOG says
/// (`debug`, or `ruse_kvm=debug,warn`).
fn start_log(verbose: bool) {
    use tracing_subscriber::{filter::LevelFilter, filter::Targets, fmt, prelude::*};
    let default = if verbose { LevelFilter::INFO } else { LevelFilter::WARN };
    let asked = env::var("RUSE_LOG").ok().and_then(|text| text.parse::<Targets>().ok());
    let filter = asked.unwrap_or_else(|| Targets::new().with_default(default));
    let lines = fmt::layer().with_writer(io::stderr).without_time().log_internal_errors(false);
    tracing_subscriber::registry().with(lines).with(filter).init();
}
