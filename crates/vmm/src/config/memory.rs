//! RAM in words: `SIZE[,max=SIZE]`.

use std::str::FromStr;

use super::size::parse_size;

/// How much RAM there is, and how much there can be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MemorySize {
    /// Bytes at first.
    pub size: u64,
    /// Bytes that there can be later, if that is more.
    pub max: Option<u64>,
}

impl FromStr for MemorySize {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (size, max) = match text.split_once(',') {
            None => (text, None),
            Some((size, rest)) => {
                let max = rest.strip_prefix("max=").ok_or(format!("'{rest}': expected max=SIZE"))?;
                (size, Some(parse_size(max).map_err(|error| format!("max: {error}"))?))
            }
        };
        Ok(Self { size: parse_size(size).map_err(|error| error.to_string())?, max })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        assert_eq!("512".parse(), Ok(MemorySize { size: 512 << 20, max: None }));
        assert_eq!("1G,max=4G".parse(), Ok(MemorySize { size: 1 << 30, max: Some(4 << 30) }));
        for bad in ["", "x", "1G,", "1G,4G", "1G,max=", "1G,max=x", ",max=1G", "1G,max=1G,max=2G"] {
            assert!(bad.parse::<MemorySize>().is_err(), "{bad}");
        }
    }
}
