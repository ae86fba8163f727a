//! Instructions that user code can execute and that would tell it of the host instead of its own CPU, without a trap: CPUID,
//! XGETBV, RDPID, and those that store as much state as the host's CPU has. Where they are executed directly, they are
//! replaced by one that traps, in a copy of their page.
//!
//! Bytes like theirs may as well be a part of other instructions, or data. So an instruction is replaced only where control
//! flow leads to it from code that is known to be executed, and bytes are passed over where it leads over them, or where
//! code that is decoded from hardly any place before them would execute them. A page with other such bytes is left to the
//! translator, which gets to know its code.

use iced_x86::{Code, Decoder, DecoderOptions, FlowControl, Instruction, Mnemonic};

/// Bytes of a page.
pub const PAGE: usize = 4096;
/// Bytes of the longest instruction.
pub const LONGEST: usize = 15;
/// HLT: traps in user code, and is one byte.
const TRAPS: u8 = 0xf4;

/// A page of code and the first bytes behind it.
pub type Page = [u8; PAGE + LONGEST];

/// What is to be done with a page.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// It may be executed as it is.
    Clean,
    /// It may be executed with these instructions (offsets of their first bytes) replaced.
    Replace(Vec<u16>),
    /// What some of its bytes are is not known.
    Unknown,
}

/// Whether a page has, anywhere, bytes like those of an instruction that is to trap.
pub fn is_suspicious(page: &Page) -> bool {
    suspects(page).next().is_some()
}

/// Where bytes like those begin: 0F, also behind the page if prefixes at its end belong to it.
fn suspects(page: &Page) -> impl Iterator<Item = usize> {
    let prefixes =
        page[PAGE - 1..].iter().take(3).take_while(|b| matches!(b, 0xf2 | 0xf3 | 0x66 | 0x40..=0x4f));
    (0..PAGE + prefixes.count()).filter(|&i| page[i] == 0x0f && is_suspect(page, i))
}

fn is_suspect(page: &Page, at: usize) -> bool {
    match (page[at + 1], page[at + 2]) {
        // CPUID, XGETBV.
        (0xa2, _) | (0x01, 0xd0) => true,
        // XSAVE and XSAVEOPT; XSAVEC; RDPID.
        (0xae, modrm) => matches!(modrm & 0x38, 0x20 | 0x30) && modrm < 0xc0,
        (0xc7, modrm) => {
            modrm & 0x38 == 0x20 && modrm < 0xc0 || modrm >= 0xf8 && cpu_number_prefix(page, at).is_some()
        }
        (0x03, modrm) => modrm >= 0xc0 && is_cpu_number(page, at),
        _ => false,
    }
}

/// Where F3, the prefix that makes RDPID of RDSEED, lies before 0F at an offset: there may be one of REX between.
fn cpu_number_prefix(page: &Page, at: usize) -> Option<usize> {
    let before = |n: usize| at.checked_sub(n).map(|i| page[i]);
    match (before(1), before(2)) {
        (Some(0xf3), _) => Some(at - 1),
        (Some(0x40..=0x4f), Some(0xf3)) => Some(at - 2),
        _ => None,
    }
}

/// LSL of the descriptor from which Linux programs take the number of their CPU: MOV EAX, 7Bh before it.
fn is_cpu_number(page: &Page, at: usize) -> bool {
    at >= 5 && page[at - 5..at] == [0xb8, 0x7b, 0, 0, 0]
}

/// Looks through a page; `roots` are offsets of instructions that are known to be executed.
pub fn look(page: &Page, roots: impl IntoIterator<Item = u16>) -> Verdict {
    let mut unknown: Vec<usize> = suspects(page).collect();
    let mut replaced = Vec::new();
    // Enough bytes in a row to be no accident.
    unknown.retain(|&at| {
        let start = match page[at + 1] {
            0x03 => Some(at),
            0xc7 if page[at + 2] >= 0xf8 => cpu_number_prefix(page, at),
            _ => None,
        };
        replaced.extend(start.map(|start| start as u16));
        start.is_none()
    });
    if !unknown.is_empty() {
        follow(page, roots, |start, instruction| {
            let bytes = start..start + instruction.len();
            unknown.retain(|at| {
                let inside = bytes.contains(at);
                if inside && tells_of_the_host(instruction) && !replaced.contains(&(start as u16)) {
                    replaced.push(start as u16);
                }
                !inside
            });
        });
    }
    unknown.retain(|&at| !is_harmless(page, at) && may_be_executed(page, at));
    match (unknown.is_empty(), replaced.is_empty()) {
        (false, _) => Verdict::Unknown,
        (true, true) => Verdict::Clean,
        (true, false) => Verdict::Replace(replaced),
    }
}

