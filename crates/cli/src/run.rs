//! `ruse run`: from options to a machine that has ended.

use std::fs::File;
use std::io::Write;
use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use anyhow::Context;
use ruse_guest::{DEFAULT_CMDLINE, VIRTIO_CMDLINE};
use ruse_image::{Image, Machines};
use ruse_manager::{ConsoleHub, Name, Registration, Registry, serve};
use ruse_vmm::config::format_size;
use ruse_vmm::doctor::{Choice, choose};
use ruse_vmm::host::host_memory;
use ruse_vmm::{
    Accel, Console, ConsoleConfig, Control, DiskConfig, Machine, MachineConfig, MachineError, MachineInfo,
    NetConfig, NetOption, SeedConfig, SerialMode, VsockConfig, engine_for,
};

use crate::failure::Failure;
use crate::options::RunOptions;
use crate::terminal::RawMode;
use crate::{console, detach, guest, image, monitor, outcome, signals};

/// What a machine is called for which nothing is said.
const DEFAULT_NAME: &str = "ruse";
/// The socket device's socket in a machine's folder.
const VSOCK: &str = "vsock";
/// A guest's address at its socket device for which nothing is said. Guests do not see each other there.
const IMAGE_CID: u32 = 3;
/// Stands for the kernel of a guest that is not there yet.
const NOT_FETCHED: &str = "(the guest's, not fetched yet)";

/// Runs a machine and gives the exit code. `started` is when the process started.
pub fn run(options: &RunOptions, started: Instant) -> Result<u8, Failure> {
    let mut config = config(options)?;
    // What is wrong with the options must not wait for a download.
    config.validate(host_memory()).map_err(MachineError::from)?;
    let choice = choose(&config);
    if options.dry_run {
        return dry_run(options, config, &choice);
    }
    if options.detach && !options.detached {
        return detach::start();
    }
    let image = match &options.image {
        Some(name) => Some(image::find_or_build(name)?),
        None => None,
    };
    if let Some(image) = &image {
        use_image_kernel(&mut config, image);
    } else if options.kernel.is_none() {
        let files = guest::prepare().map_err(Failure::other)?;
        use_default_guest(&mut config, files);
    }
    boot(options, config, image, &choice, started)
}

/// The machine that the options describe; without a kernel yet if they name none.
fn config(options: &RunOptions) -> Result<MachineConfig, Failure> {
    let kernel = options.kernel.clone().unwrap_or_default();
    let on_virtio = options.consoles.iter().any(ConsoleConfig::is_stdio);
    let serial = if on_virtio { SerialMode::Null } else { SerialMode::default() };
    let default_cmdline = if on_virtio { VIRTIO_CMDLINE } else { DEFAULT_CMDLINE };
    let cmdline = match (&options.kernel, &options.cmdline) {
        _ if options.image.is_some() => image_words(on_virtio, options.cmdline.as_deref()),
        (_, None) => default_cmdline.to_owned(),
        (Some(_), Some(words)) => words.clone(),
        (None, Some(words)) => format!("{default_cmdline} {words}").trim_end().to_owned(),
    };
    Ok(MachineConfig {
        name: options.name.as_ref().or(options.image.as_ref()).map_or(DEFAULT_NAME, |name| name).into(),
        kind: options.machine,
        memory: options.memory.size,
        max_memory: options.memory.max,
        cpus: options.cpus,
        cpu: options.cpu,
        initrd: options.initrd.clone(),
        cmdline,
        serial: options.serial.clone().unwrap_or(serial),
        debug_exit: options.debug_exit,
        disks: options.disks.clone(),
        seed: SeedConfig::of(
            options.user_data.clone(),
            options.meta_data.clone(),
            options.network_config.clone(),
        ),
        pmems: options.pmems.clone(),
        balloon: options.balloon,
        watchdog: options.watchdog,
        consoles: options.consoles.clone(),
        shares: options.shares.clone(),
        vsock: options.vsock.clone(),
        nets: nets(options)?,
        slots: options.slots,
        accel: options.accel,
        tier: options.tier,
        check: options.check,
        direct: options.direct,
        perf_map: options.perf_map,
        jitdump: options.jitdump.clone(),
        ..MachineConfig::new(kernel)
    })
}

