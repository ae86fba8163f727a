//! A socket device in words: `CID[,path=PATH]` or `CID,vhost`.

use std::path::PathBuf;
use std::str::FromStr;

use ruse_virtio::vsock::GUEST_CIDS;
use serde::{Deserialize, Serialize};

/// A socket device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VsockConfig {
    /// The guest's address.
    pub cid: u32,
    /// The Unix socket by which programs of the host reach the guest; `None` while the machine has no folder for it.
    pub path: Option<PathBuf>,
    /// The host's kernel serves it: programs of the host reach the guest by AF_VSOCK, and there is no Unix socket.
    pub vhost: bool,
}

impl FromStr for VsockConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (cid, path, vhost) = match text.split_once(',') {
            None => (text, None, false),
            Some((cid, "vhost")) => (cid, None, true),
            Some((cid, rest)) => {
                let path = rest.strip_prefix("path=").filter(|path| !path.is_empty());
                (cid, Some(path.ok_or(format!("'{rest}': expected path=PATH or vhost"))?.into()), false)
            }
        };
        let (first, last) = (GUEST_CIDS.start(), GUEST_CIDS.end());
        let cid = cid.parse().ok().filter(|cid| GUEST_CIDS.contains(cid));
        Ok(Self { cid: cid.ok_or(format!("expected an address from {first} to {last}"))?, path, vhost })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        assert_eq!("3".parse(), Ok(VsockConfig { cid: 3, path: None, vhost: false }));
        let path = Some("/tmp/a,b".into());
        assert_eq!(
            "4294967294,path=/tmp/a,b".parse(),
            Ok(VsockConfig { cid: 4294967294, path, vhost: false })
        );
        assert_eq!("3,vhost".parse(), Ok(VsockConfig { cid: 3, path: None, vhost: true }));
        for bad in ["", "2", "4294967295", "-3", "x", "3,", "3,path=", "3,x=y", "3,4"] {
            assert!(bad.parse::<VsockConfig>().is_err(), "{bad}");
        }
    }
}
