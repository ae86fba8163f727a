//! The user of a guest: the host's, as far as that can be.

use std::env;

use rustix::process::getuid;

/// The name where the host's user cannot be one in a guest.
const NAME: &str = "debian";
/// The number where the host's user has one of the system's: the first that Debian gives to people.
const ID: u32 = 1000;

/// A user of a guest.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GuestUser {
    /// The name.
    pub name: String,
    /// The number. What the host's user shares belongs to the guest's if it is the same.
    pub id: u32,
}

impl GuestUser {
    /// The user who runs this program, with another name or number if a guest cannot have theirs.
    pub fn of_host() -> Self {
        let id = getuid().as_raw();
        Self {
            name: env::var("USER").ok().filter(|name| is_user(name)).unwrap_or_else(|| NAME.into()),
            id: if is_persons(id) { id } else { ID },
        }
    }
}

/// Whether a number is for a person's account (Debian Policy Manual, 9.2.2, "UID and GID classes").
fn is_persons(id: u32) -> bool {
    matches!(id, 1000..=59_999 | 65_536..=4_294_967_293)
}

/// Whether a guest can have a user of this name: as Debian's `useradd` takes them, and nobody whom the system has.
fn is_user(name: &str) -> bool {
    const TAKEN: &[&str] = &[
        "root",
        "daemon",
        "bin",
        "sys",
        "sync",
        "games",
        "man",
        "lp",
        "mail",
        "news",
        "uucp",
        "proxy",
        "backup",
        "list",
        "irc",
        "nobody",
        "sudo",
        "adm",
        "users",
        "staff",
        "sshd",
        "tty",
        "disk",
        "kvm",
        "messagebus",
    ];
    let plain = |byte: u8| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"_-".contains(&byte);
    name.len() <= 32
        && name.bytes().all(plain)
        && name.bytes().next().is_some_and(|first| first.is_ascii_lowercase())
        && !TAKEN.contains(&name)
        && !name.starts_with("systemd-")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_user_is_one_that_debian_takes() {
        for good in ["debian", "a", "jane-doe_2"] {
            assert!(is_user(good), "{good}");
        }
        for bad in ["", "root", "Jane", "2x", "a b", "systemd-network", "x'y", &"a".repeat(33)] {
            assert!(!is_user(bad), "{bad}");
        }
    }

    #[test]
    fn numbers_of_the_system_are_no_persons() {
        assert!([1000, 1001, 59_999, 65_536, 1_000_000_000].into_iter().all(is_persons));
        assert!(![0, 33, 999, 60_000, 65_534, 65_535, u32::MAX].into_iter().any(is_persons));
    }
}
