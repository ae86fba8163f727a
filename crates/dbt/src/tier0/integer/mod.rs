//! General-purpose instructions (SDM volume 1, 7.3) except those that load segments, use ports or need privileges.

mod access;
mod alu;
mod atomic;
mod bits;
mod bmi;
mod branch;
mod exchange;
mod flags;
mod misc;
mod mov;
mod muldiv;
#[cfg(test)]
mod native;
mod shift;
mod stack_ops;
mod string;
#[cfg(test)]
mod tests;

use iced_x86::Instruction;

pub(crate) use self::bits::bit_string_address;
use super::Handler;

/// The handler of a general-purpose instruction.
pub(super) fn handler(i: &Instruction) -> Option<Handler> {
    let groups = [
        alu::handler,
        alu::decimal_handler,
        shift::handler,
        muldiv::handler,
        bits::handler,
        bmi::handler,
        mov::handler,
        exchange::handler,
        stack_ops::handler,
        branch::handler,
        string::handler,
        misc::handler,
    ];
    groups.into_iter().find_map(|group| group(i))
}
