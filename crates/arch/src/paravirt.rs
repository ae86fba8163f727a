//! KVM's paravirtual interfaces as a guest sees them (the kernel's Documentation/virt/kvm/x86: cpuid.rst, msr.rst,
//! hypercalls.rst). Both engines have the same.

use serde::{Deserialize, Serialize};

/// The CPUID leaf with the highest leaf of the range and the signature.
pub const SIGNATURE_LEAF: u32 = 0x4000_0000;
/// The CPUID leaf with the [`feature`]s in EAX. The last of the range.
pub const FEATURES_LEAF: u32 = 0x4000_0001;
/// "KVMKVMKVM" in EBX, ECX and EDX of [`SIGNATURE_LEAF`].
pub const SIGNATURE: [u32; 3] = [0x4b4d_564b, 0x564b_4d56, 0x4d];

/// Features: bits of EAX of [`FEATURES_LEAF`].
pub mod feature {
    /// The clock, through the registers 11h and 12h.
    pub const CLOCK_OLD: u32 = 1 << 0;
    /// Ports need no delay between two accesses.
    pub const NO_IO_DELAY: u32 = 1 << 1;
    /// The clock, through registers of KVM's range.
    pub const CLOCK: u32 = 1 << 3;
    /// Asynchronous page faults.
    pub const ASYNC_PF: u32 = 1 << 4;
    /// Stolen time.
    pub const STEAL_TIME: u32 = 1 << 5;
    /// Ends of interrupts without an exit.
    pub const EOI: u32 = 1 << 6;
    /// The hypercall that ends another vCPU's HLT.
    pub const UNHALT: u32 = 1 << 7;
    /// TLBs of vCPUs that the host has preempted are flushed before they run on.
    pub const TLB_FLUSH: u32 = 1 << 9;
    /// The hypercall that sends interrupts to many.
    pub const SEND_IPI: u32 = 1 << 11;
    /// The hypercall that leaves the host's CPU to another vCPU.
    pub const SCHED_YIELD: u32 = 1 << 13;
    /// The end of an asynchronous page fault is an interrupt.
    pub const ASYNC_PF_INT: u32 = 1 << 14;
    /// [`super::clock_flag::STABLE`] means what it says.
    pub const CLOCK_STABLE: u32 = 1 << 24;

    /// All that Ruse knows: their registers are in [`super::Paravirt`], and each engine takes a guest over that uses them.
    pub const KNOWN: u32 = CLOCK_OLD
        | NO_IO_DELAY
        | CLOCK
        | ASYNC_PF
        | STEAL_TIME
        | EOI
        | UNHALT
        | TLB_FLUSH
        | SEND_IPI
        | SCHED_YIELD
        | ASYNC_PF_INT
        | CLOCK_STABLE;
}

/// Bit 0 of the registers: on.
pub const ENABLED: u64 = 1;

/// Bits of the register of asynchronous page faults.
pub mod async_pf {
    /// Reserved.
    pub const RESERVED: u64 = 0x30;
    /// They are exits of a nested guest.
    pub const AS_EXIT: u64 = 1 << 2;
    /// Their ends are told by an interrupt.
    pub const BY_INTERRUPT: u64 = 1 << 3;
    /// Offset of the token in the guest's area.
    pub const TOKEN: u64 = 4;
    /// The token that stands for all faults that have not ended.
    pub const ALL: u32 = u32::MAX;
}

/// The area of stolen time, 64 bytes, aligned to as many.
pub mod steal_time {
    /// Bits of the register that are reserved.
    pub const RESERVED: u64 = 0x3e;
    /// Offset of the nanoseconds.
    pub const NANOSECONDS: u64 = 0;
    /// Offset of the version, odd while the area changes.
    pub const VERSION: u64 = 8;
    /// Offset of the byte that tells a vCPU that was preempted.
    pub const PREEMPTED: u64 = 16;
    /// Bytes of the area.
    pub const LEN: usize = 64;
}

/// The register of ends of interrupts.
pub mod eoi {
    /// Reserved: the area is aligned to its four bytes.
    pub const RESERVED: u64 = 2;
}

/// Registers of the interfaces. All are off after a reset.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Paravirt {
    /// Where the guest's clock is written to.
    pub system_time: u64,
    /// Where and how page faults of the host are told.
    pub async_pf: u64,
    /// The vector that tells of their end.
    pub async_pf_vector: u64,
    /// Where the time is written to that the host gave to others.
    pub steal_time: u64,
    /// Where the guest may end an interrupt without an exit.
    pub eoi: u64,
}

/// Flags of a [`ClockPage`].
pub mod clock_flag {
    /// All vCPUs have the same clock.
    pub const STABLE: u8 = 1 << 0;
    /// The machine was held: the guest's watchdogs are not to mind.
    pub const STOPPED: u8 = 1 << 1;
}

/// How a guest gets nanoseconds from its time-stamp counter (`pvclock_vcpu_time_info` in arch/x86/include/asm/pvclock-abi.h),
/// but for the version that guards it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockPage {
    /// A value of the counter.
    pub tsc: u64,
    /// Nanoseconds at that value.
    pub nanoseconds: u64,
    /// Nanoseconds of a shifted count, times 2^32.
    pub multiplier: u32,
    /// Left shift of a count.
    pub shift: i8,
    /// See [`clock_flag`].
    pub flags: u8,
}

