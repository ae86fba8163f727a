//! The default guest: what `ruse run` boots when it is given no kernel.
//!
//! Debian's cloud kernel and its static busybox are fetched once as Debian packages, through the apt
//! configuration that the machine already has and without root; their checksums are verified, they
//! are unpacked here, and an initramfs is written around them. Everything is kept under the user's
//! cache directory, and a later run only looks at it.
//!
//! ```no_run
//! use ruse_guest::{DefaultGuest, Silent};
//! let files = DefaultGuest::new()?.prepare(&mut Silent)?;
//! println!("{} {}", files.kernel.display(), files.initrd.display());
//! # Ok::<(), ruse_guest::GuestError>(())
//! ```

mod apt;
mod cache;
pub mod cpio;
pub mod deb;
mod default;
mod error;
mod fetch;
mod initramfs;
mod kernel;
mod modules;
mod progress;
mod script;
mod system;

pub use apt::{AptCommands, PackageFile};
pub use cache::default_dir as cache_dir;
pub use default::{DefaultGuest, GuestFiles};
pub use error::GuestError;
pub use initramfs::{DeviceModules, Initramfs, Module};
pub use progress::{Progress, Silent};
pub use script::{EXIT_MARK, run_argument};
pub use system::{SystemPackages, SystemPlan};

/// The kernel command line that the default guest is booted with where the user gives none.
pub const DEFAULT_CMDLINE: &str = "console=ttyS0 panic=-1";
/// The same where the user has the guest's virtio console.
pub const VIRTIO_CMDLINE: &str = "console=ttyS0 console=hvc0 panic=-1";
