//! Debian's cloud kernel with the default guest's userland.

use std::fs;
use std::process::Command;

use ruse_guest::{DefaultGuest, EXIT_MARK, GuestFiles, Silent, run_argument};

use crate::machine::{Ended, Machine, word};

/// The default guest. Where it cannot be fetched, the test says so and is left out.
fn guest() -> Option<GuestFiles> {
    match DefaultGuest::new().and_then(|guest| guest.prepare(&mut Silent)) {
        Ok(files) => Some(files),
        Err(error) => {
            println!("skipped, there is no guest: {error}");
            None
        }
    }
}

/// Runs a script in the default guest, which powers off after it.
fn run_script(options: &[&str], script: &str) -> Ended {
    let cmdline = format!("quiet {}", run_argument(script));
    let ended = Machine::start(&[&["--cmdline", &cmdline], options].concat()).end().with_code(0);
    assert!(ended.console.contains(&format!("{EXIT_MARK} 0\n")), "{}", ended.console);
    ended
}

/// Looks at the machine, and computes.
const LOOK_AROUND: &str = r#"
echo -- uname; uname -srm
echo -- cpus; nproc; grep -c ^processor /proc/cpuinfo
echo -- flags; sed -n 's/^flags.*: //p' /proc/cpuinfo
echo -- awk; awk 'BEGIN { for (i = 1; i <= 100000; i++) s += i * i; printf "%.0f %.9f\n", s, s / 7e9 }'
echo -- md5; seq 1 20000 | md5sum
echo -- sha256; sha256sum < /bin/busybox
echo -- gzip; seq 1 30000 | gzip | gzip -d | md5sum
echo -- clock; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
echo -- warnings; dmesg -r | grep -E '^<[0-4]>|BUG|WARNING|unstable|[Ff]irmware [Bb]ug|Call Trace'
echo -- end
"#;

fn looks_around(cpus: usize) {
    let Some(files) = guest() else { return };
    let cpus = cpus.to_string();
    let ended = run_script(&["--cpus", &cpus], LOOK_AROUND);
    assert_eq!(ended.section("uname"), [format!("Linux {} x86_64", files.release)]);
    assert_eq!(ended.section("cpus"), [&cpus, &cpus]);
    let flags = ended.section("flags");
    assert_eq!(flags.len().to_string(), cpus);
    for line in flags {
        check_flags(line);
    }
    assert_eq!(ended.section("awk"), ["333338333350000 47619.761907143"]);
    assert_eq!(ended.section("md5"), ["e071f707df7bbeee2a6a1eb48011ddd0  -"]);
    let sum = Command::new("sha256sum").arg(&files.busybox).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert_eq!(ended.section("sha256")[0].get(..64), sum.get(..64));
    assert_eq!(ended.section("gzip"), ["0a61f0919f546ce04fc119b028b88a2e  -"]);
    assert_eq!(ended.section("clock"), ["tsc"]);
    assert!(ended.section("warnings").is_empty(), "{:#?}", ended.section("warnings"));
}

/// The guest's CPU has what every CPU has here, and of the rest what the host has.
fn check_flags(line: &str) {
    let flags: Vec<_> = line.split(' ').collect();
    for flag in
        "fpu tsc msr pae cx8 apic sse2 syscall nx pdpe1gb rdtscp lm pni ssse3 cx16 sse4_1 sse4_2 pcid \
                 x2apic tsc_deadline_timer hypervisor fsgsbase smep smap umip"
            .split(' ')
    {
        assert!(flags.contains(&flag), "{flag} is missing: {line}");
    }
    let host = fs::read_to_string("/proc/cpuinfo").unwrap();
    let host: Vec<_> = host.lines().find(|line| line.starts_with("flags")).unwrap().split(' ').collect();
    for flag in
        "avx avx2 bmi1 bmi2 fma f16c movbe abm popcnt aes pclmulqdq sha_ni xsave xsaveopt rdrand".split(' ')
    {
        assert_eq!(flags.contains(&flag), host.contains(&flag), "{flag}: {line}");
    }
}

#[test]
fn linux_computes_on_one_cpu() {
    looks_around(1);
}

#[test]
fn linux_computes_on_two_cpus() {
    looks_around(2);
}

#[test]
fn a_bzimage_given_by_path_boots() {
    let Some(files) = guest() else { return };
    let cmdline = format!("console=ttyS0 panic=-1 quiet {}", run_argument("cat /proc/cmdline"));
    let words = ["--kernel", word(&files.kernel), "--initrd", word(&files.initrd), "--cmdline", &cmdline];
    let ended = Machine::start(&words).end().with_code(0);
    assert!(ended.console.contains(&cmdline), "{}", ended.console);
}

#[test]
fn the_shell_takes_what_is_typed_and_reboots() {
    let Some(_) = guest() else { return };
    let mut machine = Machine::start(&["--cmdline", "quiet"]);
    machine.expect("poweroff ends the virtual machine.");
    machine.expect("# ");
    machine.type_in("echo $((6 * 7)) answers; sleep 100 & jobs\n");
    machine.expect("42 answers");
    machine.expect("Running");
    machine.type_in("reboot\n");
    machine.expect("poweroff ends the virtual machine.");
    machine.expect("# ");
    machine.type_in("jobs; poweroff\n");
    machine.end().with_code(0);
}

#[test]
fn an_interrupt_ends_the_machine() {
    let Some(_) = guest() else { return };
    let mut machine = Machine::start(&["--cmdline", "quiet"]);
    machine.expect("# ");
    machine.interrupt();
    let ended = machine.end().with_code(1);
    assert!(ended.messages.contains("ended by SIGINT"), "{}", ended.messages);
}

#[test]
fn a_panic_of_the_guest_has_its_exit_code() {
    let Some(_) = guest() else { return };
    let ended = Machine::start(&["--cmdline", "rdinit=/no/such/init root=/dev/none"]).end().with_code(4);
    assert!(ended.console.contains("Kernel panic - not syncing"), "{}", ended.console);
    assert!(ended.messages.contains("the guest panicked: "), "{}", ended.messages);
}
