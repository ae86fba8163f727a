//! x87 instructions: those that expose the layout of the state in plain Rust, the rest in the native lane.

use iced_x86::{Code, Mnemonic, Register};
use ruse_arch::{
    Exception,
    flags::{cr0, rflags},
    paging::Access,
    state::seg,
};

use super::{Insn, fpu_regs::fsw, lane};
use crate::cpu::{Cpu, FpuArea, Who};

/// First two opcode bytes of an x87 instruction (D8 to DF), or 9B and 0 for WAIT; `None` for any other instruction.
pub(super) fn opcode(insn: &Insn) -> Option<(u8, u8)> {
    if insn.i.mnemonic() == Mnemonic::Wait {
        return Some((0x9b, 0));
    }
    let mut bytes = insn.bytes[..insn.i.len().min(15)].iter().copied();
    // REX bytes are instructions outside 64-bit mode, but none that an escape opcode follows.
    let is_prefix =
        |b: u8| matches!(b, 0x26 | 0x2e | 0x36 | 0x3e | 0x40..=0x4f | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3);
    let first = bytes.find(|&b| !is_prefix(b))?;
    matches!(first, 0xd8..=0xdf).then(|| (first, bytes.next().unwrap_or(0)))
}

/// Executes an x87 instruction.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let unavailable = match insn.i.mnemonic() {
        Mnemonic::Wait => cr0::TS | cr0::MP,
        _ => 0,
    };
    let paging = cpu.paging.cr0;
    let denied = if unavailable != 0 {
        paging & unavailable == unavailable
    } else {
        paging & (cr0::EM | cr0::TS) != 0
    };
    if denied {
        return Err(Exception::NM);
    }
    match insn.i.mnemonic() {
        Mnemonic::Fninit => cpu.fpu.init_x87(),
        Mnemonic::Fnclex => {
            let kept = cpu.fpu.fsw() & !(fsw::FLAGS | fsw::SF | fsw::SUMMARY);
            cpu.fpu.set_fsw(kept);
        }
        Mnemonic::Fnstcw => return store_word(cpu, insn, cpu.fpu.fcw()),
        Mnemonic::Fnstsw => return store_word(cpu, insn, cpu.fpu.fsw()),
        Mnemonic::Fnstenv => return store_environment(cpu, insn),
        Mnemonic::Fnsave => return save(cpu, insn),
        // Instructions of the 8087 and 80287 that do nothing since (SDM volume 3, 23.18.6).
        Mnemonic::Fneni | Mnemonic::Fndisi | Mnemonic::Fnsetpm => {}
        _ => return waiting(cpu, insn),
    }
    Ok(())
}

/// Instructions that a pending exception comes before.
fn waiting(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    if !check_pending(cpu, insn)? {
        return Ok(());
    }
    match insn.i.mnemonic() {
        Mnemonic::Wait => Ok(()),
        Mnemonic::Fldenv => load_environment(cpu, insn),
        Mnemonic::Frstor => restore(cpu, insn),
        m => {
            // Without NE a pending exception stays pending while the instruction runs.
            let pending = cpu.fpu.take_pending();
            let result = lane::run_x87(cpu, insn);
            cpu.fpu.set_fsw(cpu.fpu.fsw() | pending);
            let in_memory = result?;
            if m == Mnemonic::Fldcw {
                cpu.fpu.update_summary();
            } else {
                record(cpu, insn, in_memory);
            }
            Ok(())
        }
    }
}

/// A pending exception becomes #MF or, with CR0.NE clear, the error line: the instruction then waits for the interrupt
/// that follows, if interrupts are taken (SDM volume 1, 8.7). `false`: the instruction is not to be executed now.
pub(super) fn check_pending(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    if !cpu.fpu.x87_pending() {
        return Ok(true);
    }
    if cpu.paging.cr0 & cr0::NE != 0 {
        return Err(Exception::MF);
    }
    cpu.bus().x87_error(cpu.id);
    if cpu.rflags & rflags::IF != 0 && cpu.bus().interrupt_pending(cpu.id) {
        cpu.rip = insn.rip;
        return Ok(false);
    }
    Ok(true)
}

/// Notes opcode and addresses of a non-control instruction (SDM volume 1, 8.1.8).
fn record(cpu: &mut Cpu, insn: &Insn, in_memory: bool) {
    let Some((first, second)) = opcode(insn) else { return };
    cpu.fpu.set_fop(u16::from(first & 7) << 8 | u16::from(second));
    let base = if cpu.mode.real || cpu.mode.vm86 { cpu.seg[seg::CS].base } else { 0 };
    cpu.fpu.set_fip(base.wrapping_add(insn.rip));
    if in_memory {
        let segment = super::operand::segment_index(insn.i.memory_segment());
        let base = if cpu.mode.real || cpu.mode.vm86 { cpu.seg[segment].base } else { 0 };
        cpu.fpu.set_fdp(base.wrapping_add(cpu.effective_address(insn)));
    }
}

fn store_word(cpu: &mut Cpu, insn: &Insn, value: u16) -> Result<(), Exception> {
    if insn.i.op0_register() == Register::AX {
        cpu.set_reg(Register::AX, u64::from(value));
        return Ok(());
    }
    let la = cpu.operand_address(insn, 2, Access::Write)?;
    cpu.write_value(la, u64::from(value), 2, Who::Current)
}

/// The layouts of the environment (SDM volume 1, 8.1.10).
#[derive(Clone, Copy)]
struct Layout {
    wide: bool,
    real: bool,
}

