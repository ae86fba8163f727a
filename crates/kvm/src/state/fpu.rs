//! x87, SSE, AVX and further extended state, through the standard XSAVE format (SDM volume 1, 13.4).

use std::{arch::x86_64::__cpuid_count, collections::BTreeMap, io, ops::Range};

use kvm_bindings::{kvm_xcr, kvm_xcrs, kvm_xsave};
use kvm_ioctls::VcpuFd;
use ruse_arch::{FpuState, VcpuState};

/// Bytes of the legacy area.
const LEGACY: usize = 512;
/// Index of XSTATE_BV in 32-bit words.
const XSTATE_BV: usize = LEGACY / 4;
/// Index of the upper halves of the YMM registers in 32-bit words: their place is the same on every CPU (13.5.2).
const YMM_HIGH: usize = 576 / 4;
/// Components that every state has: x87, SSE. AVX.
const BASE: u64 = 3;
const AVX: u64 = 4;

pub fn save(vcpu: &VcpuFd, state: &mut VcpuState) -> io::Result<()> {
    let area = vcpu.get_xsave()?.region;
    let mut legacy = [0; LEGACY];
    for (bytes, word) in legacy.chunks_exact_mut(4).zip(area) {
        bytes.copy_from_slice(&word.to_le_bytes());
    }
    let high = std::array::from_fn(|n| {
        let at = YMM_HIGH + 4 * n;
        [wide(&area[at..]), wide(&area[at + 2..])]
    });
    state.fpu = FpuState { extended: extended(&area), ..FpuState::from_fxsave(&legacy, &high) };
    let xcrs = vcpu.get_xcrs()?;
    let xcr0 = xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|xcr| xcr.xcr == 0);
    state.xcr0 = xcr0.map_or(1, |xcr| xcr.value);
    Ok(())
}

pub fn load(vcpu: &VcpuFd, state: &VcpuState) -> io::Result<()> {
    let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
    xcrs.xcrs[0] = kvm_xcr { xcr: 0, value: state.xcr0, ..Default::default() };
    vcpu.set_xcrs(&xcrs)?;
    // What the guest cannot use here is zero, and must not be said to be anything else.
    let mut xsave = vcpu.get_xsave()?;
    let area = &mut xsave.region;
    put_bytes(&mut area[..LEGACY / 4], &state.fpu.to_fxsave());
    for (n, ymm) in state.fpu.ymm.iter().enumerate() {
        put(&mut area[YMM_HIGH + 4 * n..], ymm[2]);
        put(&mut area[YMM_HIGH + 4 * n + 2..], ymm[3]);
    }
    let has_avx = state.fpu.ymm.iter().any(|ymm| ymm[2] | ymm[3] != 0);
    let mut in_use = if has_avx { BASE | AVX } else { BASE };
    for (&number, bytes) in &state.fpu.extended {
        let place = place(number).filter(|place| place.len() == bytes.len() / 4);
        let place = place.ok_or_else(|| {
            io::Error::other(format!("this CPU has no extended state {number} of {} bytes", bytes.len()))
        })?;
        put_bytes(&mut area[place], bytes);
        in_use |= 1 << number;
    }
    put(&mut area[XSTATE_BV..], in_use);
    put(&mut area[XSTATE_BV + 2..], 0);
    set(vcpu, &xsave)
}

/// The components in use beside x87, SSE and AVX.
fn extended(area: &[u32]) -> BTreeMap<u8, Vec<u8>> {
    let in_use = wide(&area[XSTATE_BV..]) & !(BASE | AVX);
    let numbers = (0..64).filter(|number| in_use >> number & 1 != 0);
    let bytes = |place: Range<usize>| area[place].iter().flat_map(|word: &u32| word.to_le_bytes()).collect();
    numbers.filter_map(|number| Some((number, bytes(place(number)?)))).collect()
}

/// Where a component lies in the standard format, in 32-bit words: on this host, which is what KVM goes by. Nothing for
/// x87, SSE and AVX, for one that this host does not have, or that does not lie in the area (AMX, which has to be enabled).
fn place(number: u8) -> Option<Range<usize>> {
    let leaf = __cpuid_count(0xd, number.into());
    let place = leaf.ebx as usize / 4..(leaf.ebx + leaf.eax) as usize / 4;
    (number > 2 && leaf.eax != 0 && place.end <= kvm_xsave::default().region.len()).then_some(place)
}

fn set(vcpu: &VcpuFd, xsave: &kvm_xsave) -> io::Result<()> {
    // SAFETY: KVM reads 4096 bytes unless components were enabled that make the area larger (AMX), which nothing here
    // does.
    Ok(unsafe { vcpu.set_xsave(xsave) }?)
}

fn wide(words: &[u32]) -> u64 {
    u64::from(words[0]) | u64::from(words[1]) << 32
}

fn put(words: &mut [u32], value: u64) {
    (words[0], words[1]) = (value as u32, (value >> 32) as u32);
}

fn put_bytes(words: &mut [u32], bytes: &[u8]) {
    for (word, bytes) in words.iter_mut().zip(bytes.chunks_exact(4)) {
        *word = u32::from_le_bytes(bytes.try_into().expect("four bytes"));
    }
}
