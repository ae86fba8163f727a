//! General-purpose instructions.

use iced_x86::{Instruction, Mnemonic};

use super::Handler;

/// The handler of a general-purpose instruction.
pub(super) fn handler(i: &Instruction) -> Option<Handler> {
    Some(match i.mnemonic() {
        Mnemonic::Nop | Mnemonic::Pause => |_, _| Ok(()),
        _ => return None,
    })
}
