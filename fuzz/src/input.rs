//! Building blocks of inputs: values and files that have a chance to mean something.

use arbitrary::Unstructured;

/// A number: often one at which something changes, else any.
pub(crate) fn number(u: &mut Unstructured) -> u64 {
    let near = |at: u64, by: i8| at.wrapping_add_signed(by.into());
    match byte(u) % 8 {
        0 => u64::from(byte(u)),
        1 => near(1 << (byte(u) % 64), small(u)),
        2 => near(0, small(u)),
        3 => near([1 << 31, 1 << 32, 1 << 47, 1 << 63][usize::from(byte(u) % 4)], small(u)),
        4 => u64::from(u.arbitrary::<u16>().unwrap_or(0)),
        5 => u64::from(u.arbitrary::<u32>().unwrap_or(0)),
        _ => u.arbitrary().unwrap_or(0),
    }
}

/// A byte; zero where the input has ended.
pub(crate) fn byte(u: &mut Unstructured) -> u8 {
    u.arbitrary().unwrap_or(0)
}

fn small(u: &mut Unstructured) -> i8 {
    byte(u) as i8 / 8
}

/// One of `all`.
pub(crate) fn pick<T: Copy>(u: &mut Unstructured, all: &[T]) -> T {
    all[usize::from(byte(u)) % all.len()]
}

/// True once in `times`.
pub(crate) fn one_in(u: &mut Unstructured, times: u8) -> bool {
    byte(u) % times == times - 1
}

/// A file: the rest of the input as it is, or one of `valid` with a few changes.
pub(crate) fn file(u: &mut Unstructured, valid: &[Vec<u8>]) -> Vec<u8> {
    let choice = usize::from(byte(u)) % (valid.len() + 1);
    let Some(valid) = valid.get(choice) else {
        return u.bytes(u.len()).unwrap_or_default().to_vec();
    };
    let mut file = valid.clone();
    for _ in 0..byte(u) % 8 {
        change(u, &mut file);
    }
    file
}

/// A place in a file: mostly in what is likely to be a header.
fn place(u: &mut Unstructured, len: usize) -> usize {
    let raw = usize::from(u.arbitrary::<u16>().unwrap_or(0));
    let within = if one_in(u, 3) { len } else { len.min(1024) };
    raw % within.max(1)
}

fn change(u: &mut Unstructured, file: &mut Vec<u8>) {
    let at = place(u, file.len());
    match byte(u) % 8 {
        0 => file.truncate(at),
        1 => {
            let end = (at + usize::from(byte(u))).min(file.len());
            file.drain(at.min(end)..end);
        }
        2 => {
            let more = vec![byte(u); usize::from(byte(u))];
            let at = at.min(file.len());
            file.splice(at..at, more);
        }
        _ => {
            let value = number(u).to_le_bytes();
            let width = 1usize << (byte(u) % 4);
            for (to, from) in file.iter_mut().skip(at).zip(&value[..width]) {
                *to = *from;
            }
        }
    }
}

/// Makes so many steps at most, as long as there is input.
pub(crate) fn steps(u: &mut Unstructured, most: usize, mut step: impl FnMut(&mut Unstructured)) {
    for _ in 0..most {
        if u.is_empty() {
            break;
        }
        step(u);
    }
}
