//! Fuzz targets: everything that parses what a guest or a user gives.
//!
//! A target takes any bytes and panics if something is wrong. The tests of this crate give each a fixed number of
//! random inputs; `cargo xtask fuzz` gives them inputs that LLVM's libFuzzer mutates by coverage, for as long as one
//! likes. What is found gets a test of its own in the crate at fault. `docs/testing.md` says how to run all this.

mod bus;
mod control;
mod devices;
mod fs;
mod images;
mod input;
mod loader;
mod network;
mod options;
mod packages;
mod scan;
mod tier0;
mod translator;
mod vcpu;
mod vhost;
mod virtio;

/// A fuzz target.
pub struct Target {
    /// The name on the command line.
    pub name: &'static str,
    /// Runs it on one input.
    pub run: fn(&[u8]),
    /// Bytes of a usual input.
    pub len: usize,
    /// Random inputs that the test of this crate gives it: about two seconds' worth.
    pub cases: u32,
}

/// All targets.
pub const TARGETS: &[Target] = &[
    Target { name: "tier0", run: tier0::run, len: 256, cases: 3000 },
    Target { name: "translator", run: translator::run, len: 256, cases: 3000 },
    Target { name: "devices", run: devices::run, len: 2048, cases: 4000 },
    Target { name: "scan", run: scan::run, len: 512, cases: 1500 },
    Target { name: "fs", run: fs::run, len: 1024, cases: 2000 },
    Target { name: "virtio", run: virtio::run, len: 1024, cases: 4000 },
    Target { name: "vhost", run: vhost::run, len: 256, cases: 1500 },
    Target { name: "network", run: network::run, len: 1024, cases: 2000 },
    Target { name: "loader", run: loader::run, len: 256, cases: 2000 },
    Target { name: "images", run: images::run, len: 256, cases: 1000 },
    Target { name: "packages", run: packages::run, len: 256, cases: 400 },
    Target { name: "control", run: control::run, len: 64, cases: 50_000 },
    Target { name: "options", run: options::run, len: 96, cases: 50_000 },
];
