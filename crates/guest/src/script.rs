//! A script for the guest, carried on the kernel command line.

/// What the guest prints before the exit status of such a script, alone on a line with it.
pub const EXIT_MARK: &str = "RUSE-EXIT";

/// The word to add to the kernel command line so that the default guest runs `script` with its shell,
/// prints [`EXIT_MARK`] and the script's exit status, and powers off. Linux takes 2047 bytes of
/// command line, so a script may have about 1400 bytes.
pub fn run_argument(script: &str) -> String {
    format!("ruse.run={}", base64(script.as_bytes()))
}

fn base64(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let mut text = String::with_capacity(bytes.len().div_ceil(3) * 4);
    for chunk in bytes.chunks(3) {
        let word =
            chunk.iter().enumerate().fold(0u32, |word, (i, &byte)| word | u32::from(byte) << (16 - 8 * i));
        for digit in 0..4 {
            let value = (word >> (18 - 6 * digit) & 63) as usize;
            text.push(if digit <= chunk.len() { DIGITS[value] as char } else { '=' });
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn base64_pads_as_the_standard_says() {
        let pairs = [
            ("", ""),
            ("f", "Zg=="),
            ("fo", "Zm8="),
            ("foo", "Zm9v"),
            ("foob", "Zm9vYg=="),
            ("\u{ff}", "w78="),
        ];
        for (plain, coded) in pairs {
            assert_eq!(base64(plain.as_bytes()), coded);
        }
        assert_eq!(run_argument("exit 3"), "ruse.run=ZXhpdCAz");
    }
}
