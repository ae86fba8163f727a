//! Pages of user code, as direct execution looks through them.

use arbitrary::Unstructured;
use ruse_dbt::direct::scan::{LONGEST, PAGE, Page, Verdict, is_suspicious, look, replace};

use crate::input::{one_in, pick};

/// What is looked for, and what leads to it.
const PIECES: [&[u8]; 10] = [
    &[0x0f, 0xa2],
    &[0x0f, 0x01, 0xd0],
    &[0x48, 0x0f, 0xae, 0x64, 0x24, 0x40],
    &[0xf3, 0x41, 0x0f, 0xc7, 0xff],
    &[0xb8, 0x7b, 0, 0, 0, 0x0f, 0x03, 0xc0],
    &[0x31, 0xc9],
    &[0x74, 0x10],
    &[0xeb, 0xf0],
    &[0xe8, 0x20, 0, 0, 0],
    &[0xc3],
];

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let mut page: Page = [0x90; PAGE + LONGEST];
    let mut roots = Vec::new();
    while !u.is_empty() {
        let at = u.int_in_range(0..=PAGE - 1).unwrap_or(0);
        let bytes = if one_in(u, 4) { u.bytes(1).unwrap_or(&[0x0f]) } else { pick(u, &PIECES) };
        let end = (at + bytes.len()).min(page.len());
        page[at..end].copy_from_slice(&bytes[..end - at]);
        if one_in(u, 4) {
            roots.push(at as u16);
        }
    }
    let Verdict::Replace(instructions) = look(&page, roots.iter().copied()) else { return };
    assert!(is_suspicious(&page));
    assert!(!instructions.is_empty() && instructions.iter().all(|&at| usize::from(at) < PAGE));
    replace(&mut page, &instructions);
    // What is replaced is not found again.
    if let Verdict::Replace(more) = look(&page, roots) {
        assert!(more.iter().all(|at| !instructions.contains(at)));
    }
}
