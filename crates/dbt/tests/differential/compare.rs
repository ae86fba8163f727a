//! Whether two outcomes agree.

use crate::case::{Case, NONE, Outcome, SLOT, WINDOW, WINDOW_BYTES};

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

/// Describes how `found` differs from `expected`.
pub fn difference(case: &Case, expected: &Outcome, found: &Outcome) -> Option<String> {
    let mut text = String::new();
    let name = case.instruction_at(expected, found);
    let (fault, intel) = (expected.vector != NONE, is_intel());
    // Bytes that a mask leaves out may or may not fault (SDM volume 2, MASKMOVDQU).
    if (name.contains("askmovdqu") || name.contains("askmovq")) && expected.vector != found.vector {
        return None;
    }
    let mut differ = |what: String, a: String, b: String| {
        if a != b {
            text += &format!("  {what}: host {a}, found {b}\n");
        }
    };
    let vector = |o: &Outcome| if o.vector == NONE { "none".into() } else { o.vector.to_string() };
    differ("exception".into(), vector(expected), vector(found));
    if expected.vector == PF && expected.address.wrapping_sub(WINDOW - 4096) < WINDOW_BYTES as u64 + 8192 {
        differ("error code".into(), format!("{:x}", expected.error), format!("{:x}", found.error));
        // In which order an instruction of many accesses makes them is the CPU's affair.
        let unit = if makes_many_accesses(&name) { 4096 } else { 1 };
        differ(
            "address".into(),
            format!("{:x}", expected.address / unit),
            format!("{:x}", found.address / unit),
        );
    }
    let (a, b) = (&expected.state, &found.state);
    differ("rip".into(), format!("{:x}", a.rip), format!("{:x}", b.rip));
    for (n, (a, b)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        differ(format!("r{n}"), format!("{a:x}"), format!("{b:x}"));
    }
    let slot = (a.rip.wrapping_sub(crate::case::CODE) as usize / SLOT).min(case.count);
    let defined = FLAGS & !case.undefined[slot];
    if intel || !(fault && name.contains("cas")) {
        differ("flags".into(), format!("{:x}", a.flags & defined), format!("{:x}", b.flags & defined));
    }
    let word = |s: &[u8], at: usize| format!("{:02x}{:02x}", s[at + 1], s[at]);
    differ("fcw".into(), word(&a.fpu, 0), word(&b.fpu, 0));
    // Whether a result that an unmasked underflow holds back is inexact too is not known.
    let mxcsr = |o: &Outcome| {
        let value = u32::from_le_bytes(o.state.fpu[24..28].try_into().unwrap());
        match expected.vector {
            XM => value & !0x20,
            // The conversion may come before the fault of its store.
            _ if fault && name.contains("Vcvtps2ph") => 0,
            _ => value,
        }
    };
    differ("mxcsr".into(), format!("{:x}", mxcsr(expected)), format!("{:x}", mxcsr(found)));
    let hex = |bytes: &[u8]| bytes.iter().rev().map(|b| format!("{b:02x}")).collect::<String>();
    // An MMX instruction that faults may or may not have entered MMX mode.
    if !(fault && name.contains("_mm")) {
        differ("fsw".into(), word(&a.fpu, 2), word(&b.fpu, 2));
        differ("ftw".into(), format!("{:02x}", a.fpu[4]), format!("{:02x}", b.fpu[4]));
        for n in 0..8 {
            let st = |s: &[u8; 832]| hex(&s[32 + 16 * n..][..10]);
            differ(format!("st{n}"), st(&a.fpu), st(&b.fpu));
        }
    }
    // What a gather that faulted leaves in the parts that it does not fill differs between makers.
    let vectors = if fault && !intel && name.contains("ather") { 0 } else { 16 };
    for n in 0..vectors {
        let ymm = |s: &[u8; 832]| hex(&s[576 + 16 * n..][..16]) + "_" + &hex(&s[160 + 16 * n..][..16]);
        differ(format!("ymm{n}"), ymm(&a.fpu), ymm(&b.fpu));
    }
    for (n, (a, b)) in expected.window.chunks(16).zip(found.window.chunks(16)).enumerate() {
        differ(format!("[{:x}]", WINDOW as usize + 16 * n), hex(a), hex(b));
    }
    if text.is_empty() {
        return None;
    }
    for (n, value) in case.state.gpr.iter().enumerate() {
        text += &format!("  before: r{n} {value:x}\n");
    }
    text += &format!(
        "  before: flags {:x} mxcsr {} fcw {} fsw {}\n",
        case.state.flags,
        hex(&case.state.fpu[24..28]),
        word(&case.state.fpu, 0),
        word(&case.state.fpu, 2)
    );
    for n in 0..16 {
        let s = &case.state.fpu;
        text += &format!(
            "  before: ymm{n} {}_{}\n",
            hex(&s[576 + 16 * n..][..16]),
            hex(&s[160 + 16 * n..][..16])
        );
    }
    Some(text)
}
