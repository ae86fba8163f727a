//! Network namespaces.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};

use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

/// Where `ip netns` keeps them.
const NAMED: &str = "/run/netns";

/// Does something in a namespace, by its path or its name; without one, in that of the process.
pub(crate) fn within<R: Send>(
    namespace: Option<&Path>,
    call: impl FnOnce() -> io::Result<R> + Send,
) -> io::Result<R> {
    let Some(namespace) = namespace else { return call() };
    let path =
        if namespace.is_absolute() { namespace.to_owned() } else { PathBuf::from(NAMED).join(namespace) };
    let file = File::open(path)?;
    // Only a thread that ends with it may be elsewhere.
    std::thread::scope(|scope| {
        let done = scope.spawn(|| {
            move_into_link_name_space(file.as_fd(), Some(LinkNameSpaceType::Network))?;
            call()
        });
        done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
