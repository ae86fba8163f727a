//! Whether two outcomes agree.

use crate::{
    case::{Case, NONE, Outcome, WINDOW, WINDOW_BYTES},
    flow::{ARITHMETIC, Flow},
};

/// Arithmetic flags and DF.
const FLAGS: u64 = 0xcd5;
/// Page fault.
const PF: u64 = 14;
/// SIMD exception.
const XM: u64 = 19;

fn is_intel() -> bool {
    std::arch::x86_64::__cpuid(0).ebx == u32::from_le_bytes(*b"Genu")
}

fn makes_many_accesses(name: &str) -> bool {
    ["Fldenv", "Frstor", "maskmov", "Maskmov"].iter().any(|part| name.contains(part))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().map(|b| format!("{b:02x}")).collect()
}

/// Lines about what differs.
struct Report(String);

impl Report {
    fn number(&mut self, what: impl FnOnce() -> String, host: u64, found: u64) {
        if host != found {
            self.0 += &format!("  {}: host {host:x}, found {found:x}\n", what());
        }
    }

    fn bytes(&mut self, what: impl FnOnce() -> String, host: &[u8], found: &[u8]) {
        if host != found {
            self.0 += &format!("  {}: host {}, found {}\n", what(), hex(host), hex(found));
        }
    }
}

/// What the rules of comparison look at.
struct Rules {
    /// The instruction at which the first of the two stopped.
    name: String,
    /// The host stopped with an exception.
    fault: bool,
    intel: bool,
    /// Flags that count.
    flags: u64,
}

/// Flags that are defined where the host stopped, and after a fault of an executor that forgets the dead ones those
/// that are alive.
fn flags_that_count(case: &Case, expected: &Outcome, forgets_dead: bool) -> u64 {
    match case.index_of(expected.state.rip) {
        Some(n) if n < case.count && forgets_dead => {
            FLAGS & !case.undefined[n] & (Flow::of(case).live_before(n) | !ARITHMETIC)
        }
        Some(n) => FLAGS & !case.undefined[n],
        None => FLAGS & !case.undefined.iter().fold(0, |all, some| all | some),
    }
}

/// Describes how `found` differs from `expected`. `forgets_dead`: [`crate::case::Executor::forgets_dead_flags`].
pub fn difference(case: &Case, expected: &Outcome, found: &Outcome, forgets_dead: bool) -> Option<String> {
    let rules = Rules {
        name: case.instruction_at(expected, found),
        fault: expected.vector != NONE,
        intel: is_intel(),
        flags: flags_that_count(case, expected, forgets_dead),
    };
    // Bytes that a mask leaves out may or may not fault (SDM volume 2, MASKMOVDQU).
    let stopped = |o: &Outcome| (o.vector, o.state.rip);
    let masked = rules.name.contains("askmovdqu") || rules.name.contains("askmovq");
    if masked && stopped(expected) != stopped(found) {
        return None;
    }
    let mut report = Report(String::new());
    fault_and_flags(&mut report, &rules, expected, found);
    report.number(|| "code".into(), expected.code, found.code);
    floating(&mut report, &rules, expected, found);
    // An operand of ten bytes over the end of a page may be written in part.
    if !(expected.vector == PF && rules.name.contains("m80")) {
        let parts = expected.window.chunks(16).zip(found.window.chunks(16));
        for (n, (a, b)) in parts.enumerate() {
            report.bytes(|| format!("[{:x}]", WINDOW as usize + 16 * n), a, b);
        }
    }
    if report.0.is_empty() { None } else { Some(report.0 + &inputs(case)) }
}

fn fault_and_flags(report: &mut Report, rules: &Rules, expected: &Outcome, found: &Outcome) {
    report.number(|| "exception".into(), expected.vector, found.vector);
    if expected.vector == PF && expected.address.wrapping_sub(WINDOW - 4096) < WINDOW_BYTES as u64 + 8192 {
        report.number(|| "error code".into(), expected.error, found.error);
        // In which order an instruction of many accesses makes them is the CPU's affair.
        let unit = if makes_many_accesses(&rules.name) { 4096 } else { 1 };
        report.number(|| "address".into(), expected.address / unit, found.address / unit);
    }
    let (a, b) = (&expected.state, &found.state);
    report.number(|| "rip".into(), a.rip, b.rip);
    for (n, (a, b)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        report.number(|| format!("r{n}"), *a, *b);
    }
    if rules.intel || !(rules.fault && (rules.name.contains("Cmps") || rules.name.contains("Scas"))) {
        report.number(|| "flags".into(), a.flags & rules.flags, b.flags & rules.flags);
    }
}

fn floating(report: &mut Report, rules: &Rules, expected: &Outcome, found: &Outcome) {
    let (a, b) = (&expected.state.fpu, &found.state.fpu);
    report.bytes(|| "fcw".into(), &a[..2], &b[..2]);
    // An MMX instruction that faults may or may not have entered MMX mode.
    if !(rules.fault && rules.name.contains("_mm")) {
        report.bytes(|| "fsw".into(), &a[2..4], &b[2..4]);
        report.bytes(|| "ftw".into(), &a[4..5], &b[4..5]);
        for n in 0..8 {
            let st = 32 + 16 * n..42 + 16 * n;
            report.bytes(|| format!("st{n}"), &a[st.clone()], &b[st]);
        }
    }
    let mxcsr = |o: &Outcome| {
        let value = u64::from(u32::from_le_bytes([24, 25, 26, 27].map(|at| o.state.fpu[at])));
        match expected.vector {
            // Of an instruction of several steps, those that came after the exception may or may not count.
            XM if rules.name.contains("dpp") || rules.name.contains("Dpp") => value & !0x3f,
            // Whether a result that an unmasked underflow holds back is inexact too is not known.
            XM => value & !0x20,
            // The conversion may come before the fault of its store.
            _ if rules.fault && rules.name.contains("Vcvtps2ph") => 0,
            _ => value,
        }
    };
    report.number(|| "mxcsr".into(), mxcsr(expected), mxcsr(found));
    // What a gather that faulted leaves in the parts that it does not fill differs between makers.
    let vectors = if rules.fault && !rules.intel && rules.name.contains("ather") { 0 } else { 16 };
    for n in 0..vectors {
        let (low, high) = (160 + 16 * n..176 + 16 * n, 576 + 16 * n..592 + 16 * n);
        report.bytes(|| format!("xmm{n}"), &a[low.clone()], &b[low]);
        report.bytes(|| format!("ymm{n} high"), &a[high.clone()], &b[high]);
    }
}

/// The registers before.
fn inputs(case: &Case) -> String {
    let s = &case.state;
    let mut text = String::new();
    for (n, value) in s.gpr.iter().enumerate() {
        text += &format!("  before: r{n} {value:x}\n");
    }
    let (fcw, fsw, mxcsr) = (hex(&s.fpu[..2]), hex(&s.fpu[2..4]), hex(&s.fpu[24..28]));
    text += &format!("  before: flags {:x} mxcsr {mxcsr} fcw {fcw} fsw {fsw}\n", s.flags);
    for n in 0..16 {
        let (low, high) = (hex(&s.fpu[160 + 16 * n..][..16]), hex(&s.fpu[576 + 16 * n..][..16]));
        text += &format!("  before: ymm{n} {high}_{low}\n");
    }
    text
}
