//! The monitors that are compared, and how each is told to run the same machine.

use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result};
use clap::ValueEnum;
use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
use serde::{Deserialize, Serialize};

use crate::bench::{GUEST_RAM, QEMU};

/// MiB of RAM that guests get.
const MEMORY: u32 = 256;

/// Who runs the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Peer {
    /// Ruse with `--accel kvm`.
    Ruse,
    /// QEMU's machine without PCI and legacy devices.
    QemuMicrovm,
    /// QEMU's machine of a PC with PCI Express.
    QemuQ35,
    /// Alioth, a small monitor in Rust.
    Alioth,
}

/// What is run.
pub struct Guest<'a> {
    /// An ELF kernel with the PVH note.
    pub kernel: &'a Path,
    /// The initramfs and the command line of a system.
    pub system: Option<(&'a Path, &'a str)>,
}

impl Peer {
    /// The name on the command line and in reports.
    pub fn name(self) -> &'static str {
        match self {
            Peer::Ruse => "ruse",
            Peer::QemuMicrovm => "qemu-microvm",
            Peer::QemuQ35 => "qemu-q35",
            Peer::Alioth => "alioth",
        }
    }

    /// The program, which is in the search path, and where it comes from; Ruse's own is known.
    pub fn program(self) -> Option<(&'static str, &'static str)> {
        match self {
            Peer::Ruse => None,
            Peer::QemuMicrovm | Peer::QemuQ35 => Some((QEMU, "Debian has it in qemu-system-x86")),
            Peer::Alioth => Some(("alioth", "cargo install alioth-cli")),
        }
    }

    /// Whether its program is on this machine.
    pub fn is_here(self) -> bool {
        let runs = |program| {
            let status = Command::new(program).arg("--version").stdout(Stdio::null()).status();
            status.is_ok_and(|status| status.success())
        };
        self.program().is_none_or(|(program, _)| runs(program))
    }

    /// Part of the path of mappings that are the guest's RAM.
    pub fn ram(self) -> &'static str {
        if self == Peer::Ruse { GUEST_RAM } else { "/memfd:" }
    }

    /// Runs `guest` with one CPU over /dev/kvm; its first serial port is standard output. RAM is an anonymous file and
    /// the interrupt chips but the local APIC are the monitor's, under all of them.
    pub fn command(self, ruse: &Path, guest: &Guest) -> Command {
        match self {
            Peer::Ruse => {
                let mut command = Command::new(ruse);
                command.args(["run", "--accel", "kvm", "--cpus", "1", "--memory", &format!("{MEMORY}M")]);
                command.arg("--kernel").arg(guest.kernel);
                if let Some((initrd, cmdline)) = guest.system {
                    command.arg("--initrd").arg(initrd).args(["--cmdline", cmdline]);
                }
                command
            }
            Peer::QemuMicrovm => qemu("microvm", guest),
            Peer::QemuQ35 => qemu("q35", guest),
            Peer::Alioth => {
                let mut command = Command::new("alioth");
                command.args(["boot", "--cpu", "count=1"]);
                command.args(["--memory", &format!("size={MEMORY}M,backend=memfd")]);
                command.arg("--pvh").arg(guest.kernel);
                if let Some((initrd, cmdline)) = guest.system {
                    command.arg("--initramfs").arg(initrd).args(["--cmdline", cmdline]);
                }
                command
            }
        }
    }

    /// What it reads: nothing, but one wants a terminal.
    pub fn input(self) -> Result<Input> {
        if self != Peer::Alioth {
            return Ok(Input { _user: None, program: Stdio::null() });
        }
        let user = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).context("opening a terminal")?;
        grantpt(&user).and_then(|()| unlockpt(&user)).context("unlocking a terminal")?;
        let name = ptsname(&user, Vec::new())?.into_string()?;
        let program = OpenOptions::new().read(true).write(true).open(name)?.into();
        Ok(Input { _user: Some(user), program })
    }
}

/// Standard input, and the other end of the terminal that it is.
pub struct Input {
    /// Has to stay open while the program runs.
    _user: Option<OwnedFd>,
    /// The program's end.
    pub program: Stdio,
}

fn qemu(machine: &str, guest: &Guest) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-nodefaults", "-no-user-config", "-display", "none", "-serial", "stdio"]);
    command.args([
        "-M",
        &format!("{machine},accel=kvm,kernel-irqchip=split,memory-backend=ram"),
        "-cpu",
        "host",
    ]);
    command.args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY}M")]);
    command.args(["-m", &MEMORY.to_string(), "-smp", "1", "-no-reboot"]).arg("-kernel").arg(guest.kernel);
    if let Some((initrd, cmdline)) = guest.system {
        command.arg("-initrd").arg(initrd).args(["-append", cmdline]);
    }
    command
}
