//! Images: what can be wrong with them, and one that is built and run.

use std::fs;
use std::process::{Command, Output};

use tempfile::TempDir;

use crate::machine::{Machine, ruse, word};

/// A user's directories.
struct User {
    runtime: TempDir,
    data: TempDir,
}

impl User {
    fn new() -> Self {
        Self { runtime: tempfile::tempdir().unwrap(), data: tempfile::tempdir().unwrap() }
    }

    fn command(&self, words: &[&str]) -> Command {
        let mut command = ruse(&self.runtime);
        command.env("XDG_DATA_HOME", self.data.path()).env("USER", "bob").args(words);
        command
    }

    fn run(&self, words: &[&str]) -> Output {
        self.command(words).output().unwrap()
    }

    #[track_caller]
    fn ask(&self, words: &[&str]) -> String {
        let output = self.run(words);
        assert_eq!(output.status.code(), Some(0), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    #[track_caller]
    fn refused(&self, words: &[&str], parts: &[&str]) {
        let output = self.run(words);
        let messages = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {messages}");
        assert_eq!(messages.lines().count(), 1, "{messages}");
        for part in parts {
            assert!(messages.contains(part), "{part:?} in {messages}");
        }
    }
}

#[test]
fn what_is_wrong_with_an_image_is_told_in_a_line() {
    let user = User::new();
    user.refused(&["run", "nothing"], &["there is no image 'nothing'"]);
    user.refused(&["run", "debian", "--kernel", "x"], &["--kernel"]);
    user.refused(&["run", "--fresh"], &["IMAGE"]);
    user.refused(&["image", "build", "plan9"], &["plan9", "debian"]);
    user.refused(&["image", "build", "debian", "--size", "1M"], &["--size"]);
    user.refused(&["image", "build", "debian", "--name", "../x"], &["'../x'"]);
    user.refused(&["image", "build", "debian", "--packages=vim,--allow"], &["'--allow'"]);
    user.refused(&["image", "build", "debian", "--release", "Book Worm"], &["'Book Worm'"]);
    user.refused(&["image", "remove", "nothing"], &["there is no image 'nothing'"]);
    user.refused(&["image", "inspect", "nothing"], &["there is no image 'nothing'"]);
    user.refused(&["ssh", "nobody"], &["no machine 'nobody' runs"]);
    user.refused(&["cp", "a", "b"], &["NAME:PATH"]);
    user.refused(&["cp", "x:a", "y:b"], &["one machine"]);
    assert_eq!(user.ask(&["image", "list", "--json"]), "[]\n");
    assert!(user.ask(&["run", "debian", "--dry-run"]).contains("not fetched yet"));
    fs::create_dir_all(user.data.path().join("ruse/images/broken")).unwrap();
    let output = user.run(&["image", "list"]);
    assert!(String::from_utf8_lossy(&output.stderr).contains("image 'broken' is damaged"));
    user.ask(&["image", "remove", "broken"]);
}

/// Whether a machine of an image has the host's time, to 10 ms, within 20 s.
const HAS_TIME: &str = "chronyc waitsync 20 0.01 0 1 > /dev/null && echo yes";

/// A machine of the image `d`, logged in at its console.
fn start(user: &User, words: &[&str]) -> Machine {
    let words = [&["run", "d", "--accel", "dbt", "--cpus", "2"], words].concat();
    let mut machine = Machine::command(&mut user.command(&words));
    machine.expect("d login: ");
    machine.expect("$ ");
    machine
}

#[test]
#[ignore = "fetches a hundred packages and takes some minutes"]
fn a_debian_is_built_from_another_release() {
    let user = User::new();
    user.ask(&["image", "build", "debian", "--release", "trixie", "--name", "d"]);
    let mut machine = start(&user, &[]);
    assert_eq!(machine.ask("systemctl is-system-running --wait"), "running");
    assert_eq!(machine.ask(HAS_TIME), "yes");
    assert_eq!(
        machine.ask("dpkg --audit | wc -l; cut -d . -f 1 /etc/debian_version; locale charmap"),
        "0 13 UTF-8"
    );
    assert_eq!(user.ask(&["ssh", "d", "sudo id -u"]), "0\n");
    user.ask(&["stop", "d"]);
    machine.end().with_code(0);
}

#[test]
#[ignore = "fetches a hundred packages and takes some minutes"]
fn a_debian_is_built_boots_and_keeps_what_is_written() {
    let user = User::new();
    user.ask(&["image", "build", "debian", "--packages", "file,cloud-init", "--name", "d", "--size", "2G"]);
    let start = |words| start(&user, words);
    let mut machine = start(&[]);
    assert_eq!(machine.ask("systemctl is-system-running --wait"), "running");
    assert_eq!(machine.ask("file -b /proc/self/exe | cut -c 1-8"), "symbolic");
    assert_eq!(machine.ask("dpkg --audit | wc -l"), "0");
    assert_eq!(machine.ask("sudo id -u"), "0");
    assert_eq!(machine.ask(HAS_TIME), "yes");
    assert_eq!(
        machine.ask("timeout 3 getent hosts UNKNOWN; echo $?"),
        "2",
        "a name that nobody has is known not to be"
    );
    assert_eq!(user.ask(&["exec", "d", "printf", "%s|", "a b", "it's", "$HOME"]), "a b|it's|$HOME|");
    assert_eq!(user.run(&["ssh", "d", "exit 7"]).status.code(), Some(7));
    let (here, back) = (user.data.path().join("here"), user.data.path().join("back"));
    fs::write(&here, "copied".repeat(100_000)).unwrap();
    user.ask(&["cp", word(&here), "d:there"]);
    user.ask(&["cp", "d:there", word(&back)]);
    assert!(fs::read(&back).unwrap() == fs::read(&here).unwrap());
    machine.type_in("rm there; echo kept > kept; sudo poweroff\n");
    machine.end().with_code(0);
    user.refused(&["image", "remove", "d"], &["under the disks of d", "--force"]);
    let mut machine = start(&[]);
    assert_eq!(machine.ask("cat kept"), "kept");
    user.ask(&["stop", "d"]);
    machine.end().with_code(0);
    let mut machine = start(&["--fresh"]);
    assert_eq!(machine.ask("ls | wc -l"), "0");
    user.ask(&["stop", "--force", "d"]);
    machine.end().with_code(0);
    let data = user.data.path().join("user-data");
    fs::write(
        &data,
        "#cloud-config\nusers: [default, {name: alice}]\nwrite_files: [{path: /etc/made, content: 'yes'}]\n",
    )
    .unwrap();
    let mut machine = start(&["--fresh", "--user-data", word(&data)]);
    assert_eq!(machine.ask("cloud-init status --wait | tail -n 1"), "status: done");
    assert_eq!(machine.ask("id -un alice; cat /etc/made; ls /home | wc -l"), "alice yes2");
    assert_eq!(user.ask(&["ssh", "d", "sudo id -u"]), "0\n");
    user.ask(&["stop", "--force", "d"]);
    machine.end().with_code(0);
    user.ask(&["image", "remove", "--force", "d"]);
    assert_eq!(user.ask(&["image", "list", "--json"]), "[]\n");
}
