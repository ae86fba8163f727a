//! Host code for x86-64.
//!
//! Register map: guest RAX to RDI (without RSP) and R8 to R12 live in the host registers of the same name, guest RSP in
//! host R13; guest R13 to R15 live in the vCPU block, which GS addresses. Host R14 and R15 are scratch, host RSP is a
//! host stack, on which calls leave where their returns lead. The guest's vector registers and MXCSR are in the host's when
//! `vectors_resident` says so, its x87 registers when `x87_resident` does: regions that use them load them first.
//! Between regions the arithmetic flags lie in [`crate::cpu::Cpu::arith`].

pub mod asm;
pub mod audit;
pub mod emit;
mod exits;
pub mod groups;
pub mod loops;
mod operands;
mod out_of_line;
mod scratch;
mod stack;
mod strings;
mod system;
pub mod thunks;

use std::mem::offset_of;

use self::asm::Mem;
use crate::cpu::{Cpu, LOOPS, REQUESTS_OFFSET};

/// Where a guest register lives.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Home {
    /// In this host register.
    Host(u8),
    /// In the vCPU block at this displacement.
    Block(i32),
}

/// Home of a guest general register.
pub fn home(guest: u8) -> Home {
    match guest {
        4 => Home::Host(asm::host::GUEST_RSP),
        13..=15 => Home::Block(offset_of!(Cpu, gpr) as i32 + 8 * i32::from(guest)),
        _ => Home::Host(guest),
    }
}

/// Operands in the vCPU block.
pub(crate) mod block {
    use super::*;

