//! Whether two outcomes agree.

use crate::{
    case::{Case, NONE, Outcome, WINDOW, WINDOW_BYTES, digest},
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

/// What of an outcome counts, by where and how the host stopped.
pub struct Rules {
    /// The instruction at which it stopped.
    name: String,
    /// It stopped with this exception.
    vector: u64,
    intel: bool,
    /// Flags that count.
    flags: u64,
}

impl Rules {
    /// The rules for what the host made of a case. `forgets_dead`: [`crate::case::Executor::forgets_dead_flags`].
    pub fn new(case: &Case, expected: &Outcome, forgets_dead: bool) -> Self {
        Self {
            name: case.instruction_at(expected, expected),
            vector: expected.vector,
            intel: is_intel(),
            flags: flags_that_count(case, expected, forgets_dead),
        }
    }

    /// The outcome with all that does not count as zero.
    pub fn strip(&self, outcome: &Outcome) -> Outcome {
        let mut o = *outcome;
        self.strip_fault(&mut o);
        self.strip_fpu(&mut o);
        // An operand of ten bytes over the end of a page may be written in part.
        if self.vector == PF && self.name.contains("m80") {
            o.window.fill(0);
        }
        o
    }

    fn faults(&self) -> bool {
        self.vector != NONE
    }

    fn strip_fault(&self, o: &mut Outcome) {
        if self.vector == PF && o.address.wrapping_sub(WINDOW - 4096) < WINDOW_BYTES as u64 + 8192 {
            // In which order an instruction of many accesses makes them is the CPU's affair.
            o.address &= if makes_many_accesses(&self.name) { !0xfff } else { !0 };
        } else {
            (o.error, o.address) = (0, 0);
        }
        let compares = self.name.contains("Cmps") || self.name.contains("Scas");
        o.state.flags &= if self.faults() && compares && !self.intel { 0 } else { self.flags };
    }

    fn strip_fpu(&self, o: &mut Outcome) {
        let image = &o.state.fpu;
        let mut fpu = [0; 832];
        fpu[..2].copy_from_slice(&image[..2]);
        // An MMX instruction that faults may or may not have entered MMX mode.
        if !(self.faults() && self.name.contains("_mm")) {
            fpu[2..5].copy_from_slice(&image[2..5]);
            for st in (32..160).step_by(16) {
                fpu[st..st + 10].copy_from_slice(&image[st..st + 10]);
            }
        }
        let mxcsr = u32::from_le_bytes([24, 25, 26, 27].map(|at| image[at])) & self.mxcsr();
        fpu[24..28].copy_from_slice(&mxcsr.to_le_bytes());
        // What a gather that faulted leaves in the parts that it does not fill differs between makers.
        if !(self.faults() && !self.intel && self.name.contains("ather")) {
            for half in [160..416, 576..832] {
                fpu[half.clone()].copy_from_slice(&image[half]);
            }
        }
        o.state.fpu = fpu;
    }

    /// Bits of MXCSR that count.
    fn mxcsr(&self) -> u32 {
        match self.vector {
            // Of an instruction of several steps, those that came after the exception may or may not count.
            XM if self.name.contains("dpp") || self.name.contains("Dpp") => !0x3f,
            // Whether a result that an unmasked underflow holds back is inexact too is not known.
            XM => !0x20,
            // The conversion may come before the fault of its store.
            _ if self.faults() && self.name.contains("Vcvtps2ph") => 0,
            _ => !0,
        }
    }
}

/// Flags that are defined where the host stopped, and after a fault of an executor that forgets the dead ones those
/// that are alive.
fn flags_that_count(case: &Case, expected: &Outcome, forgets_dead: bool) -> u64 {
    let alive = |n: usize| match expected.code == digest(&case.code) {
        true => Flow::of(case).live_before(n),
        // Which flags the code reads that the case has written over its own is not known.
        false => 0,
    };
    match case.index_of(expected.state.rip) {
        Some(n) if n < case.count && forgets_dead => FLAGS & !case.undefined[n] & (alive(n) | !ARITHMETIC),
        Some(n) => FLAGS & !case.undefined[n],
        None => FLAGS & !case.undefined.iter().fold(0, |all, some| all | some),
    }
}

/// Describes how `found` differs from `expected`. `forgets_dead`: [`crate::case::Executor::forgets_dead_flags`].
pub fn difference(case: &Case, expected: &Outcome, found: &Outcome, forgets_dead: bool) -> Option<String> {
    // Bytes that a mask leaves out may or may not fault (SDM volume 2, MASKMOVDQU).
    let name = case.instruction_at(expected, found);
    let stopped = |o: &Outcome| (o.vector, o.state.rip);
    let masked = name.contains("askmovdqu") || name.contains("askmovq");
    if masked && stopped(expected) != stopped(found) {
        return None;
    }
    let rules = Rules::new(case, expected, forgets_dead);
    let (a, b) = (rules.strip(expected), rules.strip(found));
    let mut report = Report(String::new());
    fault_and_registers(&mut report, &a, &b);
    floating(&mut report, &a, &b);
    for (n, (a, b)) in a.window.chunks(16).zip(b.window.chunks(16)).enumerate() {
        report.bytes(|| format!("[{:x}]", WINDOW as usize + 16 * n), a, b);
    }
    if report.0.is_empty() { None } else { Some(report.0 + &inputs(case)) }
}

fn fault_and_registers(report: &mut Report, a: &Outcome, b: &Outcome) {
    report.number(|| "exception".into(), a.vector, b.vector);
    report.number(|| "error code".into(), a.error, b.error);
    report.number(|| "address".into(), a.address, b.address);
    report.number(|| "rip".into(), a.state.rip, b.state.rip);
    for (n, (a, b)) in a.state.gpr.iter().zip(&b.state.gpr).enumerate() {
        report.number(|| format!("r{n}"), *a, *b);
    }
    report.number(|| "flags".into(), a.state.flags, b.state.flags);
    report.number(|| "code".into(), a.code, b.code);
}

fn floating(report: &mut Report, a: &Outcome, b: &Outcome) {
    let (a, b) = (&a.state.fpu, &b.state.fpu);
    for (name, at) in [("fcw", 0..2), ("fsw", 2..4), ("ftw", 4..5), ("mxcsr", 24..28)] {
        report.bytes(|| name.into(), &a[at.clone()], &b[at]);
    }
    for n in 0..8 {
        let st = 32 + 16 * n..42 + 16 * n;
        report.bytes(|| format!("st{n}"), &a[st.clone()], &b[st]);
    }
    for n in 0..16 {
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        case::{CODE_BYTES, MOST, State},
        generate::Generator,
        pools::Pools,
        program::program,
    };

    /// A case that has stopped with a page fault before `mov rax,[rbx]; jmp rcx`.
    fn faulted() -> (Case, Outcome) {
        let mut case = program(&Pools::new(&Generator::default().codes), 1, 0);
        case.code = [0x90; CODE_BYTES];
        case.code[..5].copy_from_slice(&[0x48, 0x8b, 0x03, 0xff, 0xe1]);
        (case.starts, case.count, case.undefined) = ([5; MOST + 1], 2, [0; MOST + 1]);
        case.starts[..2].copy_from_slice(&[0, 3]);
        let state = State { rip: case.entry(), ..State::ZERO };
        let outcome = Outcome { state, vector: PF, code: digest(&case.code), ..Outcome::EMPTY };
        (case, outcome)
    }

    #[test]
    fn flags_count_where_the_code_may_read_them() {
        let (case, host) = faulted();
        let mut found = host;
        found.state.flags = 4;
        assert!(difference(&case, &host, &found, true).is_some_and(|text| text.contains("flags")));
        assert!(difference(&case, &host, &found, false).is_some());
    }

    #[test]
    fn flags_before_code_that_was_rewritten_may_be_forgotten() {
        let (case, mut host) = faulted();
        host.code ^= 1;
        let mut found = host;
        found.state.flags = 4;
        assert!(difference(&case, &host, &found, true).is_none());
        assert!(difference(&case, &host, &found, false).is_some());
        // The direction flag is no arithmetic one.
        found.state.flags = 0x400;
        assert!(difference(&case, &host, &found, true).is_some());
    }
}
