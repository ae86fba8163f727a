//! Formats of images, by name and by content.

use std::fmt;
use std::io;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::file::HostFile;

/// Bytes at the beginning of a file, and at its end, by which formats are known.
pub(crate) const PROBE: usize = 512;

/// A format of images.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Format {
    /// The disk's bytes and nothing else.
    Raw,
    /// QEMU's, versions 2 and 3.
    Qcow2,
    /// Connectix' and Virtual PC's.
    Vhd,
    /// Hyper-V's.
    Vhdx,
    /// VMware's.
    Vmdk,
}

impl Format {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Raw, Self::Qcow2, Self::Vhd, Self::Vhdx, Self::Vmdk];

    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Raw => "raw",
            Self::Qcow2 => "qcow2",
            Self::Vhd => "vhd",
            Self::Vhdx => "vhdx",
            Self::Vmdk => "vmdk",
        }
    }

    /// The format that a file of these first bytes has.
    pub(crate) fn of_start(start: &[u8]) -> Option<Self> {
        let magics: [(&[u8], Self); 5] = [
            (b"QFI\xfb", Self::Qcow2),
            (b"conectix", Self::Vhd),
            (b"vhdxfile", Self::Vhdx),
            (b"KDMV", Self::Vmdk),
            (b"# Disk DescriptorFile", Self::Vmdk),
        ];
        magics.into_iter().find(|(magic, _)| start.starts_with(magic)).map(|(_, format)| format)
    }

    /// The format that a file of these last 512 bytes has.
    pub(crate) fn of_end(end: &[u8]) -> Option<Self> {
        end.starts_with(b"conectix").then_some(Self::Vhd)
    }

    /// The format of a file by its content; what is nothing else is raw.
    pub(crate) fn probe(file: &HostFile) -> io::Result<Self> {
        let start = file.read_vec(0, PROBE)?;
        if let Some(format) = Self::of_start(&start) {
            return Ok(format);
        }
        let end = match file.size()?.checked_sub(PROBE as u64) {
            Some(at) => file.read_vec(at, PROBE)?,
            None => Vec::new(),
        };
        Ok(Self::of_end(&end).unwrap_or(Self::Raw))
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for Format {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "vpc" => Ok(Self::Vhd),
            _ => Self::ALL
                .into_iter()
                .find(|format| format.name() == text)
                .ok_or_else(|| format!("'{text}': expected raw, qcow2, vhd, vhdx or vmdk")),
        }
    }
}
