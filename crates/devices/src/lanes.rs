//! Splitting an access into the register-sized parts that a device has: bytes, or parts of double words.

/// Reads each byte of an access by itself. Offsets beyond the address space read as all ones.
pub(crate) fn read_bytes(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u8) {
    for (i, byte) in data.iter_mut().enumerate() {
        *byte = offset.checked_add(i as u64).map_or(0xff, &mut read);
    }
}

/// Writes each byte of an access by itself, the lowest first.
pub(crate) fn write_bytes(offset: u64, data: &[u8], mut write: impl FnMut(u64, u8)) {
    for (i, &byte) in data.iter().enumerate() {
        if let Some(at) = offset.checked_add(i as u64) {
            write(at, byte);
        }
    }
}

/// Reads an access from aligned double words, asking for each that it touches once.
pub(crate) fn read_dwords(offset: u64, data: &mut [u8], mut read: impl FnMut(u64) -> u32) {
    let mut current: Option<(u64, [u8; 4])> = None;
    read_bytes(offset, data, |at| {
        let register = at & !3;
        let bytes = match current {
            Some((r, bytes)) if r == register => bytes,
            _ => read(register).to_le_bytes(),
        };
        current = Some((register, bytes));
        bytes[(at & 3) as usize]
    });
}

/// Writes an access to aligned double words: for each the value in its place and the enables of its four bytes.
pub(crate) fn write_dwords(offset: u64, data: &[u8], mut write: impl FnMut(u64, u32, u8)) {
    let mut current: Option<(u64, [u8; 4], u8)> = None;
    write_bytes(offset, data, |at, byte| {
        let register = at & !3;
        let (mut bytes, mut enables) = match current.take() {
            Some((r, bytes, enables)) if r == register => (bytes, enables),
            Some((r, bytes, enables)) => {
                write(r, u32::from_le_bytes(bytes), enables);
                ([0; 4], 0)
            }
            None => ([0; 4], 0),
        };
        bytes[(at & 3) as usize] = byte;
        enables |= 1 << (at & 3);
        current = Some((register, bytes, enables));
    });
    if let Some((register, bytes, enables)) = current {
        write(register, u32::from_le_bytes(bytes), enables);
    }
}

/// The mask of the bits that byte enables let through.
pub(crate) fn enabled_bits(enables: u8) -> u32 {
    (0..4).filter(|i| enables >> i & 1 != 0).fold(0, |mask, i| mask | 0xff << (8 * i))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dwords_are_asked_for_once() {
        let mut asked = Vec::new();
        let mut data = [0; 4];
        read_dwords(2, &mut data, |r| {
            asked.push(r);
            0x0403_0201u32.wrapping_add((r as u32) << 4)
        });
        assert_eq!(asked, [0, 4]);
        assert_eq!(data, [3, 4, 0x41, 2]);
    }

    #[test]
    fn writes_carry_byte_enables() {
        let mut seen = Vec::new();
        write_dwords(3, &[0xaa, 0xbb], |r, v, e| seen.push((r, v, e)));
        assert_eq!(seen, [(0, 0xaa00_0000, 8), (4, 0xbb, 1)]);
        assert_eq!(enabled_bits(0b1001), 0xff00_00ff);
    }
}
