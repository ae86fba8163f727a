//! The command line.

use std::path::PathBuf;

use crate::disk::DiskCommand;
use crate::hotplug::{AttachOptions, DetachOptions, LinkOptions};
use crate::image::ImageCommand;
use crate::manage::{InfoOptions, MachineName, PsOptions, ResizeOptions, StopOptions};
use crate::ssh::{CpOptions, ExecOptions, ProxyOptions, SshOptions};
use clap::{Args, Parser, Subcommand};
use ruse_net::user::Publish;
use ruse_vmm::config::{Topology, parse_size};
use ruse_vmm::{
    Accel, ConsoleConfig, CpuModel, Direct, DiskConfig, MachineKind, MemorySize, NetOption, PmemConfig,
    SerialMode, ShareConfig, VsockConfig, WatchdogAction,
};

/// Of `--disk`: with brackets, which would be links in a comment.
const DISK_HELP: &str = "A disk in a file or block device: PATH[,format=NAME][,readonly][,serial=TEXT][,queues=N][,iops=N][,bps=SIZE][,on-error=pause|report][,ring=split]; or one that another process serves: vhost-user=SOCKET[,queues=N][,ring=split]. May be given several times";

/// Of `--memory`.
const MEMORY_HELP: &str =
    "RAM, with a unit K, M, G or T; without one in MiB. With ,max=SIZE it can have more later (ruse memory)";
/// Of `--pmem`.
const PMEM_HELP: &str = "A file in the guest's memory, /dev/pmem0 in Linux: PATH[,readonly], of a multiple of 2 MiB. May be given several times";

/// Of `--console`.
const CONSOLE_HELP: &str = "A virtio console, hvc0 in Linux: stdio (in place of the serial port), null, file=PATH or socket=PATH; with ,name=NAME a port of that name. May be given several times";

/// Of `--share`.
const SHARE_HELP: &str = "A folder of the host's that the guest can mount (mount -t virtiofs TAG DIR): FOLDER:TAG[,ro][,cache=never|auto|always], or vhost-user=SOCKET:TAG for one that another process serves. May be given several times";
/// Of `--vsock`.
const VSOCK_HELP: &str = "Sockets between guest and host: CID[,path=PATH] with the guest's address and the Unix socket by which the host's programs reach it, or CID,vhost for AF_VSOCK of the host's kernel";
/// Of `--net`.
const NET_HELP: &str = "A network device: user[,dns=ADDR][,loopback][,restrict], switch=NAME, vhost-user=SOCKET, tap=NAME, bridge=NAME or macvtap=NAME (these three with [,queues=N][,netns=NAME][,vhost=on|off|auto]), or none; for all: [,mac=ADDR][,mtu=N][,ring=split]. May be given twice [default: user for the default guest]";
/// Of `--publish`.
const PUBLISH_HELP: &str = "A port of this host that leads to one of the guest: [ADDR:]HOSTPORT:GUESTPORT[/udp], ADDR being 127.0.0.1 unless given. May be given several times";

/// What follows the help.
const EXIT_CODES: &str = "\
Exit codes:
  0            the guest powered off, or the machine was ended from the keyboard
  1            ruse failed, or was ended by a signal
  2            bad input: options, kernel, initrd
  3            a vCPU made a triple fault
  4            the guest's kernel panicked (and said so by pvpanic, or printed it and asked for a reset: panic=-1)
  v << 1 | 1   the guest wrote v to the port of --debug-exit";

/// What follows the help of `run`.
const KEYS: &str = "\
Keys, when the guest has the terminal:
  Ctrl-A x       end the machine
  Ctrl-A c       monitor prompt: info, stats, pause, resume, reset, shutdown, quit
  Ctrl-A h       list of these keys
  Ctrl-A Ctrl-A  send Ctrl-A to the guest
";

