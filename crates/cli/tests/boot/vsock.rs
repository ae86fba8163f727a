//! Sockets between programs of a Debian guest and of the host.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ruse_guest::GuestFiles;
use ruse_guest::cpio::CpioWriter;

use crate::linux::{guest, run_script};
use crate::log;
use crate::machine::{PATIENCE, word};

/// The default guest with the program of `guests/vsock.c` in it.
fn guest_with_program(dir: &Path) -> Option<GuestFiles> {
    let files = guest()?;
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/boot/guests/vsock.c");
    let program = dir.join("vsock");
    let built = Command::new("cc").args(["-O1", "-static", "-o"]).args([&program, &source]).status();
    assert!(built.expect("there is a C compiler").success());
    let (added, content) = (dir.join("vsock.cpio"), std::fs::read(&program).unwrap());
    let mut archive = CpioWriter::new(File::create(&added).unwrap());
    archive.file("bin/vsock", 0o755, &content).unwrap();
    archive.finish().unwrap();
    let initrd = PathBuf::from(format!("{},{}", word(&files.initrd), word(&added)));
    Some(GuestFiles { initrd, ..files })
}

/// Connects to the guest's port 52, as soon as there is a machine and a program that listens.
fn connect(path: &Path) -> UnixStream {
    let limit = Instant::now() + PATIENCE;
    loop {
        if let Ok(mut stream) = UnixStream::connect(path) {
            stream.write_all(b"CONNECT 52\n").unwrap();
            let mut answer = Vec::new();
            let mut byte = [0];
            while answer.last() != Some(&b'\n') && stream.read(&mut byte).is_ok_and(|count| count == 1) {
                answer.push(byte[0]);
            }
            if answer.starts_with(b"OK ") {
                return stream;
            }
        }
        assert!(Instant::now() < limit, "the guest does not listen");
        thread::sleep(Duration::from_millis(50));
    }
}

/// What comes back from the guest is what was sent.
fn is_echoed(stream: UnixStream, seed: u32) {
    let bytes: Vec<u8> = (0..1_500_000u32).map(|n| (n.wrapping_mul(seed) >> 11) as u8).collect();
    let (mut writer, sent) = (stream.try_clone().unwrap(), bytes.clone());
    let writing = thread::spawn(move || {
        writer.write_all(&sent).unwrap();
        writer.shutdown(Shutdown::Write).unwrap();
    });
    let mut back = Vec::new();
    { stream }.read_to_end(&mut back).unwrap();
    writing.join().unwrap();
    assert!(back == bytes, "{} bytes came back", back.len());
}

/// A service of the host: gives everything back, twice.
fn serve_twice(listener: &UnixListener) {
    for stream in listener.incoming().take(2) {
        let mut stream = stream.unwrap();
        std::io::copy(&mut stream.try_clone().unwrap(), &mut stream).unwrap();
    }
}

const SCRIPT: &str = r#"
vsock echo 52 5 &
echo -- from; seq 1 100000 | vsock send 2 1000 | md5sum; echo again | vsock send 2 1000
echo -- refused; vsock send 2 1001 < /dev/null 2>&1
echo -- to; wait $!; echo $?
"#;

#[test]
fn programs_of_guest_and_host_talk_in_both_directions() {
    let dir = tempfile::tempdir().unwrap();
    let Some(files) = guest_with_program(dir.path()) else { return };
    let path = dir.path().join("vm");
    let listener = UnixListener::bind(dir.path().join("vm_1000")).unwrap();
    let service = thread::spawn(move || serve_twice(&listener));
    let clients: Vec<_> = (1..=5u32)
        .map(|seed| {
            let path = path.clone();
            thread::spawn(move || is_echoed(connect(&path), seed.wrapping_mul(0x9e37_79b9)))
        })
        .collect();
    let vsock = format!("4,path={}", word(&path));
    let script = format!("{SCRIPT}{}echo -- end\n", log::SCRIPT);
    let ended = run_script(&files.kernel, &files, &["--vsock", &vsock, "--cpus", "2"], "", &script);
    clients.into_iter().for_each(|client| client.join().unwrap());
    service.join().unwrap();
    assert_eq!(ended.section("from"), ["dea9193b768319cbb4ff1a137ac03113  -", "again"]);
    assert_eq!(ended.section("refused"), ["connect: Connection reset by peer"]);
    assert_eq!(ended.section("to"), ["0"]);
    log::check(&ended, 2);
    assert!(!path.exists(), "the socket goes with the machine");
}
