//! Devices that other programs serve: QEMU's storage daemon and virtiofsd, as Debian's kernel uses them.

use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use crate::disk::md5;
use crate::linux::{guest, run_script};
use crate::log;
use crate::machine::{PATIENCE, word};
use crate::manage::{Place, echo};

/// A program that serves a device. Dropped, it is ended.
struct Backend(Child);

impl Backend {
    /// Starts it, and waits for its socket; `None` where it is not installed.
    fn start(program: &str, words: &[String], socket: &Path) -> Option<Self> {
        let child = Command::new(program).args(words).stdout(Stdio::null()).stderr(Stdio::null()).spawn();
        let Ok(child) = child else {
            eprintln!("skipped: '{program}' cannot be started");
            return None;
        };
        let mut backend = Self(child);
        let start = Instant::now();
        while !socket.exists() {
            if let Some(status) = backend.0.try_wait().unwrap() {
                eprintln!("skipped: '{program}' does not run here: {status}");
                return None;
            }
            assert!(start.elapsed() < PATIENCE, "{program} makes no socket");
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        Some(backend)
    }

    fn disk(image: &Path, socket: &Path) -> Option<Self> {
        let words = [
            "--blockdev".to_owned(),
            format!("driver=file,node-name=f,filename={}", word(image)),
            "--export".to_owned(),
            format!(
                "type=vhost-user-blk,id=e,addr.type=unix,addr.path={},node-name=f,writable=on,num-queues=2",
                word(socket)
            ),
        ];
        Self::start("qemu-storage-daemon", &words, socket)
    }

    /// The one of QEMU, which needs root.
    fn folder(folder: &Path, socket: &Path) -> Option<Self> {
        let source = format!("source={}", word(folder));
        let words = [
            format!("--socket-path={}", word(socket)),
            "-o".into(),
            source,
            "-o".into(),
            "sandbox=chroot".into(),
        ];
        Self::start("/usr/lib/qemu/virtiofsd", &words, socket)
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The backend serves one client at a time: it is let go with the device.
#[test]
fn a_disk_of_another_program_comes_and_goes() {
    let dir = tempfile::tempdir().unwrap();
    let (image, socket) = (dir.path().join("image"), dir.path().join("disk"));
    fs::File::create(&image).unwrap().set_len(8 << 20).unwrap();
    let Some(_backend) = Backend::disk(&image, &socket) else { return };
    let (place, bare) = (Place::new(), echo());
    place.start_echo(&bare, &["--name", "m", "--slots", "1"]);
    let disk = format!("vhost-user={}", word(&socket));
    for words in [&["detach", "m", "slot1"][..], &["detach", "m", "slot1", "--force"]] {
        assert_eq!(place.ask(&["attach", "m", "--disk", &disk]), "slot1\n");
        let info = place.ask(&["info", "m"]);
        assert!(info.contains(&format!("slot1: {}: 8 MiB", word(&socket))), "{info}");
        place.ask(words);
        assert!(!place.ask(&["info", "m"]).contains("slot1"));
    }
    place.ask(&["attach", "m", "--disk", &disk]);
    place.ask(&["stop", "--force", "m"]);
    place.start_echo(&bare, &["--name", "m", "--disk", &disk]);
    place.ask(&["stop", "--force", "m"]);
}

const DISK: &str = r#"
echo -- disk; cat /sys/block/vda/size; ls /sys/block/vda/mq | wc -w; head -c 8388608 /dev/vda | md5sum
dd if=/dev/vda of=/dev/vda bs=1M count=4 seek=4 conv=notrunc 2>/dev/null; sync
"#;
/// What is executed comes from the folder: pages of code that virtiofsd has written.
const FOLDER: &str = r#"
echo -- folder; mkdir /a; mount -t virtiofs work /a; cat /a/file; echo new > /a/new
cp /bin/busybox /a/echo; for n in 1 2 3; do /a/echo run $n; done; umount /a
"#;

#[test]
fn linux_uses_a_disk_and_a_folder_of_other_programs() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (image, folder) = (dir.path().join("image"), dir.path().join("folder"));
    let sockets = [dir.path().join("disk"), dir.path().join("fs")];
    let bytes: Vec<u8> = (0..1u64 << 20).flat_map(|n| (n * 0x9e37_79b9).to_le_bytes()).collect();
    fs::write(&image, &bytes).unwrap();
    fs::create_dir(&folder).unwrap();
    fs::write(folder.join("file"), "from the host\n").unwrap();
    let (disk, share) = (Backend::disk(&image, &sockets[0]), Backend::folder(&folder, &sockets[1]));
    let mut options = vec!["--accel".to_owned(), "dbt".into(), "--cpus".into(), "2".into()];
    let mut script = String::new();
    if disk.is_some() {
        options.extend(["--disk".into(), format!("vhost-user={}", word(&sockets[0]))]);
        script += DISK;
    }
    if share.is_some() {
        options.extend(["--share".into(), format!("vhost-user={}:work", word(&sockets[1]))]);
        script += FOLDER;
    }
    if script.is_empty() {
        return;
    }
    let options: Vec<_> = options.iter().map(|word| &**word).collect();
    let ended =
        run_script(&files.kernel, &files, &options, "", &format!("{script}{}echo -- end\n", log::SCRIPT));
    if disk.is_some() {
        assert_eq!(ended.section("disk"), ["16384", "2", &format!("{}  -", md5(&bytes))]);
        let after = fs::read(&image).unwrap();
        assert!(after[4 << 20..] == bytes[..4 << 20] && after[..4 << 20] == bytes[..4 << 20]);
    }
    if share.is_some() {
        assert_eq!(ended.section("folder"), ["from the host", "run 1", "run 2", "run 3"]);
        assert_eq!(fs::read_to_string(folder.join("new")).unwrap(), "new\n");
    }
    log::check(&ended, 2);
}