    pub fn gpr(index: usize) -> Mem {
        Mem::Block(offset_of!(Cpu, gpr) as i32 + 8 * index as i32)
    }
    pub fn scratch(index: usize) -> Mem {
        Mem::Block(offset_of!(Cpu, scratch) as i32 + 8 * index as i32)
    }
    pub fn segment_base(index: usize) -> Mem {
        let at = offset_of!(Cpu, seg) + index * size_of::<ruse_arch::Segment>();
        Mem::Block((at + offset_of!(ruse_arch::Segment, base)) as i32)
    }
    pub fn selector(index: usize) -> Mem {
        let at = offset_of!(Cpu, seg) + index * size_of::<ruse_arch::Segment>();
        Mem::Block((at + offset_of!(ruse_arch::Segment, selector)) as i32)
    }
    pub const REQUESTS: Mem = Mem::Block(REQUESTS_OFFSET);
    pub const ARITH: Mem = Mem::Block(offset_of!(Cpu, arith) as i32);
    pub const RFLAGS: Mem = Mem::Block(offset_of!(Cpu, rflags) as i32);
    pub const TLB: Mem = Mem::Block(offset_of!(Cpu, tlb) as i32);
    pub fn kernel_tlb(ac: bool) -> Mem {
        Mem::Block(offset_of!(Cpu, kernel_tlbs) as i32 + 8 * i32::from(ac))
    }
    pub const JUMPS: Mem = Mem::Block(offset_of!(Cpu, jumps) as i32);
    pub const USER_GENERATION: Mem = Mem::Block(offset_of!(Cpu, user_generation) as i32);
    pub const KERNEL_GENERATION: Mem = Mem::Block(offset_of!(Cpu, kernel_generation) as i32);
    pub const X87_RESIDENT: Mem = Mem::Block(offset_of!(Cpu, x87_resident) as i32);
    pub const VECTORS_RESIDENT: Mem = Mem::Block(offset_of!(Cpu, vectors_resident) as i32);
    pub const IRQ_WAITING: Mem = Mem::Block(offset_of!(Cpu, irq_waiting) as i32);
    pub const EXIT_REASON: Mem = Mem::Block(offset_of!(Cpu, exit_reason) as i32);
    pub const EXIT_VALUE: Mem = Mem::Block(offset_of!(Cpu, exit_value) as i32);
    pub const EXIT_AUX: Mem = Mem::Block(offset_of!(Cpu, exit_aux) as i32);
    pub const THIS: Mem = Mem::Block(offset_of!(Cpu, this) as i32);
    pub const HOST_RSP: Mem = Mem::Block(offset_of!(Cpu, host_rsp) as i32);
    pub fn group(number: u8) -> Mem {
        Mem::Block(offset_of!(Cpu, groups) as i32 + 8 * i32::from(number))
    }
    pub fn group_page(number: u8) -> Mem {
        Mem::Block(offset_of!(Cpu, group_pages) as i32 + 16 * i32::from(number))
    }
    pub fn group_host(number: u8) -> Mem {
        Mem::Block(offset_of!(Cpu, group_pages) as i32 + 16 * i32::from(number) + 8)
    }
    /// For the loop at a linear address.
    pub fn first_rounds(start: u64) -> Mem {
        let n = (start ^ start >> 6) as usize % LOOPS;
        Mem::Block((offset_of!(Cpu, first_rounds) + size_of::<u32>() * n) as i32)
    }
    pub const ROUNDS: Mem = Mem::Block(offset_of!(Cpu, rounds) as i32);
    pub const LAST_ROUND: Mem = Mem::Block(offset_of!(Cpu, last_round) as i32);
    pub const STACK_LIMIT: Mem = Mem::Block(offset_of!(Cpu, stack_limit) as i32);
    pub const USER_RETURNS: Mem = Mem::Block(offset_of!(Cpu, user_returns) as i32);
    pub const RETURN_SITE: Mem = Mem::Block(offset_of!(Cpu, return_site) as i32);
    pub const HOST_MXCSR: Mem = Mem::Block(offset_of!(Cpu, host_mxcsr) as i32);
    pub const KERNEL_GS_BASE: Mem = Mem::Block(offset_of!(Cpu, kernel_gs_base) as i32);
    pub const TSC_OFFSET: Mem = Mem::Block(offset_of!(Cpu, tsc_offset) as i32);
    pub const TSC_ADJUST: Mem = Mem::Block(offset_of!(Cpu, tsc_adjust) as i32);
    pub const TSC_AUX: Mem = Mem::Block(offset_of!(Cpu, tsc_aux) as i32);
    /// CR0, CR2, CR3 or CR4.
    pub fn control(number: u8) -> Mem {
        use ruse_arch::paging::PagingMode;
        const PAGING: usize = offset_of!(Cpu, paging);
        Mem::Block(match number {
            0 => PAGING + offset_of!(PagingMode, cr0),
            2 => offset_of!(Cpu, cr2),
            3 => PAGING + offset_of!(PagingMode, cr3),
            _ => PAGING + offset_of!(PagingMode, cr4),
        } as i32)
    }
    pub const FPU: i32 = offset_of!(Cpu, fpu) as i32;
}

/// Why generated code was left; the values of [`Cpu::exit_reason`].
pub mod exit {
    /// Go on at the linear address in `exit_value`; requests or interrupts may wait.
    pub const AT: u32 = 0;
    /// Go on where the link leads whose number is in `exit_aux`, which can be made direct.
    pub const LINK: u32 = 1;
    /// Tier 0 executes the instruction at the linear address in `exit_value`.
    pub const INTERPRET: u32 = 2;
    /// The host instruction at (or right before) the address in `exit_value` could not be executed: tier 0 executes the
    /// guest instruction that it belongs to.
    pub const FAULT: u32 = 3;
    /// A request waits. Go on with the guest instruction to which the code right before the address in `exit_value`
    /// belongs.
    pub const POLL: u32 = 4;
    /// As [`AT`], from an indirect jump or a return whose target the jump cache does not know. The code right before the
    /// address in `exit_aux` belongs to it.
    pub const MISS: u32 = 5;
    /// As [`MISS`] for a return, to which the code at [`crate::cpu::Cpu::return_site`] belongs.
    pub const RETURN: u32 = 6;

    /// Names of the counters, by number.
    pub const COUNTERS: [&str; 7] = [
        "exits.at",
        "exits.link",
        "exits.interpret",
        "exits.fault",
        "exits.poll",
        "exits.miss",
        "exits.miss.return",
    ];
}