/// A virtual machine monitor.
#[derive(Debug, Parser)]
#[command(name = "ruse", version, after_help = EXIT_CODES)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Boots a machine: an image, a kernel, or the default guest.
    Run(Box<RunOptions>),
    /// Makes, converts, resizes, checks and describes disk images.
    Disk {
        /// What to do.
        #[command(subcommand)]
        command: DiskCommand,
    },
    /// Says what this host offers to machines.
    Doctor(DoctorOptions),
    /// Builds, lists and removes guest images.
    Image {
        /// What to do with images.
        #[command(subcommand)]
        command: ImageCommand,
    },
    /// Lists the machines that run.
    Ps(PsOptions),
    /// Tells what a machine is and does.
    Info(InfoOptions),
    /// Shows a machine's serial console, and what it printed before. Ctrl-A d leaves it.
    Console(MachineName),
    /// A shell, or a command for one, in a machine that runs an image.
    Ssh(SshOptions),
    /// A program in a machine that runs an image.
    Exec(ExecOptions),
    /// Copies files to and from a machine that runs an image.
    Cp(CpOptions),
    /// Connects standard input and output with a machine's SSH server.
    #[command(hide = true)]
    VsockProxy(ProxyOptions),
    /// Shuts a machine down by its power button; after a time without an answer it is ended.
    Stop(StopOptions),
    /// Holds a machine.
    Pause(MachineName),
    /// Lets a machine that is held run on.
    Resume(MachineName),
    /// Resets a machine.
    Reset(MachineName),
    /// Lets a machine that was started with --memory SIZE,max=SIZE have more RAM, or less; without a size, says what it has.
    Memory(ResizeOptions),
    /// Asks a machine that was started with --balloon to give back so much RAM; without a size, says what it has given.
    Balloon(ResizeOptions),
    /// Puts a disk or a network device into a slot of a machine that runs, and says what it is called (--slots).
    Attach(AttachOptions),
    /// Takes a device out of its slot, when the machine's system has let go of it.
    Detach(DetachOptions),
    /// Plugs or pulls the cable of a machine's network devices.
    Link(LinkOptions),
}

