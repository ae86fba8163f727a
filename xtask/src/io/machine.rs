//! The machine with its disks, its network and its folder, as each peer is told of it.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context, Result, bail, ensure};
use ruse_guest::cpio::CpioWriter;
use ruse_guest::{DefaultGuest, GuestFiles, Silent, run_argument};

use super::tap::{self, Tap};
use super::{Group, Options};
use crate::bench::{Guest, Peer};

const DISK_MIB: usize = 256;
const LARGE_FILE_MIB: usize = 128;
const MEMORY_MIB: u32 = 512;
/// QEMU's server of shared folders: another package has it in Debian 12 than later.
const VIRTIOFSD: [&str; 3] = ["/usr/libexec/virtiofsd", "/usr/lib/qemu/virtiofsd", "/usr/bin/virtiofsd"];
const PATIENCE: Duration = Duration::from_secs(10);

/// What all runs have in common.
pub struct Machine<'a> {
    options: &'a Options,
    ruse: PathBuf,
    system: System,
    directory: PathBuf,
}

/// What the guest boots.
pub struct System {
    pub kernel: PathBuf,
    pub initrd: PathBuf,
}

impl System {
    /// The default guest with the program.
    pub fn prepare(directory: &Path) -> Result<System> {
        let guest = DefaultGuest::new()?.prepare(&mut Silent)?;
        Ok(System { initrd: initrd(&guest, directory)?, kernel: guest.kernel })
    }
}

/// Where this benchmark's files are, beside what is built.
pub fn directory() -> Result<PathBuf> {
    let this = env::current_exe()?;
    let directory = this.ancestors().nth(2).context("this program has no directory")?.join("io");
    fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    Ok(directory)
}

/// How the guest and the host speak with each other.
pub struct Net<'a> {
    /// The port of the host's server on 127.0.0.1.
    pub server: u16,
    /// The host's port that leads to the guest's server.
    pub published: u16,
    /// A network of the host's.
    pub tap: Option<&'a Tap>,
}

/// A process that ends with the run.
pub struct Helper(Child);

