//! What a user writes: sizes, topologies and the other values of options, and the machine that they describe.

use arbitrary::Unstructured;
use ruse_vmm::config::{format_size, parse_size};
use ruse_vmm::{Accel, CpuModel, MachineConfig, SerialMode, Topology};

use crate::input::{number, one_in, pick};

/// Pieces of valid texts.
const PIECES: [&str; 24] = [
    "sockets",
    "cores",
    "threads",
    "=",
    ",",
    "0",
    "1",
    "2",
    "64",
    "4294967296",
    "18446744073709551616",
    "-",
    "+",
    "k",
    "KiB",
    "M",
    "gb",
    "T",
    "b",
    "auto",
    "file=",
    "stdio",
    " ",
    "\u{661}",
];

fn text(u: &mut Unstructured) -> String {
    if one_in(u, 4) {
        return u.arbitrary().unwrap_or_default();
    }
    let pieces = u.int_in_range(0..=8).unwrap_or(0);
    (0..pieces).map(|_| pick(u, &PIECES)).collect()
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let size = number(u);
    assert_eq!(parse_size(&format!("{size}b")), Ok(size));
    assert!(!format_size(size).is_empty());

    let memory = parse_size(&text(u)).unwrap_or(number(u));
    let cpus = text(u).parse::<Topology>().unwrap_or(Topology {
        sockets: number(u) as u32,
        cores: number(u) as u32,
        threads: number(u) as u32,
    });
    let parts = format!("threads={},sockets={},cores={}", cpus.threads, cpus.sockets, cpus.cores);
    assert_eq!(parts.parse(), Ok(cpus));
    let config = MachineConfig {
        name: text(u),
        memory,
        cpus,
        cpu: text(u).parse::<CpuModel>().unwrap_or_default(),
        serial: text(u).parse::<SerialMode>().unwrap_or_default(),
        accel: text(u).parse::<Accel>().unwrap_or_default(),
        tier: u.arbitrary().unwrap_or_default(),
        check: one_in(u, 2),
        ..MachineConfig::new("kernel")
    };
    match config.validate(number(u)) {
        Ok(()) => assert!((1..=64).contains(&cpus.count()) && memory.is_multiple_of(4096)),
        Err(error) => assert!(!error.to_string().contains('\n'), "one line: {error}"),
    }
}