/// Replaces instructions.
pub fn replace(page: &mut Page, instructions: &[u16]) {
    instructions.iter().for_each(|&at| page[usize::from(at)] = TRAPS);
}

fn tells_of_the_host(instruction: &Instruction) -> bool {
    use Mnemonic::{Cpuid, Rdpid, Xgetbv, Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64};
    let stores = [Xsave, Xsave64, Xsavec, Xsavec64, Xsaveopt, Xsaveopt64];
    let mnemonic = instruction.mnemonic();
    matches!(mnemonic, Cpuid | Rdpid | Xgetbv) || stores.contains(&mnemonic)
}

/// XGETBV alone tells of nothing that CPUID does not deny.
fn is_harmless(page: &Page, at: usize) -> bool {
    page[at + 1] == 0x01
}

/// Whether code that is decoded from places some way before an offset comes to an instruction there, or to its prefixes: from
/// nearly all of them if there is one, as they soon agree; from hardly any if the bytes are a part of another instruction.
fn may_be_executed(page: &Page, at: usize) -> bool {
    const PLACES: std::ops::Range<usize> = 16..64;
    let (first, behind) = (at.saturating_sub(PLACES.end), at.saturating_sub(PLACES.start));
    let comes_there = |start: usize| {
        let mut decoder = Decoder::with_ip(64, &page[start..], start as u64, DecoderOptions::NONE);
        let mut instruction = Instruction::default();
        while decoder.position() + start <= at {
            let begins = decoder.position() + start;
            decoder.decode_out(&mut instruction);
            let end = decoder.position() + start;
            if end > at {
                return instruction.code() == Code::INVALID
                    || begins == at
                    || tells_of_the_host(&instruction);
            }
        }
        false
    };
    let places = behind - first;
    let come = (first..behind).filter(|&start| comes_there(start)).count();
    places < 16 || come * 8 >= places
}

