//! One target under libFuzzer: the one that `RUSE_FUZZ_TARGET` names. Without a name it prints those there are.

#![no_main]

use std::sync::OnceLock;

use ruse_fuzz::{TARGETS, Target};

static TARGET: OnceLock<&Target> = OnceLock::new();

/// Finds the target before libFuzzer begins.
fn choose() {
    let Ok(name) = std::env::var("RUSE_FUZZ_TARGET") else {
        TARGETS.iter().for_each(|target| println!("{}", target.name));
        std::process::exit(0);
    };
    let Some(target) = TARGETS.iter().find(|target| target.name == name) else {
        eprintln!("there is no target '{name}'");
        std::process::exit(2);
    };
    let _ = TARGET.set(target);
}

libfuzzer_sys::fuzz_target!(init: choose(), |data: &[u8]| {
    (TARGET.get().expect("chosen at the start").run)(data)
});
