//! How the groups of a loop move from round to round.

use iced_x86::{Code, Instruction, OpKind, Register};

use super::{Finder, Group, Key, Lead, NONE, WALKERS, initial};
use crate::backend::x86_64::{Home, home};

/// Most bytes that a group may move on in a round to be a stride: some rounds should come of a page.
const STEP: i64 = 512;

/// Most bytes of a table that is a stride: it has to lie on one page.
const TABLE: i64 = 2048;

/// A group whose address moves on by the same distance in each round of a loop, or stands still.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stride {
    /// Number of the group.
    pub group: u8,
    /// The group as its leader sees it.
    pub lead: Lead,
    /// Registers of the address.
    pub base: Option<Part>,
    /// Of the index, that is.
    pub index: Option<Part>,
    /// What the index is shifted left by.
    pub scale: u8,
    /// FS or GS, or none.
    pub segment: Register,
    /// From what the registers give when a round begins to the group's first byte.
    pub first: i32,
    /// Bytes that the address moves on in a round.
    pub step: i64,
    /// The index may be anything between 0 and what the span has room for, in each round.
    pub table: bool,
}

impl Stride {
    /// No register of the address changes in the loop.
    pub fn stands_still(&self) -> bool {
        ![self.base, self.index].into_iter().flatten().any(|part| part.changes)
    }
}

/// A register in the address of a [`Stride`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// Guest register.
    pub register: u8,
    /// It changes in the loop.
    pub changes: bool,
}

impl Finder<'_> {
    /// At the end of a loop: finds the groups whose addresses are made of registers that move evenly, walk or stand still,
    /// or of an index into a table. Gives a register that counts the rounds by moving on evenly.
    pub(super) fn course(&mut self) -> Option<(u8, i32)> {
        let steps: [Option<i64>; 16] = std::array::from_fn(|r| {
            (self.registers[r].root == initial(r)).then_some(self.registers[r].distance)
        });
        let counts = |r: u8| {
            let step = i32::try_from(steps[usize::from(r)]?).ok()?;
            (step != 0 && matches!(home(r), Home::Host(_))).then_some((r, step))
        };
        let counter = (0..16).find_map(counts);
        for group in &mut self.groups {
            let room = self.small.iter().find(|small| small.0 == group.key.index).map(|small| small.1);
            group.stride =
                stride(group, &steps, self.changed, room).filter(|s| s.step == 0 || counter.is_some());
        }
        self.mark_walks();
        // What comes behind the loop does not make its groups larger.
        if self.groups.iter().any(|group| group.stride.is_some()) {
            self.close();
        }
        counter.filter(|_| self.groups.iter().any(|g| g.stride.is_some_and(|s| s.step != 0)))
    }

    fn mark_walks(&mut self) {
        let goes_on = |root: u16| {
            let register = usize::from(root).wrapping_sub(1);
            root == NONE
                || self.registers.get(register).is_some_and(|value| value.root == root)
                || (register < 16 && self.added >> register & 1 != 0)
        };
        for group in self.groups.iter_mut().filter(|group| group.stride.is_none()) {
            let Key { base, index, .. } = group.key;
            group.walks =
                goes_on(base) && (goes_on(index) || self.small.iter().any(|small| small.0 == index));
        }
        if self.groups.iter().filter(|group| group.walks).count() > WALKERS {
            self.groups.iter_mut().for_each(|group| group.walks = false);
        }
    }
}

/// Says how a group moves in a loop at whose end the registers have moved by `steps`, if they move evenly. A page that may
/// not be written after all must not become a dirty one: what is behind a branch is no stride if it writes.
/// `room`: how large the index can be, if it is one into a table.
fn stride(group: &Group, steps: &[Option<i64>; 16], changed: u16, room: Option<u32>) -> Option<Stride> {
    if !group.direct || group.write && group.branches > 0 {
        return None;
    }
    let part = |root: u16| {
        let register = usize::from(root).checked_sub(1)?;
        Some(Part { register: register as u8, changes: changed >> register & 1 != 0 })
    };
    let step = |root: u16| if root == NONE { Some(0) } else { *steps.get(usize::from(root) - 1)? };
    let Key { base, index, scale, segment } = group.key;
    let lead = group.lead();
    let (index, steps, span) = match room {
        Some(room) => (Some(Part { register: 0, changes: true }), 0, i64::from(room) * i64::from(scale)),
        None => (part(index), step(index)?.wrapping_mul(scale.into()), 0),
    };
    let (step, span) = (step(base)?.wrapping_add(steps), span + i64::from(lead.span));
    let first = i32::try_from(group.min).ok()?;
    (step.unsigned_abs() <= STEP as u64 && span <= TABLE).then_some(Stride {
        group: 0,
        lead: Lead { span: span as u16, ..lead },
        base: part(base),
        index,
        scale: scale.trailing_zeros() as u8,
        segment,
        first,
        step,
        table: room.is_some(),
    })
}

