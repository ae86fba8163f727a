//! Each target on a fixed number of random inputs. `RUSE_FUZZ_CASES=N` gives each N of them, `RUSE_FUZZ_SEED` begins
//! elsewhere.

use ruse_fuzz::{TARGETS, Target};
use ruse_random::Random;

/// A number from the environment.
fn setting(name: &str) -> Option<u64> {
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name}={text}: expected a number")))
}

/// Inputs from a generator that needs no seed from outside, so that a failure repeats.
fn random_inputs(target: &Target) -> impl Iterator<Item = Vec<u8>> {
    let mut random = Random::new(setting("RUSE_FUZZ_SEED").unwrap_or(0));
    let len = target.len as u64;
    let cases = setting("RUSE_FUZZ_CASES").unwrap_or(target.cases.into());
    (0..cases).map(move |_| {
        let mut input = vec![0; (len / 4 + random.below(2 * len)) as usize];
        random.fill(&mut input);
        input
    })
}

/// Prints the input if the target panics, for a test of its own or for `cargo xtask fuzz --input`.
struct OnPanic<'a>(&'a str, &'a [u8]);

impl Drop for OnPanic<'_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let hex: String = self.1.iter().map(|byte| format!("{byte:02x}")).collect();
            eprintln!("target {} fails on {hex}", self.0);
        }
    }
}

fn check(name: &str) {
    let target = TARGETS.iter().find(|target| target.name == name).expect("a target");
    for input in random_inputs(target) {
        let _shown = OnPanic(name, &input);
        (target.run)(&input);
    }
}

macro_rules! targets {
    ($($name:ident)*) => {
        $(#[test]
        fn $name() {
            check(stringify!($name));
        })*

        #[test]
        fn every_target_has_its_test() {
            let tested = [$(stringify!($name)),*];
            assert!(TARGETS.iter().all(|target| tested.contains(&target.name)));
        }
    };
}

targets!(tier0 translator scan devices fs virtio vhost network loader images packages control options);
