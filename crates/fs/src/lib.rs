//! A folder of the host's for a guest: a server of the FUSE protocol, as a virtio file system carries it.
//!
//! A guest reaches what is below the folder, and nothing else. The server opens names one at a time, from a folder that
//! it holds open, and follows no symbolic link: those are the guest's to follow, in its own tree. The threads that serve are
//! confined to the folder by the kernel as well, where it has Landlock ([`Server::confine`]).
//!
//! What the guest's client has to check are permissions: it knows its users, and asks for everything in one name. The host's
//! kernel knows that of Ruse, so that a guest can do in the folder what whoever runs Ruse can. If that is root, what a guest
//! makes belongs to whom it makes it for; else to the user who runs Ruse. Device nodes are not made.
//!
//! Locks, extended attributes and access control lists are not passed on: the guest keeps locks to itself.

pub mod abi;
mod confine;
mod files;
mod folders;
mod handles;
mod inodes;
mod names;
mod server;
#[cfg(test)]
mod tests;

use std::io;
use std::path::PathBuf;

pub use server::{Reply, Request, Server};

/// What of a folder a guest remembers, and for how long.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Cache {
    /// Nothing: it sees each change at once.
    Never,
    /// Names and attributes for a second; data as long as they are the same.
    #[default]
    Auto,
    /// Everything, also what is to be written: nobody else changes the folder.
    Always,
}

/// How a folder is served.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Nothing in it can be changed.
    pub read_only: bool,
    /// What the guest remembers.
    pub cache: Cache,
}

/// Why a folder cannot be served.
#[derive(Debug, thiserror::Error)]
pub enum ShareError {
    /// The host refuses the folder.
    #[error("cannot open '{}': {source}", .path.display())]
    Open {
        /// The folder.
        path: PathBuf,
        /// The host's answer.
        source: io::Error,
    },
    /// Files are reopened through `/proc`.
    #[error("cannot open '/proc/self/fd', by which a shared folder's files are opened: {0}")]
    Proc(io::Error),
}
