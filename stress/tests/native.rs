//! The programs on this host.

use std::io::Write;
use std::process::{Command, Stdio};

/// Has the programs run, and gives the answers.
fn answers(names: &str) -> Vec<String> {
    let mut child = Command::new(env!("CARGO_BIN_EXE_ruse-stress"))
        .arg("answer")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the program");
    child.stdin.take().expect("a pipe").write_all(names.as_bytes()).expect("somebody who reads");
    let ended = child.wait_with_output().expect("its end");
    String::from_utf8(ended.stdout).expect("text").lines().map(str::to_owned).collect()
}

#[test]
fn programs_find_the_same_whenever_they_run_and_other_ones_something_else() {
    for kind in ["code", "signals", "forks", "maps", "jit", "patch", "locks", "litmus"] {
        let [first, again, other] = &answers(&format!("{kind}-1\n{kind}-1\n{kind}-2\n"))[..] else {
            panic!("three answers of {kind}");
        };
        assert!(u64::from_str_radix(first, 16).is_ok(), "{kind}: {first}");
        assert_eq!(first, again, "{kind}");
        // These find nothing that depends on the seed; they only check.
        if kind != "patch" && kind != "litmus" {
            assert_ne!(first, other, "{kind}");
        }
    }
}

#[test]
fn a_program_that_is_not_there_is_named() {
    assert_eq!(answers("nothing-1\n"), ["there are no such programs"]);
}
