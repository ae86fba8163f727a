//! `ruse run`: from options to a machine that has ended.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use ruse_guest::DEFAULT_CMDLINE;
use ruse_vmm::config::format_size;
use ruse_vmm::doctor::{Choice, choose};
use ruse_vmm::host::host_memory;
use ruse_vmm::{
    Accel, Console, Control, Machine, MachineConfig, MachineError, MachineInfo, SerialMode, engine_for,
};

use crate::failure::Failure;
use crate::options::RunOptions;
use crate::terminal::RawMode;
use crate::{console, guest, monitor, outcome, signals};

/// Stands for the default guest's kernel while it is not there.
const NOT_FETCHED: &str = "(the default guest's, not fetched yet)";

/// Runs a machine and gives the exit code. `started` is when the process started.
pub fn run(options: &RunOptions, started: Instant) -> Result<u8, Failure> {
    let mut config = config(options);
    // What is wrong with the options must not wait for a download.
    config.validate(host_memory()).map_err(MachineError::from)?;
    let choice = choose(&config);
    if options.dry_run {
        return dry_run(options, config, &choice);
    }
    if options.kernel.is_none() {
        let files = guest::prepare().map_err(Failure::other)?;
        use_default_guest(&mut config, files);
    }
    boot(options, config, &choice, started)
}

/// The machine that the options describe; without a kernel yet if they name none.
fn config(options: &RunOptions) -> MachineConfig {
    let kernel = options.kernel.clone().unwrap_or_default();
    let cmdline = match (&options.kernel, &options.cmdline) {
        (_, None) => DEFAULT_CMDLINE.to_owned(),
        (Some(_), Some(words)) => words.clone(),
        (None, Some(words)) => format!("{DEFAULT_CMDLINE} {words}").trim_end().to_owned(),
    };
    MachineConfig {
        name: options.name.clone(),
        memory: options.memory,
        cpus: options.cpus,
        cpu: options.cpu,
        initrd: options.initrd.clone(),
        cmdline,
        serial: options.serial.clone(),
        debug_exit: options.debug_exit,
        disks: options.disks.clone(),
        slots: options.slots,
        accel: options.accel,
        tier: options.tier,
        check: options.check,
        direct: options.direct,
        perf_map: options.perf_map,
        jitdump: options.jitdump.clone(),
        ..MachineConfig::new(kernel)
    }
}

/// Takes the default guest's kernel, and its initramfs unless another is given.
fn use_default_guest(config: &mut MachineConfig, files: ruse_guest::GuestFiles) {
    config.kernel = files.kernel;
    config.initrd.get_or_insert(files.initrd);
}

/// Shows the machine. Its files are loaded for trial, if they are there.
fn dry_run(options: &RunOptions, mut config: MachineConfig, choice: &Choice) -> Result<u8, Failure> {
    let files = if options.kernel.is_none() { guest::prepared() } else { None };
    let missing = options.kernel.is_none() && files.is_none();
    if let Some(files) = files {
        use_default_guest(&mut config, files);
    }
    if missing {
        config.kernel = NOT_FETCHED.into();
    } else {
        Machine::load(config.clone())?;
    }
    let text = if options.json {
        let machine = serde_json::json!({ "machine": config, "engine": choice });
        serde_json::to_string_pretty(&machine).context("cannot write the machine")?
    } else {
        describe(&config, choice)
    };
    // A reader who has gone has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(0)
}

/// An engine's name.
pub fn engine_name(engine: Accel) -> &'static str {
    match engine {
        Accel::Auto => "auto",
        Accel::Kvm => "kvm",
        Accel::Dbt => "dbt",
    }
}

fn describe(config: &MachineConfig, choice: &Choice) -> String {
    let cpus = config.cpus;
    let initrd = config.initrd.as_ref().map_or("none".into(), |path| path.display().to_string());
    let serial = match &config.serial {
        SerialMode::Stdio => "stdio".into(),
        SerialMode::Null => "null".into(),
        SerialMode::File(path) => path.display().to_string(),
    };
    let disks: Vec<_> = config.disks.iter().map(|disk| disk.path.display().to_string()).collect();
    let disks = if disks.is_empty() { "none".to_owned() } else { disks.join(" ") };
    let lines = [
        ("name", config.name.clone()),
        ("engine", format!("{}: {}", engine_name(choice.engine), choice.reason)),
        ("memory", format_size(config.memory)),
        (
            "cpus",
            format!(
                "{} (sockets={},cores={},threads={})",
                cpus.count(),
                cpus.sockets,
                cpus.cores,
                cpus.threads
            ),
        ),
        ("kernel", config.kernel.display().to_string()),
        ("initrd", initrd),
        ("cmdline", config.cmdline.clone()),
        ("serial", serial),
        ("disks", disks),
        ("debug exit", if config.debug_exit { "port 0xf4" } else { "none" }.into()),
    ];
    lines.iter().map(|(name, value)| format!("{name:11} {value}\n")).collect()
}

/// Loads the guest, runs it to its end and says how it went.
fn boot(
    options: &RunOptions,
    config: MachineConfig,
    choice: &Choice,
    started: Instant,
) -> Result<u8, Failure> {
    let serial = config.serial.clone();
    let stats = options.stats.as_ref().map(|path| output_file("--stats", path)).transpose()?;
    let engine = engine_for(&config, choice).map_err(MachineError::from)?;
    tracing::info!(engine = engine.name(), reason = choice.reason, "engine chosen");
    let machine = Machine::load(config)?;
    let link = Arc::default();
    let mut raw = None;
    let console = match serial {
        SerialMode::Null => Console::default(),
        SerialMode::File(path) => Console::to_file(output_file("--serial", &path)?),
        SerialMode::Stdio => {
            raw = RawMode::enter().context("cannot set up the terminal")?;
            console::stdio(raw.is_some(), &link)
        }
    };
    let running = machine.start(&*engine, console)?;
    let control = running.control();
    link.connect(control.clone());
    let signal = signals::watch(control.clone()).context("cannot handle signals")?;
    let outcome = running.wait();
    drop(raw);
    let info = control.info();
    if options.verbose {
        summarize(&control, &info, started);
    }
    if let Some(file) = stats {
        serde_json::to_writer_pretty(file, &info).context("--stats: cannot write the counters")?;
    }
    Ok(outcome::finish(&outcome, signal.get().copied()))
}

/// Makes the file that an option names.
fn output_file(option: &str, path: &Path) -> Result<File, Failure> {
    File::create(path)
        .map_err(|error| Failure::input(format!("{option}: cannot write '{}': {error}", path.display())))
}

/// Times and counters, on standard error.
fn summarize(control: &Control, info: &MachineInfo, started: Instant) {
    let mut text = String::new();
    if let Some(entered) = control.first_entry() {
        let ms = entered.saturating_duration_since(started).as_secs_f64() * 1000.0;
        text += &format!("process start to first guest instruction: {ms:.1} ms\n");
    }
    text += &monitor::describe(info);
    text += &monitor::counters(info);
    let _ = write!(std::io::stderr(), "{text}");
}
