//! Commands about machines that run: ps, info, stop, pause, resume, reset, memory, balloon.

use std::fmt::Write as _;
use std::thread;
use std::time::Duration;

use clap::Args;
use ruse_manager::protocol::{Info, Request};
use ruse_manager::{Client, Ended, Entry, ManagerError, Registry};
use ruse_vmm::config::{format_size, parse_size};
use ruse_vmm::{Phase, ResizeMemoryError};
use serde::Serialize;

use crate::failure::{Failure, complain};
use crate::monitor::{self, BALLOON_PATIENCE};
use crate::output::{age, print, print_json, table};

/// Options of `ruse ps`.
#[derive(Debug, Args)]
pub struct PsOptions {
    /// List as JSON.
    #[arg(long)]
    pub json: bool,
}

/// A machine that runs.
#[derive(Debug, Args)]
pub struct MachineName {
    /// The machine's name.
    pub name: String,
}

/// Options of `ruse info`.
#[derive(Debug, Args)]
pub struct InfoOptions {
    /// The machine's name.
    pub name: String,
    /// All of it, as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `ruse memory` and `ruse balloon`.
#[derive(Debug, Args)]
pub struct ResizeOptions {
    /// The machine's name.
    pub name: String,
    /// How much, with a unit K, M, G or T; without one in MiB.
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
}

/// Options of `ruse stop`.
#[derive(Debug, Args)]
pub struct StopOptions {
    /// The machine's name.
    pub name: String,
    /// End it at once, without asking its system to shut down.
    #[arg(long)]
    pub force: bool,
    /// Seconds that its system has to shut down; then the machine is ended.
    #[arg(long, value_name = "SECONDS", default_value_t = 60, conflicts_with = "force")]
    pub timeout: u64,
}

/// A line of `ruse ps`.
#[derive(Serialize)]
struct Row {
    name: String,
    /// The process, if that is known.
    pid: Option<u32>,
    /// What the machine does; none if it does not answer (yet).
    phase: Option<Phase>,
    engine: Option<String>,
    cpus: Option<u64>,
    memory: Option<u64>,
    uptime_ns: Option<u64>,
}

impl Row {
    fn new(registry: &Registry, entry: Entry) -> Self {
        let info = Client::connect(registry, &entry.name).and_then(|mut client| client.info()).ok();
        let config = entry.record.as_ref().map(|record| &record.config);
        Self {
            name: entry.name,
            pid: entry.record.as_ref().map(|record| record.pid),
            phase: info.as_ref().map(|info| info.machine.phase),
            engine: info.as_ref().map(|info| info.machine.engine.to_string()),
            cpus: config.map(|config| config.cpus.count()),
            memory: config.map(|config| config.memory),
            uptime_ns: info.as_ref().map(|info| info.machine.uptime_ns),
        }
    }

    fn cells(&self) -> [String; 7] {
        let text = |value: Option<String>| value.unwrap_or_else(|| "-".into());
        [
            self.name.clone(),
            text(self.pid.map(|pid| pid.to_string())),
            self.phase.map_or("not answering", monitor::phase).into(),
            text(self.engine.clone()),
            text(self.cpus.map(|cpus| cpus.to_string())),
            text(self.memory.map(format_size)),
            text(self.uptime_ns.map(|ns| age(Duration::from_nanos(ns)))),
        ]
    }
}

/// Lists the machines.
pub fn ps(options: &PsOptions) -> Result<u8, Failure> {
    let registry = Registry::open()?;
    let rows: Vec<_> = registry.list()?.into_iter().map(|entry| Row::new(&registry, entry)).collect();
    if options.json {
        return print_json(&rows);
    }
    let head = ["NAME", "PID", "STATE", "ENGINE", "CPUS", "MEMORY", "UP"].map(str::to_owned);
    let cells: Vec<_> = rows.iter().map(Row::cells).collect();
    print(&table(&head, &cells))
}

/// Tells all about a machine.
pub fn info(options: &InfoOptions) -> Result<u8, Failure> {
    let info = connect(&options.name)?.info()?;
    if options.json { print_json(&info) } else { print(&describe(&info)) }
}

fn describe(info: &Info) -> String {
    let mut text = monitor::describe(&info.machine);
    let config = &info.config;
    let _ = writeln!(text, "process {}, Ruse {}", info.pid, info.ruse);
    let _ = writeln!(text, "kernel: {}", config.kernel.display());
    if let Some(initrd) = &config.initrd {
        let _ = writeln!(text, "initrd: {}", initrd.display());
    }
    let _ = writeln!(text, "cmdline: {}", config.cmdline);
    if let Some(memory) = info.pluggable {
        let _ = write!(text, "memory: {}", monitor::memory(memory));
    }
    if let Some(balloon) = &info.balloon {
        let _ = write!(text, "balloon: {}", monitor::balloon_sizes(balloon));
    }
    for disk in &info.disks {
        let _ = write!(text, "{}: {}", disk.id, monitor::disk(disk));
    }
    for net in &info.nets {
        let link = if net.up { "up" } else { "down" };
        let _ = writeln!(text, "{}: {}, {}, link {link}", net.id, net.network, net.mac);
    }
    text
}

/// Ends a machine.
pub fn stop(options: &StopOptions) -> Result<u8, Failure> {
    let client = connect(&options.name)?;
    if options.force {
        client.end()?;
    } else if client.shut_down(Duration::from_secs(options.timeout))? == Ended::Forced {
        let StopOptions { name, timeout, .. } = options;
        complain(&format!("machine '{name}' did not shut down within {timeout} s and was ended"));
    }
    Ok(0)
}

/// Asks a machine for something that has no answer.
pub fn request(machine: &MachineName, request: Request) -> Result<u8, Failure> {
    connect(&machine.name)?.request(request)?;
    Ok(0)
}

/// Lets a machine have more RAM, or less, or says what it has.
pub fn memory(options: &ResizeOptions) -> Result<u8, Failure> {
    let mut client = connect(&options.name)?;
    match (options.size, client.info()?.pluggable) {
        (Some(size), _) => client.request(Request::Memory { size })?,
        (None, Some(memory)) => return print(&monitor::memory(memory)),
        (None, None) => return Err(Failure::input(ResizeMemoryError::Fixed)),
    }
    Ok(0)
}

/// Asks a machine for a balloon of another size, or says what it has.
pub fn balloon(options: &ResizeOptions) -> Result<u8, Failure> {
    let mut client = connect(&options.name)?;
    if let Some(size) = options.size {
        client.request(Request::Balloon { size })?;
        return Ok(0);
    }
    // An answer has what the guest told before, and asks it to tell more.
    client.info()?;
    thread::sleep(BALLOON_PATIENCE);
    match client.info()?.balloon {
        Some(balloon) => print(&monitor::balloon(&balloon)),
        None => Err(Failure::input("it was started without --balloon")),
    }
}

/// Connects to a machine.
pub fn connect(name: &str) -> Result<Client, ManagerError> {
    Client::connect(&Registry::open()?, name)
}
