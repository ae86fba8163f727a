//! Check mode: each instruction that the translator can make is executed by both tiers from the same state, and the first
//! difference stops the vCPU. Meant for one vCPU: another one's writes between the two runs would count as differences.

use std::fmt::Write as _;

use iced_x86::{Formatter, Instruction, IntelFormatter};
use ruse_arch::{
    Exception,
    flags::rflags,
    paging::Access,
    state::{reg, seg},
};

use super::{blocks::Source, vcpu::DbtVcpu};
use crate::{
    backend::x86_64::exit,
    cpu::{Cpu, FpuArea, Who},
    frontend::x86_64::{ARITH, CodeMode},
    ir::{Op, Region},
    mmu::access::Place,
    tier0::{self, operand::segment_index, vector},
};

/// What both tiers must agree on.
#[derive(Clone)]
struct Outcome {
    gpr: [u64; 16],
    rip: u64,
    rflags: u64,
    bases: [u64; 3],
    fpu: FpuArea,
    memory: Vec<(u64, Vec<u8>)>,
}

impl DbtVcpu {
    /// Executes one instruction in both tiers. `Ok(Some(text))` describes a difference.
    pub(super) fn check(&mut self, mode: CodeMode) -> Result<Option<String>, Exception> {
        let insn = tier0::decode(&mut self.cpu)?;
        let Some((region, source)) = self.lift_for_check(mode)? else { return self.step() };
        if matches!(region.nodes[0].op, Op::Interpret | Op::TimeStamp) {
            return self.step();
        }
        let windows = self.windows(&insn);
        vector::spill_x87(&mut self.cpu);
        let before = capture(&mut self.cpu, &windows);
        let Some(block) = self.store(&region, source, mode) else { return self.step() };
        self.enter(block, mode);
        vector::spill_x87(&mut self.cpu);
        self.clear_blocks();
        let left_to_tier0 = matches!(self.cpu.exit_reason, exit::FAULT | exit::INTERPRET);
        self.cpu.rip = if left_to_tier0 { before.rip } else { self.cpu.exit_value };
        let translated = capture(&mut self.cpu, &windows);
        if left_to_tier0 {
            let difference = compare(&before, &translated, rflags::ARITH);
            restore(&mut self.cpu, &before);
            tier0::step(&mut self.cpu)?;
            return Ok(difference.map(|d| report(&insn.i, "left to tier 0, but changed", &d)));
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

    /// A region of the one instruction at RIP, with all flags alive behind it.
    fn lift_for_check(&mut self, mode: CodeMode) -> Result<Option<(Region, Source)>, Exception> {
        let va = self.cpu.rip;
        let Place::Ram(host) = self.cpu.place(va, 1, Access::Fetch, Who::Current)? else { return Ok(None) };
        let left = 4096 - va as usize % 4096;
        let mut bytes = [0; 15];
        let bytes = &mut bytes[..left.min(15)];
        crate::mmu::access::load(host, bytes);
        let Some(mut region) = self.blocks.lift_one(va, bytes, mode) else { return Ok(None) };
        region.live_at_end = ARITH;
        for node in &mut region.nodes {
            if node.op.ends_region() || matches!(node.op, Op::Branch { .. }) {
                node.live_at_exit = ARITH;
            }
        }
        region.compute_liveness();
        let source = Source::new(&region, host as u64 & !0xfff, None);
        Ok(Some((region, source)))
    }

    /// RAM that the instruction may change: around its operand and the stack pointer.
    fn windows(&mut self, insn: &tier0::Insn) -> Vec<(u64, usize)> {
        let cpu = &mut self.cpu;
        let mut list = vec![(cpu.gpr[reg::RSP].wrapping_sub(32), 64)];
        let i = &insn.i;
        if i.memory_size().size() != 0 {
            let base = match segment_index(i.memory_segment()) {
                s @ (seg::FS | seg::GS) => cpu.seg[s].base,
                _ => 0,
            };
            list.push((base.wrapping_add(cpu.effective_address(insn)), i.memory_size().size()));
        }
        list.retain(|&(la, len)| {
            let last = la.wrapping_add(len as u64 - 1);
            [la, last].into_iter().all(|at| {
                let place = cpu.is_canonical(at).then(|| cpu.place(at, 1, Access::Read, Who::Current));
                matches!(place, Some(Ok(Place::Ram(_))))
            })
        });
        list
    }
}

fn capture(cpu: &mut Cpu, windows: &[(u64, usize)]) -> Outcome {
    let memory = windows
        .iter()
        .map(|&(la, len)| {
            let mut bytes = vec![0; len];
            // The places were looked up before; a failure leaves zeroes on both sides.
            let _ = cpu.read_linear(la, &mut bytes, Who::Current);
            (la, bytes)
        })
        .collect();
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
    for (la, bytes) in &o.memory {
        let mut now = vec![0; bytes.len()];
        if cpu.read_linear(*la, &mut now, Who::Current).is_ok() && now != *bytes {
            let _ = cpu.write_linear(*la, bytes, Who::Current);
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
    let mut differ = |name: &str, x: u64, y: u64| {
        if x != y {
            let _ = write!(out, "; {name}: {x:#x} / {y:#x}");
        }
    };
    for (i, (&x, &y)) in a.gpr.iter().zip(&b.gpr).enumerate() {
        differ(&format!("register {i}"), x, y);
    }
    differ("rip", a.rip, b.rip);
    differ("rflags", a.rflags & !undefined, b.rflags & !undefined);
    for (name, (x, y)) in ["fs", "gs", "kernel gs"].into_iter().zip(a.bases.into_iter().zip(b.bases)) {
        differ(name, x, y);
    }
    let (x, y) = (a.fpu.save(), b.fpu.save());
    differ("mxcsr", x.mxcsr.into(), y.mxcsr.into());
    differ("fcw", x.fcw.into(), y.fcw.into());
    differ("fsw", x.fsw.into(), y.fsw.into());
    differ("ftw", x.ftw.into(), y.ftw.into());
    for (i, (p, q)) in x.ymm.iter().zip(&y.ymm).enumerate() {
        for (k, (&p, &q)) in p.iter().zip(q).enumerate() {
            differ(&format!("ymm{i}[{k}]"), p, q);
        }
    }
    for (i, (p, q)) in x.st.iter().zip(&y.st).enumerate() {
        if p != q {
            differ(&format!("st{i} differs"), 0, 1);
        }
    }
    for ((la, p), (_, q)) in a.memory.iter().zip(&b.memory) {
        for (k, (&p, &q)) in p.iter().zip(q).enumerate() {
            differ(&format!("memory {:#x}", la.wrapping_add(k as u64)), p.into(), q.into());
        }
    }
    (!out.is_empty()).then_some(out)
}

fn report(i: &Instruction, what: &str, difference: &str) -> String {
    let mut text = String::new();
    IntelFormatter::new().format(i, &mut text);
    format!("{text} at {:#x}: {what}{difference}", i.ip())
}
