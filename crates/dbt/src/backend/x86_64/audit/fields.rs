//! The fields of the vCPU block that regions use.

use std::{mem::offset_of, ops::Range};

use ruse_arch::{Segment, state::seg};

use super::super::groups::GROUPS;
use crate::cpu::{Cpu, REQUESTS_OFFSET};

/// The entries of the TLB's view, and of the jump cache.
pub const TLB: i64 = offset_of!(Cpu, tlb) as i64;
pub const JUMPS: i64 = offset_of!(Cpu, jumps) as i64;
/// The first word of scratch.
pub const SAVED: i64 = offset_of!(Cpu, scratch) as i64;

const VIEWS: i64 = offset_of!(Cpu, kernel_tlbs) as i64;
const HOSTS: i64 = offset_of!(Cpu, groups) as i64;
const PAGES: i64 = offset_of!(Cpu, group_pages) as i64;

/// The end of what regions read.
const END: i64 = offset_of!(Cpu, mode) as i64;

/// The group whose host address lies there.
pub fn group(at: i64) -> Option<usize> {
    index(at, HOSTS, 8)
}

/// The group whose remembered page's linear address lies there.
pub fn page(at: i64) -> Option<usize> {
    index(at, PAGES, 16)
}

/// The group whose remembered page's host address lies there.
pub fn host(at: i64) -> Option<usize> {
    index(at, PAGES + 8, 16)
}

/// Whether the entries of one of the kernel's views lie there.
pub fn is_view(at: i64) -> bool {
    at == VIEWS || at == VIEWS + 8
}

fn index(at: i64, first: i64, size: i64) -> Option<usize> {
    let distance = at - first;
    (distance % size == 0 && (0..GROUPS as i64).contains(&(distance / size)))
        .then_some((distance / size) as usize)
}

/// Whether regions may read these bytes.
pub fn may_read(at: i64, size: usize) -> bool {
    let end = at + size as i64;
    (at >= 0 && end <= END) || (at == i64::from(REQUESTS_OFFSET) && size == 4)
}

/// Whether regions may write these bytes. Those of the TLB's view are looked at elsewhere.
pub fn may_write(at: i64, size: usize) -> bool {
    let base = |segment: usize| {
        let at = offset_of!(Cpu, seg) + segment * size_of::<Segment>() + offset_of!(Segment, base);
        at..at + 8
    };
    let word = |at: usize| at..at + 8;
    let places: [Range<usize>; 11] = [
        offset_of!(Cpu, gpr)..offset_of!(Cpu, rip),
        word(offset_of!(Cpu, rflags)),
        word(offset_of!(Cpu, arith)),
        word(TLB as usize),
        offset_of!(Cpu, scratch)..offset_of!(Cpu, bounce),
        HOSTS as usize..HOSTS as usize + 8 * GROUPS,
        PAGES as usize..PAGES as usize + 16 * GROUPS,
        offset_of!(Cpu, first_rounds)..offset_of!(Cpu, stack_limit),
        base(seg::FS),
        base(seg::GS),
        word(offset_of!(Cpu, kernel_gs_base)),
    ];
    let end = at + size as i64;
    places.iter().any(|place| at >= place.start as i64 && end <= place.end as i64)
}
