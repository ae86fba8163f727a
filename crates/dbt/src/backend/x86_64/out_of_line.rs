//! What the straight code of a region jumps to when something is not as usual.

use super::{
    asm::{
        Mem, Relocated, cc,
        host::{T0, T1},
    },
    emit::{Emitter, Mark},
    groups::Lead,
};
use crate::{
    ir::{ACCESS_SIZES, MemUse},
    mmu::tlb::Entry,
};

/// The part of a probe that is out of line.
pub(super) struct SlowPath {
    pub branch: usize,
    pub back: u64,
    pub missed: Missed,
    pub guest: u16,
}

/// For what a probe was that missed.
pub(super) enum Missed {
    Access(MemUse),
    /// The same, where the host address is to be in T0 and T1 together.
    Apart(MemUse),
    Group(Lead),
    /// The page that the group with this number remembers.
    Page(u8, Lead),
    /// A stride, or a table, before the rounds of a loop.
    Stride(Lead, bool),
}

/// A jump whose code is out of line.
pub(super) struct Stub {
    /// Offset of the displacement that leads here.
    pub branch: usize,
    pub kind: StubKind,
}

pub(super) enum StubKind {
    /// Leave with [`super::exit::POLL`] before the guest instruction at this offset.
    Poll(u16),
    /// Leave to tier 0 before the guest instruction at this offset.
    Interpret(u16),
    /// Leave with [`super::exit::MISS`] from the guest instruction at this offset.
    Miss(u16),
    /// Leave to a linear address that may be linked; save the flags first.
    Exit { target: u64, save_flags: bool },
    /// The link with this index is not resolved.
    Unresolved(usize),
    /// There is no room for a return address; go on at this address.
    NoRoom(u64),
    /// A guest address that an instruction has as its operand.
    Address(u64),
}

impl Emitter<'_> {
    /// Emits what the straight code jumps to when something is not as usual.
    pub(super) fn out_of_line(&mut self) {
        while !self.slow_paths.is_empty() {
            for slow in std::mem::take(&mut self.slow_paths) {
                self.slow(slow);
            }
        }
        for slow in std::mem::take(&mut self.slow_strings) {
            self.slow_string(slow);
        }
        let mut next = 0;
        while next < self.stubs.len() {
            let Stub { branch, ref kind } = self.stubs[next];
            next += 1;
            match *kind {
                StubKind::Poll(guest) => {
                    self.asm.bind(branch);
                    self.marks.push(Mark { host: self.asm.code.len() as u32, guest, host_flags: false });
                    self.asm.call(self.thunks.exit_poll);
                }
                StubKind::Interpret(guest) => {
                    self.asm.bind(branch);
                    self.interpret(self.start.wrapping_add(guest.into()), 0);
                }
                StubKind::Miss(guest) => {
                    self.asm.bind(branch);
                    self.marks.push(Mark { host: self.asm.code.len() as u32, guest, host_flags: false });
                    self.asm.call(self.thunks.exit_miss);
                }
                StubKind::Exit { target, save_flags } => {
                    self.asm.bind(branch);
                    if save_flags {
                        self.save_flags();
                    }
                    self.exit_to(target);
                }
                StubKind::Unresolved(index) => self.unresolved(branch, index),
                StubKind::NoRoom(back) => {
                    self.asm.bind(branch);
                    self.asm.call(self.thunks.forget_returns);
                    self.asm.jmp(back);
                }
                StubKind::Address(address) => {
                    self.asm.bind(branch);
                    self.asm.bytes(&address.to_le_bytes());
                    self.asm.relocated(Relocated::Address);
                }
            }
        }
    }

    pub(super) fn unresolved(&mut self, branch: usize, index: usize) {
        let link = self.links[index];
        if link.unresolved == 0 {
            self.links[index].unresolved = self.asm.code.len() as u32;
            self.asm.bind(branch);
            if link.guarded {
                self.asm.mov_address(T0, link.target);
                self.asm.call(self.thunks.lookup_link);
            } else {
                self.asm.call(self.thunks.exit_link);
            }
            self.asm.bytes(&(self.first_link + index as u32).to_le_bytes());
            self.asm.relocated(Relocated::Link);
        } else {
            let rel = link.unresolved.wrapping_sub(branch as u32 + 4);
            self.asm.code[branch..branch + 4].copy_from_slice(&rel.to_le_bytes());
        }
    }

    fn slow(&mut self, slow: SlowPath) {
        self.asm.bind(slow.branch);
        self.marks.push(Mark { host: self.asm.code.len() as u32, guest: slow.guest, host_flags: false });
        match slow.missed {
            Missed::Access(mem) => {
                self.call_slow_access(mem);
                self.asm.jmp(slow.back);
            }
            Missed::Apart(mem) => {
                self.call_slow_access(mem);
                self.asm.mov_imm(T1, 0);
                self.asm.jmp(slow.back);
            }
            Missed::Group(lead) => self.slow_group(&slow, lead),
            Missed::Page(group, lead) => self.other_page(group, lead, slow),
            Missed::Stride(lead, table) => {
                self.find_group(&slow, lead);
                self.without_strides(table);
            }
        }
    }

    fn call_slow_access(&mut self, mem: MemUse) {
        let size = ACCESS_SIZES.iter().position(|&s| s == mem.size).expect("the front end knows the sizes");
        self.asm.call(self.thunks.slow_access[size][usize::from(mem.write)]);
    }

    /// A group whose bytes are not all accessible: its instructions go on in code without groups.
    fn slow_group(&mut self, slow: &SlowPath, lead: Lead) {
        self.find_group(slow, lead);
        let site = self.asm.jmp(0);
        self.link(self.start.wrapping_add(slow.guest.into()), site, false);
        self.links.last_mut().expect("just made").plain = true;
    }

    /// Goes back if the group's bytes are accessible after all.
    fn find_group(&mut self, slow: &SlowPath, lead: Lead) {
        // add T0, [T1 + tag]
        self.asm.mem(&[], true, &[0x03], T0, Mem::At(T1, Entry::tag_offset(lead.write)));
        self.asm.mov_imm(T1, u64::from(lead.span) | u64::from(lead.write) << 16);
        self.asm.call(self.thunks.slow_group);
        self.asm.regs(true, &[0x85], T0, T0); // test T0, T0
        self.asm.jcc(cc::NE, slow.back);
    }
}
