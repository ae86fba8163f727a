//! Guest images of a user: disks with a system on them, each with the kernel that boots it.
//!
//! [`Images`] is where they are kept. [`DebianPlan`] makes one from Debian's packages, without root and without any
//! tool but apt and `ssh-keygen`: the packages are unpacked and configured in a machine of Ruse's own.

mod build;
mod builder;
mod error;
mod key;
mod machine;
mod parts;
mod store;
mod user;

pub use build::DebianPlan;
pub use error::ImageError;
pub use key::SshKey;
pub use machine::{MachineRecord, Machines};
pub use store::{Image, Images, Manifest};
pub use user::GuestUser;

/// The file system label of a system's root.
const ROOT_LABEL: &str = "ruse-root";
