//! `ruse image`: guest images are built, listed, looked at and removed.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use clap::{Args, Subcommand};
use ruse_image::{DebianPlan, Image, ImageError, Images, Machines, Manifest};
use ruse_manager::Registry;
use ruse_vmm::config::{format_size, parse_size};
use serde::Serialize;

use crate::failure::{Failure, complain};
use crate::output::{age, print, print_json, table};
use crate::progress::Bar;

/// The system that images are built of.
const SYSTEM: &str = "debian";

/// What to do with images.
#[derive(Debug, Subcommand)]
pub enum ImageCommand {
    /// Builds an image from a system's packages.
    Build(BuildOptions),
    /// Lists the images.
    List(ListOptions),
    /// Tells what an image is.
    Inspect(InspectOptions),
    /// Removes an image.
    Remove(RemoveOptions),
}

/// Options of `ruse image build`.
#[derive(Debug, Args)]
pub struct BuildOptions {
    /// The system: debian.
    #[arg(value_parser = [SYSTEM])]
    pub system: String,
    /// Its release, by the code name.
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    pub release: String,
    /// Packages to install in addition.
    #[arg(long, value_name = "A,B", value_delimiter = ',')]
    pub packages: Vec<String>,
    /// Size of the disk. It takes no more of the host than what is on it.
    #[arg(long, value_name = "SIZE", default_value = "8G", value_parser = parse_size)]
    pub size: u64,
    /// Name of the image [default: the system's].
    #[arg(long)]
    pub name: Option<String>,
}

/// Options of `ruse image list`.
#[derive(Debug, Args)]
pub struct ListOptions {
    /// List as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `ruse image inspect`.
#[derive(Debug, Args)]
pub struct InspectOptions {
    /// Name of the image.
    pub name: String,
    /// All of it, as JSON.
    #[arg(long)]
    pub json: bool,
}

/// Options of `ruse image remove`.
#[derive(Debug, Args)]
pub struct RemoveOptions {
    /// Names of images.
    #[arg(required = true)]
    pub names: Vec<String>,
    /// Remove the disks of machines that have run them, too.
    #[arg(long)]
    pub force: bool,
}

/// An image as JSON tells of it.
#[derive(Serialize)]
struct Row {
    name: String,
    /// Bytes on the host.
    used: u64,
    #[serde(flatten)]
    manifest: Manifest,
}

impl Row {
    fn new(image: Image) -> Result<Self, Failure> {
        let used =
            image.used().map_err(|error| Failure::other(format!("{}: {error}", image.dir.display())))?;
        Ok(Self { name: image.name, used, manifest: image.manifest })
    }

    /// Since it was built.
    fn age(&self) -> Duration {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        now.saturating_sub(Duration::from_secs(self.manifest.created))
    }
}

/// Does what is asked.
pub fn image(command: &ImageCommand) -> Result<u8, Failure> {
    match command {
        ImageCommand::Build(options) => build(options),
        ImageCommand::List(options) => list(options),
        ImageCommand::Inspect(options) => inspect(options),
        ImageCommand::Remove(options) => {
            options.names.iter().try_for_each(|name| remove(name, options.force))?;
            Ok(0)
        }
    }
}

fn build(options: &BuildOptions) -> Result<u8, Failure> {
    let name = options.name.as_ref().unwrap_or(&options.system);
    let plan = DebianPlan {
        release: options.release.clone(),
        packages: options.packages.clone(),
        size: options.size,
        ..DebianPlan::new(name)
    };
    let image = plan.build(&Images::open()?, &mut Bar::default())?;
    print(&format!(
        "image '{name}' is built; ruse run {name} starts a machine with it, whose user is {}\n",
        image.manifest.user
    ))
}

fn remove(name: &str, force: bool) -> Result<(), Failure> {
    let (images, machines) = (Images::open()?, Machines::open()?);
    let users = machines.of_image(name)?;
    if !force && !users.is_empty() {
        return Err(ImageError::InUse { name: name.to_owned(), machines: users }.into());
    }
    let registry = Registry::open()?;
    if let Some(machine) = users.iter().find(|machine| registry.find(machine).is_ok()) {
        return Err(Failure::input(format!("machine '{machine}' runs image '{name}': ruse stop {machine}")));
    }
    users.iter().try_for_each(|machine| machines.remove(machine))?;
    Ok(images.remove(name)?)
}

fn list(options: &ListOptions) -> Result<u8, Failure> {
    let mut rows = Vec::new();
    for image in Images::open()?.list()? {
        match image {
            Ok(image) => rows.push(Row::new(image)?),
            Err(error) => complain(&error.to_string()),
        }
    }
    if options.json {
        return print_json(&rows);
    }
    let head = ["NAME", "SYSTEM", "SIZE", "USED", "AGE"].map(str::to_owned);
    let cells = rows.iter().map(|row| {
        let Manifest { system, release, size, .. } = &row.manifest;
        let used = row.used.next_multiple_of(1 << 20);
        [
            row.name.clone(),
            format!("{system} {release}"),
            format_size(*size),
            format_size(used),
            age(row.age()),
        ]
    });
    print(&table(&head, &cells.collect::<Vec<_>>()))
}

fn inspect(options: &InspectOptions) -> Result<u8, Failure> {
    let row = Row::new(Images::open()?.find(&options.name)?)?;
    if options.json {
        return print_json(&row);
    }
    let manifest = &row.manifest;
    let lines = [
        ("name", row.name.clone()),
        ("system", format!("{} {}", manifest.system, manifest.release)),
        ("built", format!("{} ago", age(row.age()))),
        ("disk", format_size(manifest.size)),
        ("used", format_size(row.used.next_multiple_of(1 << 20))),
        ("user", manifest.user.clone()),
        ("host key", manifest.host_key.clone()),
        ("kernel", manifest.kernel.clone()),
        ("packages", manifest.packages.join(", ")),
    ];
    print(&lines.iter().map(|(name, value)| format!("{name:9} {value}\n")).collect::<String>())
}

/// The image of this name; `None` for one that is built when it is wanted.
pub fn find(name: &str) -> Result<Option<Image>, Failure> {
    match Images::open()?.find(name) {
        Err(ImageError::NoImage { .. }) if name == SYSTEM => Ok(None),
        found => Ok(Some(found?)),
    }
}

/// The image of this name, built if it can be.
pub fn find_or_build(name: &str) -> Result<Image, Failure> {
    if let Some(image) = find(name)? {
        return Ok(image);
    }
    complain(&format!("there is no image '{name}' yet: it is built now, once"));
    Ok(DebianPlan::new(name).build(&Images::open()?, &mut Bar::default())?)
}