/// Visits the instructions of a page to which control flow leads from its roots, with their offsets.
fn follow(page: &Page, roots: impl IntoIterator<Item = u16>, mut visit: impl FnMut(usize, &Instruction)) {
    let mut seen = [false; PAGE];
    let mut left: Vec<u64> = roots.into_iter().map(u64::from).collect();
    let mut decoder = Decoder::new(64, page, DecoderOptions::NONE);
    let mut instruction = Instruction::default();
    while let Some(mut at) = left.pop() {
        while (at as usize) < PAGE && !seen[at as usize] {
            seen[at as usize] = true;
            decoder.set_position(at as usize).expect("within the page");
            decoder.set_ip(at);
            decoder.decode_out(&mut instruction);
            if instruction.code() == Code::INVALID {
                break;
            }
            visit(at as usize, &instruction);
            let flow = instruction.flow_control();
            if matches!(
                flow,
                FlowControl::ConditionalBranch | FlowControl::UnconditionalBranch | FlowControl::Call
            ) {
                left.push(instruction.near_branch_target());
            }
            // Calls come back, or code follows nevertheless: compilers put nothing else there.
            if !matches!(
                flow,
                FlowControl::Next
                    | FlowControl::ConditionalBranch
                    | FlowControl::Call
                    | FlowControl::IndirectCall
            ) {
                break;
            }
            at = instruction.next_ip();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page_with(at: usize, code: &[u8]) -> Page {
        let mut page = [0x90; PAGE + LONGEST];
        page[at..at + code.len()].copy_from_slice(code);
        page
    }

    #[test]
    fn what_tells_of_the_host_is_found_wherever_it_lies() {
        let codes: [(&[u8], usize); 9] = [
            (&[0x0f, 0xa2], 0),                            // cpuid
            (&[0x0f, 0x01, 0xd0], 0),                      // xgetbv
            (&[0x0f, 0xae, 0x24, 0x24], 0),                // xsave [rsp]
            (&[0x48, 0x0f, 0xae, 0x60, 0x40], 0),          // xsave64 [rax+40h]
            (&[0x48, 0x0f, 0xae, 0x74, 0x24, 0x40], 0),    // xsaveopt64 [rsp+40h]
            (&[0x0f, 0xc7, 0x64, 0x24, 0x40], 0),          // xsavec [rsp+40h]
            (&[0xf3, 0x0f, 0xc7, 0xf8], 0),                // rdpid rax
            (&[0xf3, 0x41, 0x0f, 0xc7, 0xff], 0),          // rdpid r15
            (&[0xb8, 0x7b, 0, 0, 0, 0x0f, 0x03, 0xc0], 5), // mov eax, 7bh; lsl eax, eax
        ];
        for (code, start) in codes {
            for at in [3, 77, 4096 - code.len(), 4094 - start] {
                let mut page = page_with(at, code);
                assert!(is_suspicious(&page), "{code:02x?} at {at}");
                let found = (at + start) as u16;
                assert_eq!(look(&page, [0]), Verdict::Replace(vec![found]), "{code:02x?} at {at}");
                replace(&mut page, &[found]);
                assert_eq!(page[usize::from(found)], TRAPS);
            }
        }
    }

    #[test]
    fn other_code_is_clean() {
        let codes: [&[u8]; 8] = [
            &[0x0f, 0x05],                   // syscall
            &[0x0f, 0x01, 0xf9],             // rdtscp, which traps
            &[0x0f, 0x31],                   // rdtsc, which traps
            &[0x0f, 0xae, 0xf0],             // mfence
            &[0x0f, 0xae, 0x2c, 0x24],       // xrstor [rsp]
            &[0x0f, 0xc7, 0x4c, 0x24, 0x40], // cmpxchg8b
            &[0x0f, 0x03, 0xc0],             // lsl eax, eax
            &[0x0f, 0xc7, 0xf8],             // rdseed eax
        ];
        for code in codes {
            assert!(!is_suspicious(&page_with(77, code)), "{code:02x?}");
        }
    }

    #[test]
    fn parts_of_instructions_are_passed_over() {
        // mov eax, 0000a20fh
        let page = page_with(77, &[0xb8, 0x0f, 0xa2, 0, 0]);
        assert!(is_suspicious(&page));
        assert_eq!(look(&page, [0]), Verdict::Clean);
        // Also where nothing is known to lead there.
        assert_eq!(look(&page, [90]), Verdict::Clean);
    }

    #[test]
    fn instructions_that_nothing_is_known_of_are_not_passed_over() {
        // The ways to CPUID of compilers, behind all kinds of bytes.
        let ways: [&[u8]; 4] = [
            &[0x53, 0x31, 0xc9, 0xb8, 7, 0, 0, 0], // push rbx; xor ecx, ecx; mov eax, 7
            &[0xb8, 0, 0, 0, 0x80],                // mov eax, 80000000h
            &[0x48, 0x89, 0xde, 0x44, 0x89, 0xe0, 0x31, 0xc9], // mov rsi, rbx; mov eax, r12d; xor ecx, ecx
            &[0x83, 0xf8, 0x06, 0x7e, 0x20, 0x31, 0xd2, 0x89, 0xd1, 0xb0, 4], // … xor edx, edx; mov ecx, edx; mov al, 4
        ];
        // This program's own code is what lies before.
        let start = Verdict::eq as *const u8;
        // SAFETY: the program has more code than this, if not behind the function, then before it.
        let code = unsafe { std::slice::from_raw_parts((start as usize & !0xfff) as *const u8, PAGE) };
        let mut page = [0x90; PAGE + LONGEST];
        page[..PAGE].copy_from_slice(code);
        let mut boundaries = Vec::new();
        follow(&page, [(start as usize & 0xfff) as u16], |at, _| boundaries.push(at));
        let (mut passed, mut all) = (Vec::new(), 0);
        for at in boundaries.into_iter().filter(|&at| (100..4000).contains(&at)) {
            for way in ways {
                let mut page = page;
                page[at..at + way.len()].copy_from_slice(way);
                let at = at + way.len();
                page[at..at + 2].copy_from_slice(&[0x0f, 0xa2]);
                all += 1;
                if !may_be_executed(&page, at) {
                    passed.push(at);
                }
            }
        }
        assert!(all > 20, "only {all} places");
        assert!(passed.is_empty(), "{passed:?} of {all}");
    }

    #[test]
    fn only_what_control_flow_reaches_is_known() {
        // ret; cpuid
        let mut page = page_with(77, &[0xc3, 0x0f, 0xa2]);
        assert_eq!(look(&page, [0]), Verdict::Unknown);
        assert_eq!(look(&page, [0, 78]), Verdict::Replace(vec![78]));
        // je to behind the ret, and back
        page[10..12].copy_from_slice(&[0x74, 66]);
        assert_eq!(look(&page, [0]), Verdict::Replace(vec![78]));
        page[80..82].copy_from_slice(&[0xeb, 0xae]);
        assert_eq!(look(&page, [80]), Verdict::Replace(vec![78]));
        // A call instead of the branch.
        page[10..15].copy_from_slice(&[0xe8, 63, 0, 0, 0]);
        assert_eq!(look(&page, [0]), Verdict::Replace(vec![78]));
    }
}
