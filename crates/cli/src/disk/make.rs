//! New images, and new sizes.

use ruse_block::{Backing, CreateOptions, Format, ResizeError, copy};
use ruse_vmm::config::{format_size, parse_size};

use super::progress::Bar;
use super::{ConvertArgs, CreateArgs, LayoutArgs, ResizeArgs, failed, format_of_name, open};
use crate::failure::Failure;

impl LayoutArgs {
    fn options(self, format: Format, size: u64) -> CreateOptions {
        CreateOptions {
            cluster_size: self.cluster_size,
            compression: self.compression.into(),
            ..CreateOptions::new(format, size)
        }
    }
}

/// `ruse disk create`.
pub fn create(args: &CreateArgs) -> Result<u8, Failure> {
    let default = if args.backing.is_some() { Format::Qcow2 } else { format_of_name(&args.path) };
    let format = args.format.unwrap_or(default);
    let (backing, behind) = match &args.backing {
        None => (None, None),
        Some(named) => {
            let path = ruse_block::resolve(&args.path, named);
            let behind = open(&path, args.backing_format, true)?;
            // Next time, its content may say something else.
            let format = behind.info().map_err(failed(&path))?.format;
            (Some(Backing { path: named.clone(), format: Some(format) }), Some(behind.size()))
        }
    };
    let size = args.size.or(behind).ok_or_else(|| Failure::input("the size of the disk is missing"))?;
    let options = CreateOptions { backing, replace: args.force, ..args.layout.options(format, size) };
    ruse_block::create(&args.path, &options)?;
    Ok(0)
}

/// `ruse disk convert`.
pub fn convert(args: &ConvertArgs) -> Result<u8, Failure> {
    let format = args.output_format.unwrap_or_else(|| format_of_name(&args.to));
    if args.compress && format != Format::Qcow2 {
        return Err(Failure::input(format!("{format} images are not compressed; -O qcow2 is")));
    }
    let from = open(&args.from, args.format, true)?;
    let options = CreateOptions { replace: args.force, ..args.layout.options(format, from.size()) };
    let to = ruse_block::create(&args.to, &options)?;
    let bar = Bar::new("converting", from.size());
    let copied = copy(&*from, &*to, args.compress, &mut |done| bar.set(done));
    copied.map_err(|error| {
        let _ = std::fs::remove_file(&args.to);
        failed(&args.to)(error)
    })?;
    Ok(0)
}

/// `ruse disk resize`.
pub fn resize(args: &ResizeArgs) -> Result<u8, Failure> {
    let image = open(&args.path, args.format, false)?;
    let (more, text) = match args.size.strip_prefix('+') {
        Some(text) => (image.size(), text),
        None => (0, args.size.as_str()),
    };
    let size = parse_size(text).map_err(|error| Failure::input(format!("'{}': {error}", args.size)))?;
    let size = size.checked_add(more).ok_or_else(|| Failure::input("the size is too large"))?;
    if size < image.size() && !args.shrink {
        let now = format_size(image.size());
        return Err(Failure::input(format!("the disk has {now}; --shrink cuts off what does not fit")));
    }
    match image.resize(size) {
        Ok(()) => Ok(0),
        Err(ResizeError::Host(error)) => Err(failed(&args.path)(error)),
        Err(error) => Err(Failure::input(error)),
    }
}