/// Options of `ruse run`.
#[derive(Debug, Args)]
#[command(after_help = format!("{KEYS}\n{EXIT_CODES}"))]
pub struct RunOptions {
    /// An image to run; debian is built where it is missing [default: the default guest].
    #[arg(conflicts_with_all = ["kernel", "initrd"])]
    pub image: Option<String>,
    /// Throw away what the machine of this name has on its disk, and begin with the image anew.
    #[arg(long, requires = "image")]
    pub fresh: bool,
    /// Name of the machine [default: the image's or ruse, or with a number behind it].
    #[arg(long)]
    pub name: Option<String>,
    /// Return when the machine runs; its console is at `ruse console`, messages go to a log.
    #[arg(long)]
    pub detach: bool,
    /// This is the process of a machine that was started with `--detach`.
    #[arg(long, hide = true)]
    pub detached: bool,
    /// Engine that runs the vCPUs: auto, kvm or dbt.
    #[arg(long, default_value = "auto")]
    pub accel: Accel,
    /// What the machine is like: pc, or microvm, the smallest, without PCI (no --slots, no --watchdog).
    #[arg(long, value_name = "KIND", default_value = "pc")]
    pub machine: MachineKind,
    /// Kernel: a bzImage, an ELF image with a PVH note, or a multiboot kernel [default: the default guest's].
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; several, or modules of a multiboot kernel, as PATH,PATH.
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel; for the default guest's kernel or an image more words after its own.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// RAM, as [`MemorySize`] reads it.
    #[arg(long, value_name = "SIZE", default_value = "512M", help = MEMORY_HELP)]
    pub memory: MemorySize,
    /// CPUs: a number of cores, or sockets=N,cores=N,threads=N.
    #[arg(long, default_value = "1")]
    pub cpus: Topology,
    /// Features of the CPUs: max (all that the engine has), x86-64-v3 or x86-64-v2 (the same under both engines).
    #[arg(long, value_name = "NAME", default_value = "max")]
    pub cpu: CpuModel,
    /// The first serial port: stdio, null or file=PATH [default: stdio; null with --console stdio].
    #[arg(long, value_name = "WHERE")]
    pub serial: Option<SerialMode>,
    /// Disks, each as [`DiskConfig`] reads it.
    #[arg(long = "disk", value_name = "DISK", help = DISK_HELP)]
    pub disks: Vec<DiskConfig>,
    /// For cloud-init in the guest, which finds it on one more disk labelled cidata (NoCloud): what to set up, a script or
    /// #cloud-config.
    #[arg(long, value_name = "FILE")]
    pub user_data: Option<PathBuf>,
    /// For cloud-init: which instance this is [default: its ID is the machine's name, as its host name].
    #[arg(long, value_name = "FILE")]
    pub meta_data: Option<PathBuf>,
    /// For cloud-init: networks, in version 1 or 2 of its format.
    #[arg(long, value_name = "FILE")]
    pub network_config: Option<PathBuf>,
    /// Persistent memory, as [`PmemConfig`] reads it.
    #[arg(long = "pmem", value_name = "PMEM", help = PMEM_HELP)]
    pub pmems: Vec<PmemConfig>,
    /// A balloon, by which the guest gives back memory, of this size at first; 0 for what it does not use by itself.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub balloon: Option<u64>,
    /// A watchdog (Intel 6300ESB) that does this if its guest does not answer in time: reset, poweroff, pause or none.
    #[arg(long, value_name = "ACTION")]
    pub watchdog: Option<WatchdogAction>,
    /// Virtio consoles and ports, each as [`ConsoleConfig`] reads it.
    #[arg(long = "console", value_name = "CONSOLE", help = CONSOLE_HELP)]
    pub consoles: Vec<ConsoleConfig>,
    /// Shared folders, each as [`ShareConfig`] reads it.
    #[arg(long = "share", value_name = "SHARE", help = SHARE_HELP)]
    pub shares: Vec<ShareConfig>,
    /// Sockets between guest and host, as [`VsockConfig`] reads it.
    #[arg(long, value_name = "VSOCK", help = VSOCK_HELP)]
    pub vsock: Option<VsockConfig>,
    /// Network devices, each as [`NetOption`] reads it.
    #[arg(long = "net", value_name = "NET", help = NET_HELP)]
    pub nets: Vec<NetOption>,
    /// Published ports, each as [`Publish`] reads it.
    #[arg(long, value_name = "PORTS", help = PUBLISH_HELP)]
    pub publish: Vec<Publish>,
    /// Empty slots for devices that are attached while the machine runs, 0 to 8.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub slots: u8,
    /// Force a tier of the translator: 0 interprets, 1 translates whatever it can, even code that is written again and
    /// again.
    #[arg(long)]
    pub tier: Option<u8>,
    /// Run both tiers of the translator in lock-step and stop at the first difference.
    #[arg(long)]
    pub check: bool,
    /// When the translator lets user code run directly on the host's CPU: auto (where that is faster), always or off.
    #[arg(long, value_name = "WHEN", default_value = "auto")]
    pub direct: Direct,
    /// Write names of translated code to /tmp/perf-PID.map, for perf report.
    #[arg(long)]
    pub perf_map: bool,
    /// Write translated code to DIR/jit-PID.dump, for perf inject --jit.
    #[arg(long, value_name = "DIR")]
    pub jitdump: Option<PathBuf>,
    /// Write counters to this file at the end, as JSON.
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Give the guest a port, 0xf4, where writing v ends ruse with exit code v << 1 | 1.
    #[arg(long)]
    pub debug_exit: bool,
    /// Show the machine that would run, and end.
    #[arg(long)]
    pub dry_run: bool,
    /// Show it as JSON.
    #[arg(long, requires = "dry_run")]
    pub json: bool,
    /// Print what happens, and at the end counters and times.
    #[arg(short, long)]
    pub verbose: bool,
}

/// Options of `ruse doctor`.
#[derive(Debug, Args)]
pub struct DoctorOptions {
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_options_are_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn options_are_read() {
        let words =
            ["ruse", "run", "--cpus", "sockets=2,cores=2", "--memory", "1G", "--cmdline", "-x y", "-v"];
        let Command::Run(options) = Cli::try_parse_from(words).unwrap().command else { panic!() };
        assert_eq!(options.cpus.count(), 4);
        assert_eq!(options.memory, MemorySize { size: 1 << 30, max: None });
        assert_eq!(options.cmdline.as_deref(), Some("-x y"));
        assert!(options.verbose && options.kernel.is_none());
        assert!(Cli::try_parse_from(["ruse", "run", "--json"]).is_err());
    }
}
