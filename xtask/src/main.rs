//! Chores of the project: `cargo xtask bench`, `fuzz`, `io`, `lab`, `loads`, `monitors` and `stress`.

mod bench;
mod fuzz;
mod io;
mod lab;
mod loads;
mod monitors;
mod resident;
mod running;
mod stress;
#[path = "../../crates/cli/tests/boot/vmlinux.rs"]
mod vmlinux;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Chores of the project.
#[derive(Parser)]
#[command(name = "cargo xtask")]
struct Arguments {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Runs the benchmark guest natively, under QEMU's translator and under Ruse, and compares.
    Bench(bench::Options),
    /// Runs the fuzz targets with inputs that libFuzzer mutates by coverage.
    Fuzz(fuzz::Options),
    /// Compares disks, networks and shared folders under Ruse and under QEMU.
    Io(io::Options),
    /// Runs tests of the KVM engine on hardware virtualization that QEMU emulates.
    Lab(lab::Options),
    /// Runs programs of Debian's packages natively and in guests, and compares what they write and their times.
    Loads(loads::Options),
    /// Compares Ruse over /dev/kvm with other monitors: start, exits, memory, boot.
    Monitors(monitors::Options),
    /// Runs random programs in a guest and on this host, and compares what they find.
    Stress(stress::Options),
}

fn main() -> ExitCode {
    let done = match Arguments::parse().chore {
        Chore::Bench(options) => bench::run(&options),
        Chore::Fuzz(options) => fuzz::run(&options),
        Chore::Io(options) => io::run(&options),
        Chore::Lab(options) => lab::run(&options),
        Chore::Loads(options) => loads::run(&options),
        Chore::Monitors(options) => monitors::run(&options),
        Chore::Stress(options) => stress::run(&options),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
