//! The hypercall instruction: VMCALL of Intel's CPUs and VMMCALL of AMD's do the same.

use std::time::{SystemTime, UNIX_EPOCH};

use iced_x86::Mnemonic;
use ruse_arch::{
    Exception,
    paravirt::{feature, hypercall, hypercall::error},
    state::reg,
};
use ruse_engine::Message;
use vm_memory::{Bytes, GuestAddress};

use super::{MESSAGES, features};
use crate::{
    cpu::{Cpu, request},
    tier0::Insn,
};

/// A hypercall's answer, or the error.
type Answer = Result<u64, i64>;

/// Executes what belongs here; `Ok(false)` for other instructions.
pub(crate) fn execute(cpu: &mut Cpu, insn: &Insn) -> Result<bool, Exception> {
    if !matches!(insn.i.mnemonic(), Mnemonic::Vmcall | Mnemonic::Vmmcall) {
        return Ok(false);
    }
    let width = if cpu.mode.code64 { u64::MAX } else { 0xffff_ffff };
    let argument = |register: usize| cpu.gpr[register] & width;
    let call = Call {
        number: argument(reg::RAX),
        arguments: [reg::RBX, reg::RCX, reg::RDX, reg::RSI].map(argument),
        map_bits: if cpu.mode.code64 { 64 } else { 32 },
    };
    let answer = if cpu.mode.cpl == 0 { call.make(cpu) } else { Err(error::PERM) };
    cpu.gpr[reg::RAX] = answer.unwrap_or_else(|error| -error as u64) & width;
    Ok(true)
}

/// A hypercall.
struct Call {
    number: u64,
    arguments: [u64; 4],
    /// Bits of an argument that is a bitmap.
    map_bits: u32,
}

impl Call {
    fn make(&self, cpu: &Cpu) -> Answer {
        let has = |bit| features(&cpu.cpuid).unwrap_or(0) & bit != 0;
        match self.number {
            hypercall::POLL_IRQ => Ok(0),
            hypercall::KICK_CPU if has(feature::UNHALT) => self.kick(cpu),
            hypercall::CLOCK_PAIRING => self.pair_clocks(cpu),
            hypercall::SEND_IPI if has(feature::SEND_IPI) => self.send(cpu),
            hypercall::SCHED_YIELD if has(feature::SCHED_YIELD) => {
                std::thread::yield_now();
                Ok(0)
            }
            _ => Err(error::NOSYS),
        }
    }

    fn kick(&self, cpu: &Cpu) -> Answer {
        if let Ok(id) = self.arguments[1].try_into()
            && let Some(peer) = cpu.mmu.code.peer(id)
        {
            peer.wake_with(request::UNHALT);
        }
        Ok(0)
    }

    /// What the host's wall clock and the guest's counter are at one moment: seconds, nanoseconds, counter, flags.
    fn pair_clocks(&self, cpu: &Cpu) -> Answer {
        let [area, kind, ..] = self.arguments;
        if kind != 0 || cpu.clock.is_slow() {
            return Err(error::OPNOTSUPP);
        }
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let mut bytes = [0; 64];
        bytes[..8].copy_from_slice(&wall.as_secs().to_le_bytes());
        bytes[8..16].copy_from_slice(&u64::from(wall.subsec_nanos()).to_le_bytes());
        bytes[16..24].copy_from_slice(&cpu.tsc().to_le_bytes());
        let written = cpu.mmu.ram().memory().write_slice(&bytes, GuestAddress(area));
        written.map(|()| 0).map_err(|_| error::FAULT)
    }

    /// Sends an interrupt command to the CPUs of a bitmap; how many there are.
    fn send(&self, cpu: &Cpu) -> Answer {
        /// Logical destination, and shorthands (SDM volume 3, 10.6.1).
        const BY_OTHER_NAMES: u64 = 1 << 11 | 3 << 18;
        /// Vector, delivery mode, level and trigger mode are the same in a message (10.11.2).
        const OF_MESSAGES: u64 = 0xc7ff;
        let [low, high, first, command] = self.arguments;
        if command & BY_OTHER_NAMES != 0 {
            return Err(error::INVAL);
        }
        let map = u128::from(low) | u128::from(high) << self.map_bits;
        let mut reached = 0;
        for bit in (0..128).filter(|bit| map >> bit & 1 != 0) {
            let Some(id) = (first as u32).checked_add(bit).filter(|&id| cpu.mmu.code.peer(id).is_some())
            else {
                continue;
            };
            let address = MESSAGES | u64::from(id) << 12;
            cpu.bus().deliver(Message { address, data: (command & OF_MESSAGES) as u32 });
            reached += 1;
        }
        Ok(reached)
    }
}
