//! The default guest, prepared through programs that stand in for apt.

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use ruse_guest::{AptCommands, DefaultGuest, GuestError, GuestFiles, Progress, Silent};
use tempfile::TempDir;

const KERNEL: &str = "linux-image-6.1-cloud_6.1.2-3_amd64.deb";
const BUSYBOX: &str = "busybox-static_1%3a1.35_amd64.deb";

/// An archive of packages, and an apt that serves them.
struct Archive {
    dir: TempDir,
}

impl Archive {
    fn new() -> Archive {
        let archive = Archive { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(archive.path("pool")).unwrap();
        let kernel =
            package(&[("./boot/config-6.1-cloud", b"CONFIG=y"), ("./boot/vmlinuz-6.1-cloud", &[5; 9000])]);
        fs::write(archive.path("pool").join(KERNEL), kernel).unwrap();
        fs::write(archive.path("pool").join(BUSYBOX), package(&[("./bin/busybox", b"box")])).unwrap();
        archive.script(
            "apt-cache",
            "[ -e $A/no-lists ] && { echo 'E: No packages found' >&2; exit 100; }\n\
            printf '%s\\n  Depends: linux-image-6.1-cloud\\n' linux-image-cloud-amd64\n",
        );
        archive.script("apt-get", &format!(
            "case \"$*\" in\n\
             *update*) [ -e $A/no-network ] && {{ echo 'E: no network' >&2; exit 100; }}; rm -f $A/no-lists; exit 0;;\n\
             *linux-image*) f={KERNEL};;\n\
             *linux-*) f=$(echo \"$*\" | grep -o 'linux-[a-z]*-6.1-cloud')_6.1.2-3_amd64.deb;;\n\
             *) f={BUSYBOX};;\nesac\n\
             s=$(stat -c %s $A/pool/$f); h=$(cat $A/$f.sum 2>/dev/null || sha256sum < $A/pool/$f | cut -c-64)\n\
             case \"$*\" in\n\
             *print-uris*) [ -e $f ] || echo \"'file:$A/pool/$f' $f $s SHA256:$h\";;\n\
             *) [ -e $A/cut ] && {{ head -c 100 $A/pool/$f > $f; echo 'E: cut off' >&2; rm $A/cut; exit 100; }}\n\
                have=$(stat -c %s $f 2>/dev/null || echo 0); echo $f $have >> $A/resumed\n\
                tail -c +$((have + 1)) $A/pool/$f >> $f;;\nesac\n"));
        archive
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn script(&self, name: &str, body: &str) {
        let (path, beside) = (self.path(name), self.path("script"));
        let mut file = fs::File::create(&beside).unwrap();
        write!(file, "#!/bin/sh\nA={}\necho \"$0 $*\" >> $A/calls\n{body}", self.dir.path().display())
            .unwrap();
        file.set_permissions(fs::Permissions::from_mode(0o755)).unwrap();
        drop(file);
        fs::rename(beside, path).unwrap();
    }

    fn mark(&self, name: &str) {
        fs::write(self.path(name), "").unwrap();
    }

    fn calls(&self) -> usize {
        fs::read_to_string(self.path("calls")).unwrap_or_default().lines().count()
    }

    fn guest(&self) -> DefaultGuest {
        let apt = AptCommands::new(self.path("apt-get"), self.path("apt-cache"));
        DefaultGuest::in_dir(self.path("cache")).with_apt(apt)
    }

    fn prepare(&self) -> Result<GuestFiles, GuestError> {
        self.guest().prepare(&mut Silent)
    }
}

/// A package with its files packed by gzip.
fn package(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut tar = tar::Builder::new(flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast()));
    for (name, content) in files {
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        tar.append_data(&mut header, name, *content).unwrap();
    }
    let data = tar.into_inner().unwrap().finish().unwrap();
    let mut package = b"!<arch>\n".to_vec();
    for (name, content) in [("debian-binary", b"2.0\n".to_vec()), ("data.tar.gz", data)] {
        package.extend(format!("{name:<16}{:<32}{:<10}`\n", 0, content.len()).bytes());
        package.extend(&content);
        package.resize(package.len().next_multiple_of(2), b'\n');
    }
    package
}

fn read(path: &Path) -> Vec<u8> {
    fs::read(path).unwrap()
}

#[test]
fn the_guest_is_prepared_once() {
    let archive = Archive::new();
    assert_eq!(archive.guest().prepared(), None);
    let files = archive.prepare().unwrap();
    assert_eq!(read(&files.kernel), [5; 9000]);
    assert_eq!(read(&files.busybox), b"box");
    assert_eq!(files.release, "6.1-cloud");
    assert_eq!(files.packages, ["linux-image-6.1-cloud 6.1.2-3", "busybox-static 1:1.35"]);
    assert!(read(&files.initrd).starts_with(b"070701"));
    let calls = archive.calls();
    assert_eq!(archive.prepare().unwrap(), files);
    assert_eq!(archive.guest().prepared(), Some(files));
    assert_eq!(archive.calls(), calls, "apt was not asked again");
}

#[test]
fn another_kernel_can_be_asked_for() {
    let archive = Archive::new();
    let guest = archive.guest().with_kernel(&["linux-image-other", "linux-image-third"]);
    assert_eq!(read(&guest.prepare(&mut Silent).unwrap().kernel), [5; 9000]);
    let calls = fs::read_to_string(archive.path("calls")).unwrap();
    let asked: Vec<_> = calls.lines().filter_map(|call| call.split_once(" depends ")).collect();
    let asked: Vec<_> = asked.iter().map(|(_, package)| *package).collect();
    assert_eq!(asked, ["linux-image-other", "linux-image-6.1-cloud"]);
}

#[test]
fn a_kernel_may_be_in_several_packages() {
    let archive = Archive::new();
    let pool = archive.path("pool");
    fs::write(pool.join(KERNEL), package(&[("./usr/share/doc/x", b"")])).unwrap();
    for (part, file) in
        [("base", "config"), ("binary", "vmlinuz"), ("modules", "kernel/drivers/virtio/virtio.ko")]
    {
        let name = format!("./usr/lib/modules/6.1-cloud/{file}");
        let package = package(&[(&name, part.as_bytes())]);
        fs::write(pool.join(format!("linux-{part}-6.1-cloud_6.1.2-3_amd64.deb")), package).unwrap();
    }
    let parts = "linux-base linux-base-6.1-cloud linux-binary-6.1-cloud linux-modules-6.1-cloud x-6.1-cloud";
    archive.script(
        "apt-cache",
        &format!(
            "case \"$*\" in *6.1-cloud) set {parts};; *) set linux-image-6.1-cloud;; esac\n\
             printf '  Depends: %s\\n' \"$@\"\n"
        ),
    );
    let files = archive.prepare().unwrap();
    assert_eq!((read(&files.kernel), read(&files.config)), (b"binary".to_vec(), b"base".to_vec()));
    assert_eq!(files.release, "6.1-cloud");
    let names: Vec<_> = files.packages.iter().filter_map(|package| package.split('-').nth(1)).collect();
    assert_eq!(names, ["image", "base", "binary", "modules", "static 1:1.35"]);
    assert!(String::from_utf8_lossy(&read(&files.initrd)).contains("virtio.ko"));
}

#[test]
fn a_lost_initramfs_is_written_again_without_apt() {
    let archive = Archive::new();
    let files = archive.prepare().unwrap();
    let (calls, initrd) = (archive.calls(), read(&files.initrd));
    fs::remove_file(&files.initrd).unwrap();
    assert_eq!(read(&archive.prepare().unwrap().initrd), initrd);
    assert_eq!(archive.calls(), calls);
}

#[test]
fn a_damaged_cache_is_made_anew() {
    let archive = Archive::new();
    let files = archive.prepare().unwrap();
    fs::write(&files.kernel, "short").unwrap();
    assert_eq!(archive.guest().prepared(), None);
    assert_eq!(read(&archive.prepare().unwrap().kernel), [5; 9000]);
    fs::write(archive.path("cache/guest/current.json"), "{").unwrap();
    assert_eq!(read(&archive.prepare().unwrap().kernel), [5; 9000]);
}

#[test]
fn a_download_that_was_cut_off_is_resumed() {
    let archive = Archive::new();
    archive.mark("cut");
    archive.mark("no-network");
    let error = archive.prepare().unwrap_err();
    assert!(matches!(error, GuestError::Apt { .. }), "{error}");
    assert_eq!(archive.guest().prepared(), None);
    archive.prepare().unwrap();
    let resumed = fs::read_to_string(archive.path("resumed")).unwrap();
    assert!(resumed.contains(&format!("{KERNEL} 100")), "{resumed}");
}

#[test]
fn a_download_that_is_whole_already_is_used() {
    let archive = Archive::new();
    let downloads = archive.path("cache/guest/downloads");
    fs::create_dir_all(&downloads).unwrap();
    fs::copy(archive.path("pool").join(KERNEL), downloads.join(KERNEL)).unwrap();
    archive.prepare().unwrap();
    let resumed = fs::read_to_string(archive.path("resumed")).unwrap();
    assert!(!resumed.contains(KERNEL), "{resumed}");
}

#[test]
fn a_wrong_beginning_is_not_built_upon() {
    let archive = Archive::new();
    let downloads = archive.path("cache/guest/downloads");
    fs::create_dir_all(&downloads).unwrap();
    fs::write(downloads.join(KERNEL), "something else").unwrap();
    fs::write(downloads.join(BUSYBOX), vec![0; 1 << 20]).unwrap();
    assert_eq!(read(&archive.prepare().unwrap().kernel), [5; 9000]);
}

#[test]
fn a_file_with_another_checksum_is_never_used() {
    let archive = Archive::new();
    fs::write(archive.path(&format!("{KERNEL}.sum")), "0").unwrap();
    assert!(matches!(archive.prepare(), Err(GuestError::BadReply { .. })));
    fs::write(archive.path(&format!("{KERNEL}.sum")), "0".repeat(64)).unwrap();
    let error = archive.prepare().unwrap_err();
    assert!(matches!(error, GuestError::Corrupt { .. }), "{error}");
    assert_eq!(archive.guest().prepared(), None);
    assert!(!archive.path("cache/guest/downloads").join(KERNEL).exists());
}

#[test]
fn empty_lists_are_fetched_privately() {
    let archive = Archive::new();
    archive.mark("no-lists");
    archive.prepare().unwrap();
    let calls = fs::read_to_string(archive.path("calls")).unwrap();
    let update = calls.lines().find(|line| line.ends_with("update")).unwrap();
    assert!(update.contains("Dir::State::lists=") && update.contains("cache/guest/downloads"), "{update}");
}

#[test]
fn without_apt_one_line_says_what_to_give() {
    let archive = Archive::new();
    let apt = AptCommands::new("/nonexistent/apt-get", "/nonexistent/apt-cache");
    let error = archive.guest().with_apt(apt).prepare(&mut Silent).unwrap_err();
    let text = error.to_string();
    assert!(matches!(error, GuestError::NoApt { .. }));
    assert!(text.contains("--kernel PATH [--initrd PATH]") && !text.contains('\n'), "{text}");
}

#[test]
fn two_runs_at_the_same_time_fetch_once() {
    let archive = Archive::new();
    std::thread::scope(|scope| {
        let runs: Vec<_> = (0..4).map(|_| scope.spawn(|| archive.prepare().unwrap())).collect();
        let files: Vec<_> = runs.into_iter().map(|run| run.join().unwrap()).collect();
        assert!(files.iter().all(|file| file == &files[0]));
    });
    assert_eq!(archive.calls(), 6, "two questions, two places, two downloads");
}

#[test]
fn progress_tells_steps_and_bytes() {
    #[derive(Default)]
    struct Log(Vec<String>, Vec<(u64, u64)>, bool);
    impl Progress for Log {
        fn step(&mut self, what: &str) {
            self.0.push(what.to_owned());
        }
        fn bytes(&mut self, done: u64, total: u64) {
            self.1.push((done, total));
        }
        fn finish(&mut self) {
            self.2 = true;
        }
    }
    let archive = Archive::new();
    let mut log = Log::default();
    archive.guest().prepare(&mut log).unwrap();
    assert!(log.0.iter().any(|step| step.contains("linux-image-6.1-cloud 6.1.2-3")), "{:?}", log.0);
    assert!(
        log.1.iter().all(|(done, total)| done <= total) && log.1.iter().any(|(done, total)| done == total)
    );
    assert!(log.2);
}
