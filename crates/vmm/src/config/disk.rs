//! A disk in words: `PATH[,readonly][,serial=TEXT][,queues=N][,ring=split]`.

use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Most bytes of a serial number that a guest sees.
const SERIAL_LEN: usize = 20;
/// Most queues of a disk.
const MAX_QUEUES: u16 = 64;

/// A disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskConfig {
    /// A file or block device with the disk's bytes.
    pub path: PathBuf,
    /// The guest cannot write.
    pub read_only: bool,
    /// Its serial number, by which guests find it (`/dev/disk/by-id/virtio-…`).
    pub serial: Option<String>,
    /// Its queues, each with a thread; as many as vCPUs, at most four, for which nothing is said.
    pub queues: Option<u16>,
    /// Its rings are split, not packed, whatever the guest's driver would like best.
    pub split_rings: bool,
}

impl FromStr for DiskConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let path = words.next().filter(|path| !path.is_empty()).ok_or("expected the path of a disk")?;
        let mut disk =
            Self { path: path.into(), read_only: false, serial: None, queues: None, split_rings: false };
        for word in words {
            match word.split_once('=') {
                None if word == "readonly" => disk.read_only = true,
                Some(("ring", "split")) => disk.split_rings = true,
                Some(("serial", serial)) => disk.serial = Some(checked_serial(serial)?),
                Some(("queues", queues)) => {
                    let queues = queues.parse().ok().filter(|queues| (1..=MAX_QUEUES).contains(queues));
                    disk.queues = Some(queues.ok_or(format!("queues: expected 1 to {MAX_QUEUES}"))?);
                }
                _ => return Err(format!("'{word}': expected readonly, serial=TEXT, queues=N or ring=split")),
            }
        }
        Ok(disk)
    }
}

fn checked_serial(text: &str) -> Result<String, String> {
    let printable = text.bytes().all(|byte| byte.is_ascii_graphic());
    match printable && (1..=SERIAL_LEN).contains(&text.len()) {
        true => Ok(text.to_owned()),
        false => Err(format!("serial: expected 1 to {SERIAL_LEN} printable characters")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        let disk: DiskConfig = "/tmp/a b,readonly,serial=X-1,queues=3,ring=split".parse().unwrap();
        let expected = DiskConfig {
            path: "/tmp/a b".into(),
            read_only: true,
            serial: Some("X-1".into()),
            queues: Some(3),
            split_rings: true,
        };
        assert_eq!(disk, expected);
        assert!(!"d".parse::<DiskConfig>().unwrap().read_only);
        for bad in [
            "",
            ",readonly",
            "d,",
            "d,ro",
            "d,serial=",
            "d,serial=a b",
            "d,queues=0",
            "d,queues=65",
            "d,queues=x",
            "d,ring=x",
        ] {
            assert!(bad.parse::<DiskConfig>().is_err(), "{bad}");
        }
        assert!(format!("d,serial={}", "x".repeat(21)).parse::<DiskConfig>().is_err());
    }
}
