//! Small numbers in a row, in as few bytes as they need: seven bits a byte, the low ones first.

/// Appends a number.
pub fn put(bytes: &mut Vec<u8>, mut value: u32) {
    while value >= 0x80 {
        bytes.push(value as u8 | 0x80);
        value >>= 7;
    }
    bytes.push(value as u8);
}

/// Takes the next number.
pub fn take(bytes: &mut std::slice::Iter<u8>) -> u32 {
    let (mut value, mut shift) = (0, 0);
    for &byte in bytes {
        value |= u32::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            break;
        }
        shift += 7;
    }
    value
}