/// The network devices: without a word about them, one for the default guest. Published ports are of the first that can.
fn nets(options: &RunOptions) -> Result<Vec<NetConfig>, Failure> {
    let mut nets: Vec<_> = options.nets.iter().filter_map(|NetOption(net)| net.clone()).collect();
    if nets.len() < options.nets.len() && options.nets.len() > 1 {
        return Err(Failure::input("--net: none goes with no other"));
    }
    if options.nets.is_empty() && (options.kernel.is_none() || !options.publish.is_empty()) {
        nets.push(NetConfig::user());
    }
    if !options.publish.is_empty() {
        let publish = nets.iter_mut().find_map(NetConfig::published);
        let publish = publish.ok_or_else(|| Failure::input("--publish: there is no --net user"))?;
        publish.clone_from(&options.publish);
    }
    Ok(nets)
}

/// What follows an image's own words on the kernel's command line.
fn image_words(on_virtio: bool, words: Option<&str>) -> String {
    let console = if on_virtio { "console=hvc0 " } else { "" };
    format!("{console}{}", words.unwrap_or_default()).trim_end().to_owned()
}

/// Takes the default guest's kernel, and its initramfs unless another is given.
fn use_default_guest(config: &mut MachineConfig, files: ruse_guest::GuestFiles) {
    config.kernel = files.kernel;
    config.initrd.get_or_insert(files.initrd);
}

/// Takes the kernel that boots an image.
fn use_image_kernel(config: &mut MachineConfig, image: &Image) {
    config.kernel = image.kernel();
    config.initrd = Some(image.initrd());
}

/// Gives the machine a disk of its own with the image on it, before all others.
fn use_image(config: &mut MachineConfig, image: &Image, fresh: bool) -> Result<(), Failure> {
    let machines = Machines::open()?;
    config.disks.insert(0, machines.disk(&config.name, image, fresh)?);
    let words = machines.find(&config.name)?.cmdline(&config.name);
    config.cmdline = format!("{words} {}", config.cmdline).trim_end().to_owned();
    Ok(())
}