impl ClockPage {
    /// Bytes of the structure, the version included.
    pub const LEN: usize = 32;
    /// Where in it [`ClockPage::to_bytes`] goes, behind the version.
    pub const BODY: u64 = 8;
    /// Where in it the flags are.
    pub const FLAGS: u64 = 29;

    /// A clock that is at zero where the counter is, which has this frequency.
    pub fn with_frequency(tsc_hz: u64) -> Self {
        let multiplier = |shift: i8| (1_000_000_000u128 << (32 - shift)) / u128::from(tsc_hz.max(1));
        // The least shift, so that the multiplier has all its 32 bits.
        let shift = (-31..31).find(|&shift| multiplier(shift) <= u32::MAX.into()).unwrap_or(31);
        Self { multiplier: multiplier(shift) as u32, shift, ..Self::default() }
    }

    /// Nanoseconds at a value of the counter, as guests compute them. Guests may have written anything into the page.
    pub fn at(&self, tsc: u64) -> u64 {
        let count = tsc.wrapping_sub(self.tsc);
        let shift = u32::from(self.shift.unsigned_abs());
        let count = if self.shift >= 0 { count.checked_shl(shift) } else { count.checked_shr(shift) };
        let passed = (u128::from(count.unwrap_or(0)) * u128::from(self.multiplier)) >> 32;
        self.nanoseconds.wrapping_add(passed as u64)
    }

    /// The structure in memory behind its version.
    pub fn to_bytes(&self) -> [u8; 24] {
        let mut bytes = [0; 24];
        bytes[..8].copy_from_slice(&self.tsc.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.nanoseconds.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.multiplier.to_le_bytes());
        (bytes[20], bytes[21]) = (self.shift as u8, self.flags);
        bytes
    }

    /// What [`ClockPage::to_bytes`] gave.
    pub fn from_bytes(bytes: &[u8; 24]) -> Self {
        let u64_at = |at| u64::from_le_bytes(std::array::from_fn(|i| bytes[at + i]));
        let multiplier = u32::from_le_bytes(std::array::from_fn(|i| bytes[16 + i]));
        Self { tsc: u64_at(0), nanoseconds: u64_at(8), multiplier, shift: bytes[20] as i8, flags: bytes[21] }
    }
}

/// Numbers of hypercalls (RAX).
pub mod hypercall {
    /// Looks for interrupts, which every exit does.
    pub const POLL_IRQ: u64 = 1;
    /// Ends another vCPU's HLT; its APIC ID is in RCX.
    pub const KICK_CPU: u64 = 5;
    /// Writes the host's time and the guest's counter at the same moment to the address in RBX.
    pub const CLOCK_PAIRING: u64 = 9;
    /// Sends an interrupt: RBX and RCX are a bitmap of APIC IDs that begins at that in RDX, RSI is the interrupt command.
    pub const SEND_IPI: u64 = 10;
    /// Leaves the host's CPU to another vCPU.
    pub const SCHED_YIELD: u64 = 11;

    /// Errors, which are returned negated.
    pub mod error {
        /// Not at this privilege.
        pub const PERM: i64 = 1;
        /// The address is bad.
        pub const FAULT: i64 = 14;
        /// An argument is bad.
        pub const INVAL: i64 = 22;
        /// Not possible here.
        pub const OPNOTSUPP: i64 = 95;
        /// No such hypercall.
        pub const NOSYS: i64 = 1000;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_signature_is_kvms() {
        assert_eq!(SIGNATURE.map(u32::to_le_bytes).concat(), *b"KVMKVMKVM\0\0\0");
    }

    #[test]
    fn a_second_of_any_frequency_is_a_second() {
        for hz in [1_000_000, 999_999_937, 1_000_000_000, 2_400_000_000, 2_593_906_123, 5_859_900_000] {
            let page = ClockPage { tsc: 77, nanoseconds: 1000, ..ClockPage::with_frequency(hz) };
            assert!(page.multiplier >= 1 << 31, "{page:?}");
            let day = 86_400;
            assert!(page.at(77 + hz).abs_diff(1_000_001_000) <= 1, "{hz}: {page:?}");
            assert!(page.at(77 + day * hz).abs_diff(day * 1_000_000_000 + 1000) < 100_000, "{hz}: {page:?}");
        }
    }

    #[test]
    fn frequencies_out_of_this_world_do_no_harm() {
        for hz in [0, 1, u64::MAX] {
            ClockPage::with_frequency(hz).at(u64::MAX);
        }
        for shift in [i8::MIN, -64, 64, i8::MAX] {
            let page = ClockPage { shift, multiplier: u32::MAX, nanoseconds: u64::MAX, ..Default::default() };
            assert_eq!(page.at(u64::MAX), u64::MAX);
        }
    }

    #[test]
    fn the_structure_in_memory_is_read_as_it_was_written() {
        let page = ClockPage { tsc: 1 << 40, nanoseconds: 5, multiplier: !0, shift: -1, flags: 3 };
        let bytes = page.to_bytes();
        assert_eq!(bytes[(ClockPage::FLAGS - ClockPage::BODY) as usize], 3);
        assert_eq!(ClockPage::from_bytes(&bytes), page);
    }
}
