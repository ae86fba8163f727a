//! A shared folder in words: `HOST:TAG[,ro][,cache=never|auto|always]` or `vhost-user=SOCKET:TAG`.

use std::path::PathBuf;
use std::str::FromStr;

use ruse_virtio::fs::{Cache, Options, TAG_LEN};
use serde::{Deserialize, Serialize};

/// A folder of the host's that the guest can mount.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct ShareConfig {
    /// The folder, or the socket of whoever serves it.
    pub path: PathBuf,
    /// Another process serves it, by the protocol of vhost-user.
    pub vhost_user: bool,
    /// The name by which the guest mounts it.
    pub tag: String,
    /// The guest cannot change anything in it.
    pub read_only: bool,
    /// What the guest remembers of it.
    pub cache: Cache,
}

impl ShareConfig {
    /// How the folder is to be served.
    pub fn options(&self) -> Options {
        Options { read_only: self.read_only, cache: self.cache }
    }
}

impl FromStr for ShareConfig {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split(',');
        let names = words.next().and_then(|names| names.rsplit_once(':'));
        let (path, tag) = names.ok_or("expected HOST-FOLDER:TAG")?;
        let socket = path.strip_prefix("vhost-user=");
        let path = socket.unwrap_or(path);
        if path.is_empty() {
            return Err("expected HOST-FOLDER:TAG".into());
        }
        if !(1..=TAG_LEN).contains(&tag.len()) || !tag.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(format!("'{tag}': expected a tag of 1 to {TAG_LEN} printable characters"));
        }
        let mut share = Self {
            path: path.into(),
            vhost_user: socket.is_some(),
            tag: tag.to_owned(),
            read_only: false,
            cache: Cache::default(),
        };
        for word in words {
            if share.vhost_user {
                return Err(format!("'{word}': whoever serves a folder of vhost-user decides that"));
            }
            match word {
                "ro" => share.read_only = true,
                "cache=never" => share.cache = Cache::Never,
                "cache=auto" => share.cache = Cache::Auto,
                "cache=always" => share.cache = Cache::Always,
                _ => return Err(format!("'{word}': expected ro or cache=never|auto|always")),
            }
        }
        Ok(share)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_understood() {
        let plain: ShareConfig = "/some/where:work".parse().unwrap();
        assert_eq!((plain.path.to_str(), &*plain.tag), (Some("/some/where"), "work"));
        assert_eq!(plain.options(), Options::default());
        let other: ShareConfig = "a:b:c,ro,cache=always".parse().unwrap();
        assert_eq!((other.path.to_str(), &*other.tag), (Some("a:b"), "c"));
        assert_eq!(other.options(), Options { read_only: true, cache: Cache::Always });
        let served: ShareConfig = "vhost-user=/run/s:t".parse().unwrap();
        assert_eq!((served.path.to_str(), &*served.tag, served.vhost_user), (Some("/run/s"), "t", true));
        let long = format!("/x:{}", "t".repeat(TAG_LEN + 1));
        for bad in [
            "",
            "/x",
            ":t",
            "/x:",
            "/x:a b",
            "/x:t,rw",
            "/x:t,cache=",
            "vhost-user=:t",
            "vhost-user=/s:t,ro",
            &long,
        ] {
            assert!(bad.parse::<ShareConfig>().is_err(), "{bad}");
        }
    }
}
