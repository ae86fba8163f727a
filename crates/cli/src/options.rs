//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand};
use ruse_vmm::config::{Topology, parse_size};
use ruse_vmm::{Accel, CpuModel, Direct, DiskConfig, SerialMode};

/// Of `--disk`: with brackets, which would be links in a comment.
const DISK_HELP: &str = "A disk in a file or block device: PATH[,readonly][,serial=TEXT][,queues=N][,ring=split]. May be given several times";

/// What follows the help.
const EXIT_CODES: &str = "\
Exit codes:
  0            the guest powered off, or the machine was ended from the keyboard
  1            ruse failed, or was ended by a signal
  2            bad input: options, kernel, initrd
  3            a vCPU made a triple fault
  4            the guest's kernel panicked (and asked for a reset: panic=-1 on its command line)
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
    /// Boots a machine; without a kernel, the default guest.
    Run(Box<RunOptions>),
    /// Says what this host offers to machines.
    Doctor(DoctorOptions),
}

/// Options of `ruse run`.
#[derive(Debug, Args)]
#[command(after_help = format!("{KEYS}\n{EXIT_CODES}"))]
pub struct RunOptions {
    /// Name of the machine.
    #[arg(long, default_value = "ruse")]
    pub name: String,
    /// Engine that runs the vCPUs: auto, kvm or dbt.
    #[arg(long, default_value = "auto")]
    pub accel: Accel,
    /// Kernel: a bzImage, an ELF image with a PVH note, or a multiboot kernel [default: the default guest's].
    #[arg(long, value_name = "PATH")]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk; several, or modules of a multiboot kernel, as PATH,PATH.
    #[arg(long, value_name = "PATH")]
    pub initrd: Option<PathBuf>,
    /// Command line of the kernel; for the default guest's kernel more words after its own.
    #[arg(long, value_name = "STRING", allow_hyphen_values = true)]
    pub cmdline: Option<String>,
    /// RAM, with a unit K, M, G or T; without one in MiB.
    #[arg(long, value_name = "SIZE", default_value = "512M", value_parser = parse_size)]
    pub memory: u64,
    /// CPUs: a number of cores, or sockets=N,cores=N,threads=N.
    #[arg(long, default_value = "1")]
    pub cpus: Topology,
    /// Features of the CPUs: max (all that the engine has), x86-64-v3 or x86-64-v2 (the same under both engines).
    #[arg(long, value_name = "NAME", default_value = "max")]
    pub cpu: CpuModel,
    /// The first serial port: stdio, null or file=PATH.
    #[arg(long, value_name = "WHERE", default_value = "stdio")]
    pub serial: SerialMode,
    /// Disks, each as [`DiskConfig`] reads it.
    #[arg(long = "disk", value_name = "DISK", help = DISK_HELP)]
    pub disks: Vec<DiskConfig>,
    /// Empty slots for PCI devices, 0 to 8.
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub slots: u8,
    /// Force a tier of the translator: 0 interprets, 1 translates.
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
        assert_eq!(options.memory, 1 << 30);
        assert_eq!(options.cmdline.as_deref(), Some("-x y"));
        assert!(options.verbose && options.kernel.is_none());
        assert!(Cli::try_parse_from(["ruse", "run", "--json"]).is_err());
    }
}