/// How large a register can be that an instruction has just written, if that is known and not much.
pub(super) fn most_after(i: &Instruction) -> Option<u32> {
    match i.code() {
        Code::Movzx_r32_rm8 | Code::Movzx_r64_rm8 => Some(u8::MAX.into()),
        Code::And_rm32_imm8
        | Code::And_rm64_imm8
        | Code::And_rm32_imm32
        | Code::And_rm64_imm32
        | Code::And_EAX_imm32
        | Code::And_RAX_imm32
            if i.op0_kind() == OpKind::Register =>
        {
            u32::try_from(i.immediate(1)).ok().filter(|&most| i64::from(most) < TABLE)
        }
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::{
        super::{Member, OPERAND, tests::plan},
        *,
    };

    #[test]
    fn what_moves_evenly_in_a_loop_is_a_stride_and_what_walks_remembers_pages() {
        // mov rax, [rdi+rcx*8]; add rax, [rsi]; mov rdx, [rax]; add rsi, r8; inc rcx; cmp rcx, rbx; jne
        let code = [
            0x48, 0x8b, 0x04, 0xcf, 0x48, 0x03, 0x06, 0x48, 0x8b, 0x10, 0x4c, 0x01, 0xc6, 0x48, 0xff, 0xc1,
            0x48, 0x39, 0xd9, 0x75, 0xeb, 0xc3,
        ];
        let plan = plan(&code);
        assert_eq!((plan.back, &plan.walking[..], plan.counter), (Some(6), &[1][..], Some((1, 1))));
        let alone = Lead { span: 8, write: false, followed: false, walks: false };
        assert_eq!(plan.places[0][OPERAND], Some(Member { group: 0, at: 0, leads: Some(alone) }));
        let walks = Lead { walks: true, ..alone };
        assert_eq!(plan.places[1][OPERAND], Some(Member { group: 1, at: 0, leads: Some(walks) }));
        assert_eq!(plan.places[2][OPERAND], None, "an address that was read");
        let stride = Stride {
            group: 0,
            lead: alone,
            base: Some(Part { register: 7, changes: false }),
            index: Some(Part { register: 1, changes: true }),
            scale: 3,
            segment: Register::None,
            first: 0,
            step: 8,
            table: false,
        };
        assert_eq!(plan.strides, [stride]);
    }

    #[test]
    fn a_stride_begins_where_its_first_access_is() {
        // add rdi, 16; mov eax, [rdi-8]; mov [rdi-4], eax; dec rsi; jne; ret
        let code =
            [0x48, 0x83, 0xc7, 0x10, 0x8b, 0x47, 0xf8, 0x89, 0x47, 0xfc, 0x48, 0xff, 0xce, 0x75, 0xf1, 0xc3];
        let plan = plan(&code);
        let [stride] = plan.strides[..] else { panic!("{:?}", plan.strides) };
        assert_eq!((stride.first, stride.step, stride.lead.span, stride.lead.write), (8, 16, 8, true));
        assert_eq!(plan.counter, Some((6, -1)));
    }

    #[test]
    fn a_write_behind_a_branch_is_no_stride() {
        // cmp byte [rsi], 0; je +7; mov [rdi], al; inc rsi; inc rdi; dec rdx; jne; ret
        let code = [
            0x80, 0x3e, 0x00, 0x74, 0x0d, 0x88, 0x07, 0x48, 0xff, 0xc6, 0x48, 0xff, 0xc7, 0x48, 0xff, 0xca,
            0x75, 0xee, 0xc3,
        ];
        let plan = plan(&code);
        assert_eq!(plan.strides.iter().map(|s| s.lead.write).collect::<Vec<_>>(), [false]);
        assert_eq!(plan.walking, [1]);
    }

    #[test]
    fn large_steps_make_no_stride() {
        let strides = |step: u32| {
            // mov eax, [rdi]; add rdi, step; dec rsi; jne; ret
            let mut code = vec![0x8b, 0x07, 0x48, 0x81, 0xc7];
            code.extend(step.to_le_bytes());
            code.extend([0x48, 0xff, 0xce, 0x75, 0xf2, 0xc3]);
            plan(&code).strides.len()
        };
        assert_eq!((strides(512), strides(513), strides(-512i32 as u32)), (1, 0, 1));
    }

    #[test]
    fn a_loop_that_walks_in_many_places_remembers_none() {
        let loads = |count: u8| {
            // mov eax, [rdi+n*80h]; each in a group of its own
            let load = |n: u8| [0x8b, 0x87].into_iter().chain((u32::from(n) * 128).to_le_bytes());
            let mut code: Vec<u8> = (0..count).flat_map(load).collect();
            // add rdi, r8; sub rsi, 1; jne back; ret
            code.extend([
                0x4c,
                0x01,
                0xc7,
                0x48,
                0x83,
                0xee,
                0x01,
                0x75,
                0u8.wrapping_sub(6 * count + 9),
                0xc3,
            ]);
            plan(&code).walking.len()
        };
        assert_eq!((loads(4), loads(5)), (4, 0));
    }

    #[test]
    fn a_table_that_a_byte_looks_up_is_a_stride() {
        // movzx ecx, cl; xor eax, [rdi+rcx*4]; mov ecx, [rdi+rdx*4]; xor edx, ecx; dec rsi; jne
        let code = [
            0x0f, 0xb6, 0xc9, 0x33, 0x04, 0x8f, 0x8b, 0x0c, 0x97, 0x31, 0xca, 0x48, 0xff, 0xce, 0x75, 0xf0,
            0xc3,
        ];
        let plan = plan(&code);
        let [stride] = plan.strides[..] else { panic!("{:?}", plan.strides) };
        assert_eq!((plan.back, stride.table, stride.step, stride.lead.span), (Some(5), true, 0, 255 * 4 + 4));
        assert!(plan.places[1][OPERAND].is_some() && plan.places[2][OPERAND].is_none());
    }
}