impl Layout {
    fn of(cpu: &Cpu, insn: &Insn) -> Self {
        let wide = matches!(
            insn.i.code(),
            Code::Fnstenv_m28byte | Code::Fldenv_m28byte | Code::Fnsave_m108byte | Code::Frstor_m108byte
        );
        Self { wide, real: cpu.mode.real || cpu.mode.vm86 }
    }
    fn unit(self) -> usize {
        if self.wide { 4 } else { 2 }
    }
    fn environment_bytes(self) -> usize {
        7 * self.unit()
    }

    /// The environment's seven fields as bytes. Selectors read as zero: CPUID says that they are not kept.
    fn write(self, fpu: &FpuArea) -> [u8; 28] {
        let (fop, fip, fdp) = (u32::from(fpu.fop()), fpu.fip() as u32, fpu.fdp() as u32);
        const ONES: u32 = 0xffff_0000;
        let words =
            [u32::from(fpu.fcw()) | ONES, u32::from(fpu.fsw()) | ONES, u32::from(full_tags(fpu)) | ONES];
        let rest = match (self.real, self.wide) {
            (false, _) => [fip, fop << 16, fdp, ONES],
            (true, true) => {
                [fip & 0xffff | ONES, fip >> 16 << 12 | fop, fdp & 0xffff | ONES, fdp >> 16 << 12]
            }
            (true, false) => [fip, (fip >> 16) << 12 | fop, fdp, (fdp >> 16) << 12],
        };
        let mut out = [0; 28];
        for (i, field) in words.into_iter().chain(rest).enumerate() {
            let unit = self.unit();
            out[i * unit..(i + 1) * unit].copy_from_slice(&field.to_le_bytes()[..unit]);
        }
        out
    }

    fn read(self, bytes: &[u8], fpu: &mut FpuArea) {
        let field = |i: usize| {
            let mut word = [0; 4];
            let unit = self.unit();
            word[..unit].copy_from_slice(&bytes[i * unit..(i + 1) * unit]);
            u32::from_le_bytes(word)
        };
        let (fop, fip, fdp) = match (self.real, self.wide) {
            (false, true) => (field(4) >> 16, field(3), field(5)),
            (false, false) => (u32::from(fpu.fop()), field(3), field(5)),
            (true, _) => (
                field(4) & 0x7ff,
                field(3) & 0xffff | (field(4) >> 12) << 16,
                field(5) & 0xffff | (field(6) >> 12) << 16,
            ),
        };
        fpu.set_fcw(field(0) as u16);
        fpu.turn_to_fsw(field(1) as u16);
        fpu.fxsave[4] = (0..8).filter(|n| field(2) >> (2 * n) & 3 != 3).map(|n| 1 << n).sum();
        fpu.set_fop(fop as u16);
        fpu.set_fip(u64::from(fip));
        fpu.set_fdp(u64::from(fdp));
        fpu.update_summary();
    }
}

/// The tag word with two bits for each register (SDM volume 1, 8.1.7).
fn full_tags(fpu: &FpuArea) -> u16 {
    let tag = |n: usize| -> u16 {
        if fpu.fxsave[4] >> n & 1 == 0 {
            return 3;
        }
        let st = &fpu.fxsave[32 + 16 * ((n + 8 - fpu.top()) % 8)..][..10];
        let exponent = u16::from_le_bytes([st[8], st[9]]) & 0x7fff;
        match (exponent, st[7] >> 7) {
            (0, _) if st[..8] == [0; 8] => 1,
            (0 | 0x7fff, _) | (_, 0) => 2,
            _ => 0,
        }
    };
    (0..8).map(|n| tag(n) << (2 * n)).sum()
}

fn store_environment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let layout = Layout::of(cpu, insn);
    let len = layout.environment_bytes();
    let la = cpu.operand_address(insn, len, Access::Write)?;
    let bytes = layout.write(&cpu.fpu);
    cpu.write_linear(la, &bytes[..len], Who::Current)?;
    // Masks all exceptions (SDM volume 2, FNSTENV).
    cpu.fpu.set_fcw(cpu.fpu.fcw() | fsw::FLAGS);
    cpu.fpu.update_summary();
    Ok(())
}

fn load_environment(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let layout = Layout::of(cpu, insn);
    let len = layout.environment_bytes();
    let mut bytes = [0; 28];
    let la = cpu.operand_address(insn, len, Access::Read)?;
    cpu.read_linear(la, &mut bytes[..len], Who::Current)?;
    layout.read(&bytes[..len], &mut cpu.fpu);
    Ok(())
}

fn save(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let layout = Layout::of(cpu, insn);
    let len = layout.environment_bytes();
    let la = cpu.operand_address(insn, len + 80, Access::Write)?;
    let mut bytes = [0; 108];
    bytes[..28].copy_from_slice(&layout.write(&cpu.fpu));
    for i in 0..8 {
        bytes[len + 10 * i..][..10].copy_from_slice(&cpu.fpu.fxsave[32 + 16 * i..][..10]);
    }
    cpu.write_linear(la, &bytes[..len + 80], Who::Current)?;
    cpu.fpu.init_x87();
    Ok(())
}

fn restore(cpu: &mut Cpu, insn: &Insn) -> Result<(), Exception> {
    let layout = Layout::of(cpu, insn);
    let len = layout.environment_bytes();
    let la = cpu.operand_address(insn, len + 80, Access::Read)?;
    let mut bytes = [0; 108];
    cpu.read_linear(la, &mut bytes[..len + 80], Who::Current)?;
    layout.read(&bytes[..len], &mut cpu.fpu);
    for i in 0..8 {
        cpu.fpu.fxsave[32 + 16 * i..][..10].copy_from_slice(&bytes[len + 10 * i..][..10]);
    }
    Ok(())
}
