//! Machines that run by themselves, and the commands about them.

use std::fs;
use std::io::Write;
use std::process::{Output, Stdio};
use std::time::{Duration, Instant};

use tempfile::TempDir;

use crate::bare::{Bare, image};
use crate::machine::{Machine, PATIENCE, ruse};

/// A place for machines of one test. Those that are left are ended.
pub struct Place {
    runtime: TempDir,
    state: TempDir,
}

impl Place {
    /// An empty one.
    pub fn new() -> Self {
        Self { runtime: tempfile::tempdir().unwrap(), state: tempfile::tempdir().unwrap() }
    }

    fn run(&self, words: &[&str]) -> Output {
        ruse(&self.runtime).env("XDG_STATE_HOME", self.state.path()).args(words).output().unwrap()
    }

    /// Runs a command that has to succeed; what it prints.
    #[track_caller]
    pub fn ask(&self, words: &[&str]) -> String {
        let output = self.run(words);
        let messages = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {messages}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// Runs a command that has to fail with one line that has these parts.
    #[track_caller]
    fn refused(&self, words: &[&str], code: i32, parts: &[&str]) {
        let output = self.run(words);
        let messages = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{words:?}: {messages}");
        assert_eq!(messages.lines().count(), 1, "{messages}");
        for part in parts {
            assert!(messages.contains(part), "{part:?} in {messages}");
        }
    }

    /// Starts a machine by itself; what the command prints.
    pub fn start_echo(&self, bare: &Bare, options: &[&str]) -> String {
        let kernel = bare.kernel();
        let words = bare.words(&kernel, options);
        self.ask(&[&["run", "--detach", "--accel", "dbt"], &words[..]].concat())
    }

    fn list(&self) -> serde_json::Value {
        serde_json::from_str(&self.ask(&["ps", "--json"])).unwrap()
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        for machine in self.list().as_array().unwrap() {
            self.run(&["stop", "--force", machine["name"].as_str().unwrap()]);
        }
    }
}

/// A guest that gives back what is typed.
pub fn echo() -> Bare {
    Bare::flat(image!(guest_echo, guest_echo_end))
}

#[test]
fn a_detached_machine_runs_until_it_is_stopped() {
    let (place, bare) = (Place::new(), echo());
    assert_eq!(place.start_echo(&bare, &["--name", "web"]), "web\n");
    let list = place.list();
    assert_eq!(list[0]["name"], "web");
    assert_eq!((&list[0]["phase"], &list[0]["memory"]), (&"running".into(), &(16 << 20).into()));
    assert!(place.ask(&["ps"]).contains("running"));
    place.refused(
        &["run", "--detach", "--name", "web", "--kernel", &bare.kernel()],
        2,
        &["'web' runs already"],
    );
    place.ask(&["pause", "web"]);
    assert!(place.ask(&["info", "web"]).starts_with("web: paused, engine dbt, 16 MiB of RAM"));
    place.ask(&["resume", "web"]);
    let info: serde_json::Value = serde_json::from_str(&place.ask(&["info", "web", "--json"])).unwrap();
    assert_eq!((&info["phase"], &info["config"]["name"]), (&"running".into(), &"web".into()));
    place.ask(&["stop", "--force", "web"]);
    assert_eq!(place.list(), serde_json::json!([]));
    place.refused(&["info", "web"], 2, &["no machine 'web' runs"]);
    assert!(!place.runtime.path().join("ruse/web").exists());
}

#[test]
fn a_device_that_cannot_come_or_go_is_told_of() {
    let (place, bare) = (Place::new(), echo());
    place.start_echo(&bare, &["--name", "m"]);
    let disk = tempfile::NamedTempFile::new().unwrap();
    disk.as_file().set_len(4096).unwrap();
    let path = disk.path().to_str().unwrap();
    place.refused(&["attach", "m", "--disk", path], 2, &["no slot is free", "--slots"]);
    place.refused(&["attach", "m", "--disk", "d,ro"], 2, &["'ro'", "readonly"]);
    place.refused(&["attach", "m", "--net", "none"], 2, &["'none' is no network"]);
    place.refused(&["attach", "m"], 2, &["--disk"]);
    place.refused(&["detach", "m", "slot1"], 2, &["'slot1' is no device that was attached"]);
    place.refused(&["link", "m", "down"], 2, &["it has no network device"]);
    place.ask(&["stop", "--force", "m"]);
    place.start_echo(&bare, &["--name", "m", "--slots", "1"]);
    place.refused(&["attach", "m", "--disk", "/no/such/disk"], 2, &["/no/such/disk", "No such file"]);
    assert_eq!(place.ask(&["attach", "m", "--disk", path]), "slot1\n");
    assert!(place.ask(&["info", "m"]).contains(&format!("slot1: {path}: 4 KiB")));
    // Its kernel has never switched the slot on.
    place.ask(&["detach", "m", "slot1"]);
    place.refused(&["detach", "m", "slot1"], 2, &["'slot1' is no device that was attached"]);
    assert_eq!(place.ask(&["attach", "m", "--disk", path]), "slot1\n", "slot and file are free");
    place.ask(&["stop", "--force", "m"]);
}

#[test]
fn machines_without_a_name_are_numbered() {
    let (place, bare) = (Place::new(), echo());
    assert_eq!(place.start_echo(&bare, &[]), "ruse\n");
    assert_eq!(place.start_echo(&bare, &[]), "ruse-2\n");
    assert_eq!(place.list().as_array().unwrap().len(), 2);
}

#[test]
fn a_system_that_does_not_shut_down_is_ended() {
    let (place, bare) = (Place::new(), echo());
    place.start_echo(&bare, &["--name", "deaf"]);
    let output = place.run(&["stop", "deaf", "--timeout", "1"]);
    assert_eq!(output.status.code(), Some(0));
    assert!(String::from_utf8_lossy(&output.stderr).contains("did not shut down within 1 s"));
    assert_eq!(place.list(), serde_json::json!([]));
}

#[test]
fn the_console_shows_what_came_before_and_takes_input() {
    let (place, bare) = (Place::new(), echo());
    place.start_echo(&bare, &["--name", "c"]);
    let mut viewer = ruse(&place.runtime)
        .args(["console", "c"])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut keyboard = viewer.stdin.take().unwrap();
    keyboard.write_all(b"typed").unwrap();
    // A second one sees the echo of what the first has typed, at last.
    let mut second = Machine::command(ruse(&place.runtime).args(["console", "c"]));
    second.expect("ready");
    second.expect("typed");
    second.type_in("\x01d");
    second.end().with_code(0);
    place.ask(&["stop", "--force", "c"]);
    let output = viewer.wait_with_output().unwrap();
    assert!(
        String::from_utf8_lossy(&output.stdout).contains("typed"),
        "the end of the machine is the viewer's"
    );
}

#[test]
fn a_foreground_machine_is_found_too() {
    let bare = echo();
    let kernel = bare.kernel();
    let mut machine = Machine::on_terminal(&bare.words(&kernel, &["--name", "here"]));
    machine.expect("ready");
    let ask = |words: &[&str]| ruse(machine.runtime()).args(words).output().unwrap();
    assert!(String::from_utf8_lossy(&ask(&["ps"]).stdout).contains("here"));
    assert_eq!(ask(&["stop", "--force", "here"]).status.code(), Some(0));
    machine.end().with_code(0);
}

#[test]
fn a_machine_that_dies_leaves_nothing_in_the_way() {
    let (place, bare) = (Place::new(), echo());
    place.start_echo(&bare, &["--name", "dies"]);
    let pid = place.list()[0]["pid"].to_string();
    assert!(std::process::Command::new("kill").args(["-KILL", &pid]).status().unwrap().success());
    let deadline = Instant::now() + PATIENCE;
    while place.list() != serde_json::json!([]) {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(place.start_echo(&bare, &["--name", "dies"]), "dies\n");
}

#[test]
fn what_goes_wrong_before_a_machine_runs_is_told_at_once() {
    let place = Place::new();
    place.refused(&["run", "--detach", "--kernel", "/no/such/kernel"], 2, &["/no/such/kernel"]);
    place.refused(&["console", "nobody"], 2, &["no machine 'nobody' runs"]);
    place.refused(&["stop", "../etc"], 2, &["no machine '../etc' runs"]);
    let output = ruse(&place.runtime)
        .env("XDG_STATE_HOME", "/dev/null")
        .args(["run", "--detach", "--accel", "dbt", "--kernel", &echo().kernel()])
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&output.stderr).contains("XDG_STATE_HOME"));
}

#[test]
fn a_log_keeps_how_a_detached_machine_ended() {
    let place = Place::new();
    let bare = Bare::flat(image!(guest_triple_fault, guest_triple_fault_end));
    let kernel = bare.kernel();
    place.run(
        &[&["run", "--detach", "--accel", "dbt", "--name", "t"], &bare.words(&kernel, &[])[..]].concat(),
    );
    let deadline = Instant::now() + PATIENCE;
    let log = place.state.path().join("ruse/t.log");
    while !fs::read_to_string(&log).unwrap_or_default().contains("triple fault") {
        assert!(Instant::now() < deadline);
        std::thread::sleep(Duration::from_millis(20));
    }
}
