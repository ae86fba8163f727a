//! Check mode: each instruction that the translator can make is executed by both tiers from the same state, and the first
//! difference stops the vCPU. Meant for one vCPU: another one's writes between the two runs would count as differences.

use std::fmt::{Display, Write as _};

use iced_x86::{Formatter, Instruction, IntelFormatter};
use ruse_arch::{
    Exception,
    flags::rflags,
    paging::Access,
    state::{reg, seg},
};

use super::vcpu::DbtVcpu;
use crate::{
    backend::x86_64::exit,
    cpu::{Cpu, FpuArea, Who},
    frontend::x86_64::CodeMode,
    mmu::access::Place,
    tier0::{self, operand::segment_index, vector},
};

/// Bytes of a window at most: an instruction that the translator makes writes fewer.
const WINDOW: usize = 64;

/// Guest memory that an instruction may change.
#[derive(Clone, Copy)]
struct Window {
    la: u64,
    len: usize,
    bytes: [u8; WINDOW],
}

impl Window {
    fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The windows around the stack pointer and of the memory operand, for instructions that have them.
type Windows = [Option<Window>; 2];

/// What both tiers must agree on.
#[derive(Clone)]
struct Outcome {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    bases: [u64; 3],
    fpu: FpuArea,
    memory: Windows,
}

impl DbtVcpu {
    /// Executes one instruction in both tiers. `Ok(Some(text))` describes a difference.
    pub(super) fn check(&mut self, mode: CodeMode) -> Result<Option<String>, Exception> {
        let insn = tier0::decode(&mut self.cpu)?;
        let Some(block) = self.find(mode)? else { return self.step() };
        let windows = self.windows(&insn);
        vector::spill_x87(&mut self.cpu);
        self.cpu.rflags &= !rflags::RF;
        let before = capture(&mut self.cpu, &windows);
        self.enter(block, mode);
        vector::spill_x87(&mut self.cpu);
        let reason = self.cpu.exit_reason;
        let left_to_tier0 = matches!(reason, exit::FAULT | exit::INTERPRET);
        self.cpu.rip = if left_to_tier0 { before.rip } else { self.cpu.exit_value };
        let translated = capture(&mut self.cpu, &windows);
        if left_to_tier0 {
            let difference = compare(&before, &translated, rflags::ARITH);
            restore(&mut self.cpu, &before);
            tier0::step(&mut self.cpu)?;
            return Ok(difference.map(|d| report(&insn.i, "left to tier 0, but changed", &d)));
        }
        if reason == exit::AT && compare(&before, &translated, 0).is_none() {
            // A request of another thread came first.
            return Ok(None);
        }
        restore(&mut self.cpu, &before);
        if let Err(fault) = tier0::step(&mut self.cpu) {
            let text = format!("tier 0 raises {fault:?}, the translator nothing");
            return Ok(Some(report(&insn.i, &text, "")));
        }
        let plain = capture(&mut self.cpu, &windows);
        let undefined = undefined_flags(&insn.i);
        let difference = compare(&plain, &translated, undefined);
        Ok(difference.map(|d| report(&insn.i, "tier 0 / translator", &d)))
    }

    fn step(&mut self) -> Result<Option<String>, Exception> {
        tier0::step(&mut self.cpu).map(|()| None)
    }

