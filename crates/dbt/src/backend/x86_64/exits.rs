//! Ways out of a region: branches, links to other regions, calls and returns.

use iced_x86::{Code, Instruction};

use super::{
    asm::{
        cc,
        host::{T0, T1},
    },
    block,
    emit::{Emitter, Link},
    loops::Round,
    out_of_line::{Stub, StubKind},
    thunks::probe_jumps,
};
use crate::ir::Node;

/// Bytes of the longest instruction (SDM volume 2, 2.3.11).
const LONGEST: u64 = 15;

impl Emitter<'_> {
    pub(super) fn branch(&mut self, node: &Node, condition: u8, target: u64) {
        let complete = self.restore_flags(node.reads);
        let branch = self.asm.jcc(condition, 0);
        let save_flags = node.live_at_exit != 0 && !self.in_block;
        if self.is_near(target) && !save_flags {
            self.link(target, branch, false);
        } else {
            self.stubs.push(Stub { branch, kind: StubKind::Exit { target, save_flags } });
        }
        self.in_host &= complete;
    }

    /// The branch at the end of a loop. `true` if nothing runs after it: what follows a second copy is another region.
    pub(super) fn go_back(&mut self, node: &Node, condition: u8) -> bool {
        let complete = self.restore_flags(node.reads);
        let over = self.asm.jcc(condition ^ 1, 0);
        self.next_round();
        self.asm.bind(over);
        self.in_host &= complete;
        let second = matches!(self.round, Round::Second { .. });
        if second {
            self.spill_flags(node.live_out);
            self.in_host = false;
            self.exit_to(node.insn.next_ip());
        }
        second
    }

    /// The instruction at the end of the region is tier 0's.
    pub(super) fn interpret_last(&mut self, i: &Instruction, live: u32) {
        let thunk = match i.code() {
            Code::Syscall => self.thunks.system_call,
            Code::Sysretq => self.thunks.system_return,
            _ => return self.interpret(i.ip(), live),
        };
        self.spill_flags(live);
        self.asm.mov_address(T0, i.ip());
        self.asm.mov_imm(T1, i.len() as u64);
        self.asm.jmp(thunk);
    }

    /// Leaves to tier 0 at the linear address `at`.
    pub(super) fn interpret(&mut self, at: u64, live: u32) {
        self.spill_flags(live);
        self.asm.mov_address(T0, at);
        self.asm.jmp(self.thunks.interpret);
    }

    /// Leaves to a linear address that is known. The flags are in the block.
    pub(super) fn exit_to(&mut self, target: u64) {
        let near = self.is_near(target);
        if !near {
            let generation =
                if target >> 63 != 0 { block::KERNEL_GENERATION } else { block::USER_GENERATION };
            // Generation 0 is never in force: the guard fails until the link is resolved.
            self.asm.mem(&[], false, &[0x81], 7, generation);
            self.asm.bytes(&0u32.to_le_bytes());
            let branch = self.asm.jcc(cc::NE, 0);
            self.stubs.push(Stub { branch, kind: StubKind::Unresolved(self.links.len()) });
        }
        let site = self.asm.jmp(0);
        self.link(target, site, !near);
    }

    /// Whether the mapping under which this region runs is the target's as well. An instruction that begins near the end
    /// of the page may depend on the next page's.
    pub(super) fn is_near(&self, target: u64) -> bool {
        target >> 12 == self.start >> 12 && target & 0xfff <= 4096 - LONGEST
    }

    /// The displacement at `site` will lead to `target`.
    pub(super) fn link(&mut self, target: u64, site: usize, guarded: bool) {
        self.stubs.push(Stub { branch: site, kind: StubKind::Unresolved(self.links.len()) });
        let ahead = target > self.start.wrapping_add(self.guest_offset.into());
        let link = Link { target, site: site as u32, unresolved: 0, guarded, plain: false, ahead };
        self.links.push(link);
    }

    /// Makes T1 address the jump cache's entry for the linear address in T0. The flags are in the block. Leaves as
    /// `unknown` says where the cache has none: the target may not even be an address.
    pub(super) fn find_jump(&mut self, unknown: fn(u16) -> StubKind) {
        let branch = probe_jumps(&mut self.asm);
        self.stubs.push(Stub { branch, kind: unknown(self.guest_offset) });
    }
}
