//! What the CPU tells of itself: CPUID, the time-stamp counter, random numbers.

use iced_x86::{Mnemonic, Register};
use ruse_arch::{
    Exception,
    flags::{cr4, rflags},
    state::reg,
};

use super::Insn;
use crate::{cpu::Cpu, cpuid};

/// Executes what belongs here; `Ok(false)` for other instructions.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    match insn.i.mnemonic() {
        Mnemonic::Cpuid => {
            let regs = cpuid::query(cpu, cpu.gpr[reg::RAX] as u32, cpu.gpr[reg::RCX] as u32);
            let order = [reg::RAX, reg::RBX, reg::RCX, reg::RDX];
            for (r, value) in order.into_iter().zip(regs) {
                cpu.gpr[r] = u64::from(value);
            }
        }
        Mnemonic::Rdtsc => read_tsc(cpu)?,
        Mnemonic::Rdtscp => {
            // It waits for all loads before it (SDM volume 2, RDTSCP): kernels compare the counters of their CPUs so.
            // SAFETY: LFENCE has no preconditions.
            unsafe { core::arch::x86_64::_mm_lfence() };
            read_tsc(cpu)?;
            cpu.set_reg(Register::ECX, cpu.tsc_aux);
        }
        Mnemonic::Rdpid => cpu.set_reg(insn.i.op0_register(), cpu.tsc_aux),
        // There are no performance counters, so that every index is wrong.
        Mnemonic::Rdpmc => return Err(Exception::gp(0)),
        Mnemonic::Rdrand | Mnemonic::Rdseed => random(cpu, insn),
        _ => return Ok(false),
    }
    Ok(true)
}

fn read_tsc(cpu: &mut Cpu) -> Result<(), Exception> {
    if cpu.paging.cr4 & cr4::TSD != 0 && cpu.mode.cpl != 0 {
        return Err(Exception::gp(0));
    }
    let tsc = cpu.tsc();
    cpu.set_reg(Register::EAX, tsc);
    cpu.set_reg(Register::EDX, tsc >> 32);
    Ok(())
}

/// RDRAND and RDSEED from the host's generator. CF says whether there was a number.
fn random(cpu: &mut Cpu, insn: &Insn) {
    let to = insn.i.op0_register();
    let mut bytes = [0u8; 8];
    let wanted = &mut bytes[..to.size()];
    let got = rustix::rand::getrandom(&mut *wanted, rustix::rand::GetRandomFlags::NONBLOCK);
    let ok = got.is_ok_and(|n| n == to.size());
    let value = if ok { u64::from_le_bytes(bytes) } else { 0 };
    cpu.set_reg(to, value);
    cpu.rflags = cpu.rflags & !rflags::ARITH | if ok { rflags::CF } else { 0 };
}