    /// RAM that the instruction may change.
    fn windows(&mut self, insn: &tier0::Insn) -> Windows {
        let cpu = &mut self.cpu;
        let i = &insn.i;
        let stack = i.is_stack_instruction().then(|| (cpu.gpr[reg::RSP].wrapping_sub(32), WINDOW));
        let size = i.memory_size().size().min(WINDOW);
        let operand = (size != 0).then(|| {
            let base = match segment_index(i.memory_segment()) {
                s @ (seg::FS | seg::GS) => cpu.seg[s].base,
                _ => 0,
            };
            let la = tier0::bit_string_address(cpu, insn)
                .unwrap_or_else(|| base.wrapping_add(cpu.effective_address(insn)));
            (la, size)
        });
        [stack, operand].map(|window| {
            let (la, len) = window?;
            [la, la.wrapping_add(len as u64 - 1)].into_iter().try_for_each(|at| {
                let place = cpu.is_canonical(at).then(|| cpu.place(at, 1, Access::Read, Who::Current));
                matches!(place, Some(Ok(Place::Ram(_)))).then_some(())
            })?;
            Some(Window { la, len, bytes: [0; WINDOW] })
        })
    }
}

fn capture(cpu: &mut Cpu, windows: &Windows) -> Outcome {
    let memory = windows.map(|window| {
        let mut window = window?;
        // The places were looked up before; a failure leaves zeroes on both sides.
        let _ = cpu.read_linear(window.la, &mut window.bytes[..window.len], Who::Current);
        Some(window)
    });
    Outcome {
        gpr: cpu.gpr,
        rip: cpu.rip,
        rflags: cpu.rflags,
        bases: [cpu.seg[seg::FS].base, cpu.seg[seg::GS].base, cpu.kernel_gs_base],
        fpu: cpu.fpu,
        memory,
    }
}

fn restore(cpu: &mut Cpu, o: &Outcome) {
    (cpu.gpr, cpu.rip, cpu.rflags, cpu.fpu) = (o.gpr, o.rip, o.rflags, o.fpu);
    [cpu.seg[seg::FS].base, cpu.seg[seg::GS].base, cpu.kernel_gs_base] = o.bases;
    cpu.select_view();
    for window in o.memory.iter().flatten() {
        let mut now = [0; WINDOW];
        let now = &mut now[..window.len];
        if cpu.read_linear(window.la, now, Who::Current).is_ok() && now != window.bytes() {
            let _ = cpu.write_linear(window.la, window.bytes(), Who::Current);
        }
    }
}

/// Flags in RFLAGS's layout that the instruction leaves undefined.
fn undefined_flags(i: &Instruction) -> u64 {
    use iced_x86::RflagsBits as F;
    let bits = [
        (F::OF, rflags::OF),
        (F::SF, rflags::SF),
        (F::ZF, rflags::ZF),
        (F::AF, rflags::AF),
        (F::CF, rflags::CF),
        (F::PF, rflags::PF),
    ];
    let undefined = i.rflags_undefined();
    bits.into_iter().filter(|(iced, _)| undefined & iced != 0).map(|(_, ours)| ours).sum()
}

fn compare(a: &Outcome, b: &Outcome, undefined: u64) -> Option<String> {
    let mut out = String::new();
    let mut differ = |name: &dyn Display, x: u64, y: u64| {
        if x != y {
            let _ = write!(out, "; {name}: {x:#x} / {y:#x}");
        }
    };
    for (i, (&x, &y)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        differ(&format_args!("register {i}"), x, y);
    }
    differ(&"rip", a.rip, b.rip);
    differ(&"rflags", a.rflags & !undefined, b.rflags & !undefined);
    for (name, (x, y)) in ["fs", "gs", "kernel gs"].into_iter().zip(a.bases.into_iter().zip(b.bases)) {
        differ(&name, x, y);
    }
    compare_fpu(&a.fpu, &b.fpu, &mut differ);
    let windows = a.memory.iter().flatten().zip(b.memory.iter().flatten());
    for (p, q) in windows.filter(|(p, q)| p.bytes() != q.bytes()) {
        for (k, (&x, &y)) in p.bytes().iter().zip(q.bytes()).enumerate() {
            differ(&format_args!("memory {:#x}", p.la.wrapping_add(k as u64)), x.into(), y.into());
        }
    }
    (!out.is_empty()).then_some(out)
}

fn compare_fpu(a: &FpuArea, b: &FpuArea, differ: &mut dyn FnMut(&dyn Display, u64, u64)) {
    if a.fxsave == b.fxsave && a.ymm_high == b.ymm_high {
        return;
    }
    let (x, y) = (a.save(), b.save());
    differ(&"mxcsr", x.mxcsr.into(), y.mxcsr.into());
    differ(&"fcw", x.fcw.into(), y.fcw.into());
    differ(&"fsw", x.fsw.into(), y.fsw.into());
    differ(&"ftw", x.ftw.into(), y.ftw.into());
    for (i, (p, q)) in x.ymm.iter().zip(&y.ymm).enumerate() {
        for (k, (&p, &q)) in p.iter().zip(q).enumerate() {
            differ(&format_args!("ymm{i}[{k}]"), p, q);
        }
    }
    for (i, (p, q)) in x.st.iter().zip(&y.st).enumerate() {
        if p != q {
            differ(&format_args!("st{i} differs"), 0, 1);
        }
    }
}

fn report(i: &Instruction, what: &str, difference: &str) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(i, &mut text);
    format!("{text} at {:#x}: {what}{difference}", i.ip())
}
