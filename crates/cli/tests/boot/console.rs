//! Virtio consoles and ports as Debian's kernel uses them.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use crate::linux::{expect_shell, guest, run_script};
use crate::log;
use crate::machine::{Machine, PATIENCE, word};

#[test]
fn a_console_is_a_terminal_whose_size_follows_the_window() {
    let Some(_) = guest() else { return };
    let mut machine = Machine::on_terminal(&["--cmdline", "quiet", "--console", "stdio"]);
    expect_shell(&mut machine);
    assert_eq!(machine.ask("tty"), "/dev/hvc0");
    machine.terminal().resize(101, 37);
    machine.signal("WINCH");
    assert_eq!(machine.ask("while [ \"$(stty size)\" != '37 101' ]; do :; done; stty size"), "37 101");
    // The monitor's keys work as ever.
    machine.type_in("\x01c");
    machine.expect("(ruse) ");
    machine.type_in("info\r");
    machine.expect("running");
    machine.type_in("\r");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}

const PORTS: &str = r#"
port() { for p in /sys/class/virtio-ports/*; do if [ "$(cat $p/name)" = "$1" ]; then echo /dev/${p##*/}; fi; done; }
echo first > $(port log); seq 1 20000 > $(port log)
exec 3<> $(port org.test); read line <&3
echo -- port; echo "$line"; echo "got $line" >&3
"#;

/// The first line of an answer to a question at a port.
fn ask(path: &Path) -> String {
    let limit = Instant::now() + PATIENCE;
    let mut stream = loop {
        match UnixStream::connect(path) {
            Ok(stream) => break stream,
            Err(_) => thread::sleep(Duration::from_millis(50)),
        }
        assert!(Instant::now() < limit, "there is no port");
    };
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.write_all(b"question\n").unwrap();
    let mut answer = String::new();
    BufReader::new(stream).read_line(&mut answer).unwrap();
    answer
}

#[test]
fn ports_lead_to_files_and_programs() {
    let Some(files) = guest() else { return };
    let dir = tempfile::tempdir().unwrap();
    let (log, socket) = (dir.path().join("log"), dir.path().join("socket"));
    let program = {
        let socket = socket.clone();
        thread::spawn(move || ask(&socket))
    };
    let consoles =
        [format!("file={},name=log", word(&log)), format!("socket={},name=org.test", word(&socket))];
    let options = ["--console", &consoles[0], "--console", &consoles[1]];
    let script = format!("{PORTS}{}echo -- end\n", log::SCRIPT);
    let ended = run_script(&files.kernel, &files, &options, "", &script);
    assert_eq!(ended.section("port"), ["question"]);
    assert_eq!(program.join().unwrap(), "got question\n");
    let expected: String = (1..=20000).map(|n| format!("{n}\n")).collect();
    assert!(fs::read_to_string(&log).unwrap() == format!("first\n{expected}"));
    log::check(&ended, 1);
    assert!(!socket.exists(), "the socket goes with the machine");
}