/// Shows the machine. Its files are loaded for trial, if they are there.
fn dry_run(options: &RunOptions, mut config: MachineConfig, choice: &Choice) -> Result<u8, Failure> {
    let mut missing = false;
    match (&options.image, &options.kernel) {
        (Some(name), _) => match image::find(name)? {
            Some(image) => use_image_kernel(&mut config, &image),
            None => missing = true,
        },
        (None, Some(_)) => {}
        (None, None) => match guest::prepared() {
            Some(files) => use_default_guest(&mut config, files),
            None => missing = true,
        },
    }
    if missing {
        config.kernel = NOT_FETCHED.into();
    } else {
        // The machine would have a folder for its sockets.
        let vsock = config.vsock.clone().filter(|vsock| vsock.vhost || vsock.path.is_some());
        Machine::load(MachineConfig { vsock, ..config.clone() })?;
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
    let disk = |disk: &DiskConfig| {
        format!("{}{}", if disk.vhost_user { "vhost-user=" } else { "" }, disk.path.display())
    };
    let mut disks: Vec<_> = config.disks.iter().map(disk).collect();
    disks.extend(config.seed.as_ref().map(|_| "cidata".to_owned()));
    let disks = if disks.is_empty() { "none".to_owned() } else { disks.join(" ") };
    let networks: Vec<_> = config.nets.iter().map(|net| net.network.to_string()).collect();
    let networks = if networks.is_empty() { "none".to_owned() } else { networks.join(" ") };
    let memory = format_size(config.memory);
    let memory = config.max_memory.map_or(memory.clone(), |max| format!("{memory} to {}", format_size(max)));
    let lines = [
        ("name", config.name.clone()),
        ("engine", format!("{}: {}", engine_name(choice.engine), choice.reason)),
        ("machine", config.kind.to_string()),
        ("memory", memory),
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
        ("networks", networks),
        ("debug exit", if config.debug_exit { "port 0xf4" } else { "none" }.into()),
    ];
    lines.iter().map(|(name, value)| format!("{name:11} {value}\n")).collect()
}

/// Loads the guest, runs it to its end and says how it went.
fn boot(
    options: &RunOptions,
    mut config: MachineConfig,
    image: Option<Image>,
    choice: &Choice,
    started: Instant,
) -> Result<u8, Failure> {
    let stats = options.stats.as_ref().map(|path| output_file("--stats", path)).transpose()?;
    let engine = engine_for(&config, choice).map_err(MachineError::from)?;
    tracing::info!(engine = engine.name(), reason = choice.reason, "engine chosen");
    let registration = register(options, &config)?;
    if let Some(registration) = &registration {
        config.name = registration.name().to_owned();
        if image.is_some() {
            // By it the host reaches the image's SSH server.
            config.vsock.get_or_insert(VsockConfig { cid: IMAGE_CID, path: None, vhost: false });
        }
        if let Some(vsock) = config.vsock.as_mut().filter(|vsock| !vsock.vhost) {
            vsock.path.get_or_insert_with(|| registration.dir().join(VSOCK));
        }
    }
    if let Some(image) = image {
        use_image(&mut config, &image, options.fresh)?;
    }
    let machine = Machine::load(config.clone())?;
    let link = Arc::default();
    let (local, raw) = local_console(options, &config, &link)?;
    let (hub, console) = ConsoleHub::around(local).context("cannot set up the console")?;
    let running = machine.start(&*engine, console)?;
    let control = running.control();
    link.connect(control.clone());
    let signal = signals::watch(control.clone()).context("cannot handle signals")?;
    let guests = registration.map(|registration| serve(registration, control.clone(), hub)).transpose();
    let guests = guests.context("cannot answer at the control socket")?;
    if options.detached {
        detach::leave(&config.name)?;
    }
    let outcome = running.wait();
    drop(guests);
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

/// Makes the machine known to other commands. One in the foreground runs without, if need be.
fn register(options: &RunOptions, config: &MachineConfig) -> Result<Option<Registration>, Failure> {
    let name = match &options.name {
        Some(name) => Name::Exactly(name.clone()),
        None => Name::Like(config.name.clone()),
    };
    let registration = Registry::open().and_then(|registry| registry.register(&name, config));
    match registration {
        Ok(registration) => Ok(Some(registration)),
        Err(error) if error.is_bad_input() || options.detached => Err(error.into()),
        Err(error) => {
            tracing::warn!(%error, "other commands will not find this machine");
            Ok(None)
        }
    }
}

/// The program's own end of the machine's console.
fn local_console(
    options: &RunOptions,
    config: &MachineConfig,
    link: &Arc<console::Link>,
) -> Result<(Console, Option<RawMode>), Failure> {
    match &config.serial {
        SerialMode::File(path) => Ok((Console::to_file(output_file("--serial", path)?), None)),
        SerialMode::Null if !config.has_stdio_console() => Ok((Console::default(), None)),
        _ if options.detached => Ok((Console::default(), None)),
        SerialMode::Null | SerialMode::Stdio => {
            let raw = RawMode::enter().context("cannot set up the terminal")?;
            Ok((console::stdio(raw.is_some(), link), raw))
        }
    }
}

/// Makes the file that an option names.
fn output_file(option: &str, path: &Path) -> Result<File, Failure> {
    ruse_vmm::console::output_file(path)
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
