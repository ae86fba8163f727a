//! Where the user's machines have what lives no longer than they do.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rustix::process::getuid;

/// The user's directory for machines: in `$XDG_RUNTIME_DIR` or `/run/user/UID`, for root in `/run`, else a directory of the
/// user's own under `$TMPDIR`. It may not be there yet.
pub fn runtime_dir() -> PathBuf {
    choose_dir(env::var_os("XDG_RUNTIME_DIR"), getuid().as_raw(), &env::temp_dir(), Path::is_dir)
}

fn choose_dir(runtime: Option<OsString>, uid: u32, temp: &Path, is_dir: impl Fn(&Path) -> bool) -> PathBuf {
    let given = runtime.map(PathBuf::from).filter(|path| path.is_absolute() && is_dir(path));
    let usual = if uid == 0 { PathBuf::from("/run") } else { format!("/run/user/{uid}").into() };
    given
        .or_else(|| Some(usual).filter(|path| is_dir(path)))
        .map_or_else(|| temp.join(format!("ruse-{uid}")), |base| base.join("ruse"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_directory_follows_the_environment() {
        let os = |text: &str| Some(OsString::from(text));
        let temp = Path::new("/t");
        assert_eq!(choose_dir(os("/r"), 7, temp, |_| true), Path::new("/r/ruse"));
        assert_eq!(choose_dir(os("r"), 7, temp, |_| true), Path::new("/run/user/7/ruse"));
        assert_eq!(choose_dir(None, 0, temp, |_| true), Path::new("/run/ruse"));
        assert_eq!(choose_dir(os("/r"), 7, temp, |_| false), Path::new("/t/ruse-7"));
    }
}