impl Drop for Helper {
    fn drop(&mut self) {
        // It may have ended with the machine.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

impl<'a> Machine<'a> {
    /// Finds what the guest boots, and makes a directory for images.
    pub fn prepare(options: &'a Options, ruse: PathBuf) -> Result<Machine<'a>> {
        let directory = match &options.directory {
            Some(directory) => directory.join("ruse-io"),
            None => directory()?,
        };
        fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
        let system = match (&options.kernel, &options.initrd) {
            (Some(kernel), Some(initrd)) => System { kernel: kernel.clone(), initrd: initrd.clone() },
            _ => System::prepare(&directory)?,
        };
        Ok(Machine { options, ruse, system, directory })
    }

    fn has(&self, group: Group) -> bool {
        self.options.groups.contains(&group)
    }

    /// The disks, in the order of their names.
    fn disks(&self) -> impl Iterator<Item = Group> {
        [Group::Raw, Group::Qcow2].into_iter().filter(|group| self.has(*group))
    }

    fn image(&self, group: Group) -> PathBuf {
        self.directory.join(format!("disk.{}", group.name()))
    }

    fn folder(&self) -> PathBuf {
        self.directory.join("share")
    }

    /// Makes images and folder anew.
    pub fn renew(&self) -> Result<()> {
        let raw = self.image(Group::Raw);
        if self.disks().next().is_some() {
            fill(&raw, DISK_MIB)?;
        }
        if self.has(Group::Qcow2) {
            let qcow2 = self.image(Group::Qcow2);
            if qcow2.exists() {
                fs::remove_file(&qcow2)?;
            }
            let mut convert = Command::new(&self.ruse);
            convert.args(["disk", "convert", "-O", "qcow2"]).arg(&raw).arg(&qcow2);
            // In the lab its progress would be shown.
            let output = convert.output().context("running ruse")?;
            let said = String::from_utf8_lossy(&output.stderr);
            ensure!(output.status.success(), "the qcow2 image cannot be made: {said}");
        }
        if self.has(Group::Share) {
            let folder = self.folder();
            if folder.exists() {
                fs::remove_dir_all(&folder)?;
            }
            fs::create_dir(&folder)?;
            fill(&folder.join("large"), LARGE_FILE_MIB.div_ceil(self.options.scale as usize))?;
        }
        rustix::fs::sync();
        Ok(())
    }

    /// How `peer` runs the cases, with what has to run beside it.
    pub fn command(&self, peer: Peer, net: &Net) -> Result<(Command, Option<Helper>)> {
        let line = format!("console=ttyS0 panic=-1 quiet {}", run_argument(&self.script(net)));
        let (kernel, initrd) = (&*self.system.kernel, &*self.system.initrd);
        let guest = Guest {
            kernel,
            initrd,
            line,
            mebibytes: MEMORY_MIB,
            cpus: self.options.cpus,
            accel: self.options.accel,
        };
        match peer {
            Peer::Native => bail!("there is no guest without a peer"),
            Peer::Qemu => self.qemu(&guest, net),
            Peer::Ruse => Ok((self.ruse(&guest, net), None)),
        }
    }

    /// Disks come first, and in this order, so that their names are known.
    fn script(&self, net: &Net) -> String {
        let mut script = String::new();
        if self.has(Group::Net) {
            script += "until ip addr show eth0 | grep -q 'inet '; do usleep 50000; done\n";
        }
        if self.has(Group::Share) {
            script += "mkdir /share && mount -t virtiofs share /share || exit 1\n";
        }
        if net.tap.is_some() {
            let name = if self.has(Group::Net) { "eth1" } else { "eth0" };
            script += &format!("ip addr add {}/24 dev {name}; ip link set {name} up\n", tap::GUEST);
        }
        script += &format!("exec io scale {}", self.options.scale);
        for (group, device) in self.disks().zip(["vda", "vdb"]) {
            script += &format!(" disk {} /dev/{device}", group.name());
        }
        if self.has(Group::Net) {
            script += &format!(" net net 10.0.2.2:{} port net", net.server);
        }
        if let Some(tap) = net.tap {
            script += &format!(" net tap {}:{}", tap::HOST, tap.port());
        }
        if self.has(Group::Share) {
            script += " share share";
        }
        script
    }

    fn ruse(&self, guest: &Guest, net: &Net) -> Command {
        let mut command = guest.under_ruse(&self.ruse, &self.options.ruse_args);
        for group in self.disks() {
            command.arg("--disk").arg(format!("{},format={}", self.image(group).display(), group.name()));
        }
        if self.has(Group::Net) {
            command.args(["--net", "user,loopback", "--publish", &format!("127.0.0.1:{}:7", net.published)]);
        }
        if net.tap.is_some() {
            command.args(["--net", &format!("tap={}", tap::NAME)]);
        } else if !self.has(Group::Net) {
            command.args(["--net", "none"]);
        }
        if self.has(Group::Share) {
            command.arg("--share").arg(format!("{}:share", self.folder().display()));
        }
        command
    }

    fn qemu(&self, guest: &Guest, net: &Net) -> Result<(Command, Option<Helper>)> {
        let mut command = guest.under_qemu("q35,memory-backend=ram");
        command.args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on")]);
        for group in self.disks() {
            let (name, file) = (group.name(), self.image(group));
            command.arg("-drive").arg(format!("if=none,id={name},format={name},file={}", file.display()));
            command.args(["-device", &format!("virtio-blk-pci,drive={name}")]);
        }
        if self.has(Group::Net) {
            command.args(["-netdev", &format!("user,id=net,hostfwd=tcp:127.0.0.1:{}-:7", net.published)]);
            command.args(["-device", "virtio-net-pci,netdev=net,romfile="]);
        }
        if net.tap.is_some() {
            command.args(["-netdev", &format!("tap,id=tap,ifname={},script=no,downscript=no", tap::NAME)]);
            command.args(["-device", "virtio-net-pci,netdev=tap,romfile="]);
        }
        let mut helper = None;
        if self.has(Group::Share) {
            let socket = self.directory.join("share.socket");
            helper = Some(self.virtiofsd(&socket)?);
            command.arg("-chardev").arg(format!("socket,id=share,path={}", socket.display()));
            command.args(["-device", "vhost-user-fs-pci,chardev=share,tag=share"]);
        }
        Ok((command, helper))
    }

    fn virtiofsd(&self, socket: &Path) -> Result<Helper> {
        let known = VIRTIOFSD.iter().find(|path| Path::new(path).exists());
        let program =
            known.context("there is no virtiofsd (Debian has it in qemu-system-common or virtiofsd)")?;
        if socket.exists() {
            fs::remove_file(socket)?;
        }
        let mut command = Command::new(program);
        command.arg(format!("--socket-path={}", socket.display())).arg("-o");
        command.arg(format!("source={},cache=auto", self.folder().display())).stderr(Stdio::null());
        let helper = Helper(command.spawn().with_context(|| format!("starting {program}"))?);
        let limit = Instant::now() + PATIENCE;
        while !socket.exists() {
            ensure!(Instant::now() < limit, "{program} does not listen (it has to be run as root)");
            thread::sleep(Duration::from_millis(20));
        }
        Ok(helper)
    }
}

/// The default guest's initramfs with the program.
fn initrd(guest: &GuestFiles, directory: &Path) -> Result<PathBuf> {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../bench/io/io.c");
    let program = directory.join("io");
    let mut compiler = Command::new("cc");
    compiler.args(["-O2", "-static", "-o"]).arg(&program).arg(&source);
    let status = compiler.status().context("running cc")?;
    ensure!(status.success(), "{} does not compile (it needs gcc and libc6-dev)", source.display());
    let mut archive = CpioWriter::new(fs::read(&guest.initrd)?);
    archive.file("bin/io", 0o755, &fs::read(&program)?)?;
    let path = directory.join("initrd.cpio");
    fs::write(&path, archive.finish()?)?;
    Ok(path)
}

/// Writes a file of so many MiB without holes.
fn fill(path: &Path, mebibytes: usize) -> Result<()> {
    let mut file = File::create(path).with_context(|| format!("making {}", path.display()))?;
    let mut block = vec![0u8; 1 << 20];
    for number in 0..mebibytes {
        block.iter_mut().enumerate().for_each(|(i, byte)| *byte = (i ^ (i >> 8) ^ number) as u8 | 1);
        file.write_all(&block)?;
    }
    Ok(())
}
