//! `ruse disk info`.

use std::fmt::Write as _;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::Context;
use ruse_block::{Image, ImageInfo, OpenOptions, Snapshot};
use ruse_vmm::config::format_size;
use serde::Serialize;

use super::{InfoArgs, failed};
use crate::failure::Failure;

/// An image, and where it is.
#[derive(Serialize)]
struct Described {
    path: PathBuf,
    #[serde(flatten)]
    info: ImageInfo,
}

/// Tells of an image, and of all behind it.
pub fn info(args: &InfoArgs) -> Result<u8, Failure> {
    let all = describe(args)?;
    let text = match args.json {
        true if args.chain => serde_json::to_string_pretty(&all).context("cannot write as JSON")?,
        true => serde_json::to_string_pretty(&all[0]).context("cannot write as JSON")?,
        false => all.iter().map(lines).collect::<Vec<_>>().join("\n"),
    };
    // A reader who has gone has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(0)
}

fn describe(args: &InfoArgs) -> Result<Vec<Described>, Failure> {
    let options =
        OpenOptions { format: args.format, read_only: true, alone: !args.chain, ..OpenOptions::default() };
    let first = ruse_block::open(&args.path, &options)?;
    let mut all = vec![one(&args.path, &*first)?];
    let mut image = first;
    while let Some(behind) = image.backing().filter(|_| args.chain).cloned() {
        let last = &all[all.len() - 1];
        let named = last.info.backing.as_ref().map(|backing| backing.path.clone()).unwrap_or_default();
        let path = ruse_block::resolve(&last.path, &named);
        all.push(one(&path, &*behind)?);
        image = behind;
    }
    Ok(all)
}

fn one(path: &Path, image: &dyn Image) -> Result<Described, Failure> {
    Ok(Described { path: path.to_owned(), info: image.info().map_err(failed(path))? })
}

fn lines(image: &Described) -> String {
    let info = &image.info;
    let mut text = String::new();
    let mut line = |name: &str, value: String| {
        let _ = writeln!(text, "{name:13} {value}");
    };
    line("file", image.path.display().to_string());
    let variant = info.variant.as_ref().map(|variant| format!(", {variant}")).unwrap_or_default();
    line("format", format!("{}{variant}", info.format));
    line("disk", format!("{} ({} bytes)", format_size(info.virtual_size), info.virtual_size));
    line("storage", format_size(info.allocated));
    if let Some(size) = info.cluster_size {
        line("cluster", format_size(size));
    }
    if let Some(compression) = &info.compression {
        line("compression", compression.clone());
    }
    if let Some(backing) = &info.backing {
        let format = backing.format.map_or("format not named".to_owned(), |format| format.to_string());
        line("backing file", format!("{} ({format})", backing.path.display()));
    }
    if info.dirty {
        line("state", "was not closed".to_owned());
    }
    if info.corrupt {
        line("state", "damaged".to_owned());
    }
    for Snapshot { id, name, disk_size, state_size, .. } in &info.snapshots {
        let sizes = format!("disk {}, state {}", format_size(*disk_size), format_size(*state_size));
        line("snapshot", format!("{id} {name}: {sizes}"));
    }
    text
}
