//! What the threads that serve can reach, and what they have of their own.

use std::os::fd::OwnedFd;

use landlock::{
    ABI, Access, AccessFs, CompatLevel, Compatible, PathBeneath, RestrictionStatus, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetError,
};
use rustix::fs::Mode;
use rustix::thread::UnshareFlags;

use crate::abi::ROOT;
use crate::server::Server;

impl Server {
    /// Prepares the calling thread to serve, and never to do anything else: the modes of files that it makes are those that
    /// were asked for, and the kernel lets it open nothing outside the folder, where it has Landlock.
    pub fn confine(&self) {
        // SAFETY: the thread gets a working directory and a umask of its own, nothing that others rely on.
        match unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) } {
            Ok(()) => drop(rustix::process::umask(Mode::empty())),
            Err(error) => tracing::warn!(%error, "new files of a shared folder lose what the umask forbids"),
        }
        let restricted = self.inodes.get(ROOT).map(|root| restrict(&root, self.options.read_only));
        match restricted {
            Ok(Ok(status)) => tracing::debug!(?status.ruleset, "a shared folder is confined"),
            Ok(Err(error)) => tracing::debug!(%error, "no Landlock for a shared folder"),
            Err(error) => tracing::debug!(%error, "no Landlock for a shared folder"),
        }
    }
}

/// Lets the calling thread open nothing but what is below the folder.
fn restrict(root: &OwnedFd, read_only: bool) -> Result<RestrictionStatus, RulesetError> {
    let all = AccessFs::from_all(ABI::V5);
    let allowed = if read_only { AccessFs::from_read(ABI::V5) } else { all };
    Ruleset::default()
        // Without this one (Linux before 5.19), nothing could be moved to another folder.
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::Refer)?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(all)?
        .create()?
        .add_rule(PathBeneath::new(root, allowed))?
        .restrict_self()
}
