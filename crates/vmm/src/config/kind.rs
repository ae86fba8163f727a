//! What a machine is like, in a word.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What a machine is like.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum MachineKind {
    /// A PC: its devices are on a PCI bus.
    #[default]
    Pc,
    /// The smallest machine: without PCI, its virtio devices behind registers in memory.
    Microvm,
}

impl fmt::Display for MachineKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pc => "pc",
            Self::Microvm => "microvm",
        })
    }
}

impl FromStr for MachineKind {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "pc" => Ok(Self::Pc),
            "microvm" => Ok(Self::Microvm),
            _ => Err("expected pc or microvm".into()),
        }
    }
}
