//! Sizes in bytes as people write them.

/// Why a text is not a size.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// Not a number with a known unit.
    #[error("expected a size such as 512M or 2G")]
    Syntax,
    /// More than 64 bits of bytes.
    #[error("the size is too large")]
    Range,
}

/// Reads a whole number with a unit: K, M, G or T (powers of 1024; `KiB` and `KB` mean the same), or B for bytes. A
/// number without a unit counts MiB, as other monitors have it.
pub fn parse_size(text: &str) -> Result<u64, SizeError> {
    let digits = text.bytes().take_while(u8::is_ascii_digit).count();
    let (number, unit) = text.split_at(digits);
    if number.is_empty() {
        return Err(SizeError::Syntax);
    }
    let number: u64 = number.parse().map_err(|_| SizeError::Range)?;
    let shift = match unit.to_ascii_lowercase().as_str() {
        "b" => 0,
        "k" | "kb" | "kib" => 10,
        "" | "m" | "mb" | "mib" => 20,
        "g" | "gb" | "gib" => 30,
        "t" | "tb" | "tib" => 40,
        _ => return Err(SizeError::Syntax),
    };
    number.checked_mul(1 << shift).ok_or(SizeError::Range)
}

/// A size for messages, in the largest unit that is exact to a tenth or so.
pub fn format_size(bytes: u64) -> String {
    for (shift, unit) in [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")] {
        let whole = bytes >> shift;
        if whole == 0 {
            continue;
        }
        let tenths = ((u128::from(bytes) * 10) >> shift) % 10;
        return if tenths == 0 { format!("{whole} {unit}") } else { format!("{whole}.{tenths} {unit}") };
    }
    format!("{bytes} bytes")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("512", 512 << 20),
            ("512M", 512 << 20),
            ("2g", 2 << 30),
            ("1GiB", 1 << 30),
            ("4096b", 4096),
            ("64kb", 64 << 10),
            ("1T", 1 << 40),
            ("0", 0),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "M", "-1", "1.5G", "1 G", "12X", "0x10", "١"] {
            assert_eq!(parse_size(text), Err(SizeError::Syntax), "{text}");
        }
        for text in ["99999999999999999999", "18446744073709551615", "16777216T"] {
            assert_eq!(parse_size(text), Err(SizeError::Range), "{text}");
        }
    }

    #[test]
    fn sizes_read_well() {
        for (bytes, text) in
            [(0, "0 bytes"), (4095, "3.9 KiB"), (1 << 20, "1 MiB"), (3 << 29, "1.5 GiB"), (1 << 40, "1 TiB")]
        {
            assert_eq!(format_size(bytes), text);
        }
        format_size(u64::MAX);
    }
}
