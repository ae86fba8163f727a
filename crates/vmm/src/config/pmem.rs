//! Persistent memory in words: `PATH[,readonly]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A file that the guest finds in its memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PmemConfig {
    /// The file.
    pub path: PathBuf,
    /// The guest cannot change it.
    pub read_only: bool,
}

impl FromStr for PmemConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (path, read_only) = match text.split_once(',') {
            None => (text, false),
            Some((path, "readonly")) => (path, true),
            Some((_, rest)) => return Err(format!("'{rest}': expected readonly")),
        };
        match path {
            "" => Err("expected the path of a file".into()),
            path => Ok(Self { path: path.into(), read_only }),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        let pmem = |path: &str, read_only| Ok(PmemConfig { path: path.into(), read_only });
        assert_eq!("/tmp/a b".parse(), pmem("/tmp/a b", false));
        assert_eq!("x,readonly".parse(), pmem("x", true));
        for bad in ["", ",readonly", "x,", "x,ro", "x,readonly,readonly"] {
            assert!(bad.parse::<PmemConfig>().is_err(), "{bad}");
        }
    }
}
