//! Locked changes of guest RAM: atomic against the other vCPUs, whichever executor runs them, and against devices.

use std::sync::atomic::{AtomicU8, AtomicU16, AtomicU32, AtomicU64, Ordering};

/// Whether `size` bytes at `host` can be changed by one locked access. Not those that leave a cache line: the host may
/// fault on a split lock.
pub fn is_whole(host: *const u8, size: usize) -> bool {
    let at = host as usize;
    if cfg!(target_arch = "x86_64") { at % 64 + size <= 64 } else { at.is_multiple_of(size) }
}

/// Replaces `old` at `host` by `new`; `Err` is what was there instead.
///
/// # Safety
/// `size` (1, 2, 4 or 8) bytes at `host` are mapped guest RAM, and [`is_whole`] holds for them.
unsafe fn exchange(host: *mut u8, size: usize, old: u64, new: u64) -> Result<u64, u64> {
    const OK: Ordering = Ordering::SeqCst;
    if !(host as usize).is_multiple_of(size) {
        // SAFETY: as promised by the caller.
        let found = unsafe { exchange_unaligned(host, size, old, new) };
        return if found == old { Ok(found) } else { Err(found) };
    }
    // SAFETY: mapped, as promised by the caller, and aligned.
    unsafe {
        match size {
            1 => AtomicU8::from_ptr(host)
                .compare_exchange(old as u8, new as u8, OK, OK)
                .map(u64::from)
                .map_err(u64::from),
            2 => AtomicU16::from_ptr(host.cast())
                .compare_exchange(old as u16, new as u16, OK, OK)
                .map(u64::from)
                .map_err(u64::from),
            4 => AtomicU32::from_ptr(host.cast())
                .compare_exchange(old as u32, new as u32, OK, OK)
                .map(u64::from)
                .map_err(u64::from),
            _ => AtomicU64::from_ptr(host.cast()).compare_exchange(old, new, OK, OK),
        }
    }
}

/// CMPXCHG at an address that Rust's atomics do not take; returns what was there.
///
/// # Safety
/// As for [`exchange`].
#[cfg(target_arch = "x86_64")]
unsafe fn exchange_unaligned(host: *mut u8, size: usize, old: u64, new: u64) -> u64 {
    use std::arch::asm;
    // SAFETY: writes at most the `size` mapped bytes at `host`; x86 allows any alignment.
    unsafe {
        match size {
            2 => {
                let mut found = old as u16;
                asm!("lock cmpxchg [{p}], {n:x}", p = in(reg) host, n = in(reg) new as u16,
                     inout("ax") found, options(nostack));
                u64::from(found)
            }
            4 => {
                let mut found = old as u32;
                asm!("lock cmpxchg [{p}], {n:e}", p = in(reg) host, n = in(reg) new as u32,
                     inout("eax") found, options(nostack));
                u64::from(found)
            }
            _ => {
                let mut found = old;
                asm!("lock cmpxchg [{p}], {n:r}", p = in(reg) host, n = in(reg) new,
                     inout("rax") found, options(nostack));
                found
            }
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
unsafe fn exchange_unaligned(_: *mut u8, _: usize, old: u64, _: u64) -> u64 {
    unreachable!("is_whole asks for alignment; old is {old:#x}")
}

/// Changes a value by `f` (which may run more than once) in one locked access; returns what was there.
///
/// `host` comes from a translation of `size` (1, 2, 4 or 8) bytes for writing, and [`is_whole`] holds.
pub fn update(host: *mut u8, size: usize, mut f: impl FnMut(u64) -> u64) -> u64 {
    assert!(is_whole(host, size));
    let mut buf = [0; 8];
    crate::mmu::access::load(host, &mut buf[..size]);
    let mut old = u64::from_le_bytes(buf);
    loop {
        let new = f(old);
        // SAFETY: translated for writing by the caller; guest RAM stays mapped; wholeness is asserted.
        match unsafe { exchange(host, size, old, new) } {
            Ok(_) => return old,
            Err(found) => old = found,
        }
    }
}

/// CMPXCHG16B at an aligned `host` from a translation of 16 bytes for writing: `Ok` if `old` was there. `None`: the
/// host cannot.
pub fn exchange16(host: *mut u8, old: u128, new: u128) -> Option<Result<(), u128>> {
    #[cfg(target_arch = "x86_64")]
    if (host as usize).is_multiple_of(16) && std::arch::is_x86_feature_detected!("cmpxchg16b") {
        let (mut low, mut high) = (old as u64, (old >> 64) as u64);
        // SAFETY: aligned, the feature is there, and the address is translated for writing. RBX, which the compiler
        // keeps for itself, is put back.
        unsafe {
            std::arch::asm!(
                "xchg {new_low}, rbx",
                "lock cmpxchg16b [{host}]",
                "mov rbx, {new_low}",
                host = in(reg) host,
                new_low = inout(reg) new as u64 => _,
                in("rcx") (new >> 64) as u64,
                inout("rax") low,
                inout("rdx") high,
                options(nostack),
            );
        }
        let found = u128::from(high) << 64 | u128::from(low);
        return Some(if found == old { Ok(()) } else { Err(found) });
    }
    None
}
