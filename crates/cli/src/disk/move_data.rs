//! `ruse disk commit` and `ruse disk rebase`: data between an image and what is behind it.

use ruse_block::{Backing, Format, Image, OpenOptions, keep_content};

use super::progress::Bar;
use super::{CommitArgs, RebaseArgs, failed, open};
use crate::failure::Failure;

/// `ruse disk commit`.
pub fn commit(args: &CommitArgs) -> Result<u8, Failure> {
    let path = &args.path;
    let image = ruse_block::open(path, &OpenOptions { alone: true, ..OpenOptions::default() })?;
    let info = image.info().map_err(failed(path))?;
    let Some(backing) = info.backing else {
        return Err(Failure::input(format!("'{}' has no backing file", path.display())));
    };
    let behind_path = ruse_block::resolve(path, &backing.path);
    if backing.format.is_none() {
        // What looks like another format may be what a guest has written to a raw disk, with names of files in it.
        let format = open(&behind_path, None, true)?.info().map_err(failed(&behind_path))?.format;
        if format != Format::Raw {
            let (path, behind) = (path.display(), behind_path.display());
            return Err(Failure::input(format!(
                "'{path}' does not say that '{behind}' is of format {format}: ruse disk rebase says so"
            )));
        }
    }
    let behind = open(&behind_path, backing.format, false)?;
    if behind.size() < image.size() {
        behind.resize(image.size()).map_err(Failure::input)?;
    }
    let bar = Bar::new("committing", image.size());
    ruse_block::commit(&*image, &*behind, &mut |done| bar.set(done)).map_err(failed(path))?;
    Ok(0)
}

/// `ruse disk rebase`.
pub fn rebase(args: &RebaseArgs) -> Result<u8, Failure> {
    let path = &args.path;
    let image = ruse_block::open(path, &OpenOptions { alone: args.unchecked, ..OpenOptions::default() })?;
    let mut backing = args.backing.clone().map(|path| Backing { path, format: args.backing_format });
    if !args.unchecked {
        let new = match &mut backing {
            None => None,
            Some(named) => {
                let new_path = ruse_block::resolve(path, &named.path);
                let new = open(&new_path, named.format, true)?;
                named.format = Some(new.info().map_err(failed(&new_path))?.format);
                Some(new)
            }
        };
        let bar = Bar::new("comparing", image.size());
        let new = new.as_ref().map(|new| &**new as &dyn Image);
        keep_content(&*image, new, &mut |done| bar.set(done)).map_err(failed(path))?;
    }
    image.set_backing(backing.as_ref()).map_err(failed(path))?;
    Ok(0)
}
