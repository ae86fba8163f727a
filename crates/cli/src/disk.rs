//! `ruse disk`: images as files.

mod check;
mod info;
mod make;
mod move_data;
mod progress;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use ruse_block::{Compression, DiskError, Format, Image, OpenOptions};
use ruse_vmm::config::parse_size;

use crate::failure::Failure;

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum DiskCommand {
    /// Makes an empty image.
    Create(CreateArgs),
    /// Copies a disk into a new image, of another format perhaps.
    Convert(ConvertArgs),
    /// Changes the size of a disk.
    Resize(ResizeArgs),
    /// Looks for damage within an image.
    Check(CheckArgs),
    /// Tells what an image is.
    Info(InfoArgs),
    /// Writes what is in an image to its backing file.
    Commit(CommitArgs),
    /// Puts another backing file behind an image.
    Rebase(RebaseArgs),
}

/// Options of `ruse disk create`.
#[derive(Debug, Args)]
pub struct CreateArgs {
    /// Its format [default: what the name ends with, or raw; qcow2 with a backing file].
    #[arg(short, long)]
    pub format: Option<Format>,
    /// What is behind it: an image of which only changes are written to the new one.
    #[arg(short, long, value_name = "PATH")]
    pub backing: Option<PathBuf>,
    /// The format of that [default: by content].
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<Format>,
    #[command(flatten)]
    pub layout: LayoutArgs,
    /// Replace a file that is there.
    #[arg(long)]
    pub force: bool,
    /// The file.
    pub path: PathBuf,
    /// The size of the disk, with a unit K, M, G or T; without one in MiB [default: the backing file's].
    #[arg(value_parser = parse_size)]
    pub size: Option<u64>,
}

/// How a qcow2 image is made.
#[derive(Clone, Copy, Debug, Args)]
pub struct LayoutArgs {
    /// Bytes of a cluster of a qcow2 image, 512b to 2M.
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    pub cluster_size: Option<u64>,
    /// How clusters of a qcow2 image are compressed.
    #[arg(long, value_name = "NAME", default_value = "zlib")]
    pub compression: CompressionName,
}

/// How clusters are compressed.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum CompressionName {
    /// Deflate.
    Zlib,
    /// Zstandard, which QEMU reads from version 5.1 on.
    Zstd,
}

impl From<CompressionName> for Compression {
    fn from(name: CompressionName) -> Self {
        match name {
            CompressionName::Zlib => Self::Zlib,
            CompressionName::Zstd => Self::Zstd,
        }
    }
}

/// Options of `ruse disk convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Format of the source [default: by content].
    #[arg(short, long)]
    pub format: Option<Format>,
    /// Format of the new image [default: what its name ends with, or raw].
    #[arg(short = 'O', long, value_name = "FORMAT")]
    pub output_format: Option<Format>,
    /// Compress it (qcow2).
    #[arg(short, long)]
    pub compress: bool,
    #[command(flatten)]
    pub layout: LayoutArgs,
    /// Replace a file that is there.
    #[arg(long)]
    pub force: bool,
    /// The source.
    pub from: PathBuf,
    /// The new image.
    pub to: PathBuf,
}

/// Options of `ruse disk resize`.
#[derive(Debug, Args)]
pub struct ResizeArgs {
    /// Its format [default: by content].
    #[arg(short, long)]
    pub format: Option<Format>,
    /// Cut off what does not fit any more.
    #[arg(long)]
    pub shrink: bool,
    /// The file.
    pub path: PathBuf,
    /// The new size of the disk, with a unit; +SIZE for so much more.
    pub size: String,
}

/// Options of `ruse disk check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    /// Its format [default: by content].
    #[arg(short, long)]
    pub format: Option<Format>,
    /// Mend what is wrong: storage that nobody uses, or all.
    #[arg(long, value_name = "WHAT")]
    pub repair: Option<RepairName>,
    /// Report as JSON.
    #[arg(long)]
    pub json: bool,
    /// The file.
    pub path: PathBuf,
}

/// What a check mends.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub enum RepairName {
    /// Storage that nobody uses.
    Leaks,
    /// Wrong numbers as well.
    All,
}

/// Options of `ruse disk info`.
#[derive(Debug, Args)]
pub struct InfoArgs {
    /// Its format [default: by content].
    #[arg(short, long)]
    pub format: Option<Format>,
    /// Tell of all backing files as well.
    #[arg(long)]
    pub chain: bool,
    /// As JSON.
    #[arg(long)]
    pub json: bool,
    /// The file.
    pub path: PathBuf,
}

/// Options of `ruse disk commit`.
#[derive(Debug, Args)]
pub struct CommitArgs {
    /// The image.
    pub path: PathBuf,
}

/// Options of `ruse disk rebase`.
#[derive(Debug, Args)]
pub struct RebaseArgs {
    /// Only write the name: the new backing file has the same bytes as the old one.
    #[arg(short, long = "unsafe")]
    pub unchecked: bool,
    /// The new backing file, as the image is to name it; none, and the image has all that it needs.
    #[arg(short, long, value_name = "PATH")]
    pub backing: Option<PathBuf>,
    /// The format of that [default: by content].
    #[arg(short = 'F', long, value_name = "FORMAT", requires = "backing")]
    pub backing_format: Option<Format>,
    /// The image.
    pub path: PathBuf,
}

/// Does it, and gives the exit code.
pub fn disk(command: &DiskCommand) -> Result<u8, Failure> {
    match command {
        DiskCommand::Create(args) => make::create(args),
        DiskCommand::Convert(args) => make::convert(args),
        DiskCommand::Resize(args) => make::resize(args),
        DiskCommand::Check(args) => check::check(args),
        DiskCommand::Info(args) => info::info(args),
        DiskCommand::Commit(args) => move_data::commit(args),
        DiskCommand::Rebase(args) => move_data::rebase(args),
    }
}

impl From<DiskError> for Failure {
    fn from(error: DiskError) -> Self {
        Self::input(error)
    }
}

/// Opens an image to be read or written.
fn open(path: &Path, format: Option<Format>, read_only: bool) -> Result<Arc<dyn Image>, Failure> {
    let options = OpenOptions { format, read_only, ..OpenOptions::default() };
    Ok(ruse_block::open(path, &options)?)
}

/// The message of an error while something is done with a file.
fn failed(path: &Path) -> impl Fn(std::io::Error) -> Failure + '_ {
    move |error| Failure::other(format!("'{}': {error}", path.display()))
}

/// The format that the name of a file asks for.
fn format_of_name(path: &Path) -> Format {
    let ending = path.extension().and_then(|ending| ending.to_str()).unwrap_or_default();
    ending.to_ascii_lowercase().parse().unwrap_or(Format::Raw)
}
