//! Debian's kernels with the default guest's userland.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use ruse_guest::{DefaultGuest, EXIT_MARK, GuestError, GuestFiles, Silent, run_argument};

use crate::log;
use crate::machine::{Ended, Machine, word};
use crate::vmlinux;

/// The default guest. Where it cannot be fetched, the test says so and is left out.
pub fn guest() -> Option<GuestFiles> {
    prepare(DefaultGuest::new())
}

/// The default guest with Debian's full kernel, of which 70 MB are fetched.
pub fn full_guest() -> Option<GuestFiles> {
    let dir = Path::new(env!("CARGO_TARGET_TMPDIR")).join("full-kernel");
    prepare(Ok(DefaultGuest::in_dir(dir).with_kernel(&["linux-image-amd64", "linux-image-generic"])))
}

fn prepare(guest: Result<DefaultGuest, GuestError>) -> Option<GuestFiles> {
    match guest.and_then(|guest| guest.prepare(&mut Silent)) {
        Ok(files) => Some(files),
        Err(error) => {
            println!("skipped, there is no guest: {error}");
            None
        }
    }
}

/// Runs a script under a kernel, which powers off after it.
pub fn run_script(kernel: &Path, files: &GuestFiles, options: &[&str], cmdline: &str, script: &str) -> Ended {
    let cmdline = format!("console=ttyS0 panic=-1 quiet {cmdline} {}", run_argument(script));
    let words = ["--kernel", word(kernel), "--initrd", word(&files.initrd), "--cmdline", &cmdline];
    let ended = Machine::start(&[&words, options].concat()).end().with_code(0);
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
"#;

fn looks_around(kernel: &Path, files: &GuestFiles, cpus: &str, count: u32) {
    let script = format!("{LOOK_AROUND}{}echo -- end\n", log::SCRIPT);
    let ended = run_script(kernel, files, &["--cpus", cpus], "", &script);
    assert_eq!(ended.section("uname"), [format!("Linux {} x86_64", files.release)]);
    assert_eq!(ended.section("cpus"), [count.to_string(), count.to_string()]);
    let flags = ended.section("flags");
    assert_eq!(flags.len() as u32, count);
    for line in flags {
        check_flags(line);
    }
    assert_eq!(ended.section("awk"), ["333338333350000 47619.761907143"]);
    assert_eq!(ended.section("md5"), ["e071f707df7bbeee2a6a1eb48011ddd0  -"]);
    let sum = Command::new("sha256sum").arg(&files.busybox).output().unwrap();
    let sum = String::from_utf8(sum.stdout).unwrap();
    assert_eq!(ended.section("sha256")[0].get(..64), sum.get(..64));
    assert_eq!(ended.section("gzip"), ["0a61f0919f546ce04fc119b028b88a2e  -"]);
    log::check(&ended, count);
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
    let Some(files) = guest() else { return };
    looks_around(&files.kernel, &files, "1", 1);
}

#[test]
fn linux_computes_on_two_cpus() {
    let Some(files) = guest() else { return };
    looks_around(&files.kernel, &files, "2", 2);
}

#[test]
fn the_elf_file_in_a_bzimage_boots_on_two_sockets() {
    let Some(files) = guest() else { return };
    let Some((_dir, kernel)) = elf_kernel(&files) else { return };
    looks_around(&kernel, &files, "sockets=2,cores=2", 4);
}

#[test]
fn debians_full_kernel_boots() {
    let Some(files) = full_guest() else { return };
    looks_around(&files.kernel, &files, "2", 2);
}

/// The uncompressed kernel in a file.
fn elf_kernel(files: &GuestFiles) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let elf = vmlinux::extract(&fs::read(&files.kernel).unwrap())?;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("vmlinux");
    fs::write(&path, elf).unwrap();
    Some((dir, path))
}

/// Tier 0 is slow, and what takes it most of a boot leads to nothing that a shell needs: tests of cryptography,
/// certificates, names for tracing. Nor does the kernel decompress itself here.
const WITHOUT_LONG_STEPS: &str = "cryptomgr.notests initcall_blacklist=\
    load_system_certificate_list,init_kprobe_trace,trace_eval_init,tracer_init_tracefs";

#[test]
fn linux_boots_without_translation() {
    let Some(files) = guest() else { return };
    let Some((_dir, kernel)) = elf_kernel(&files) else { return };
    let script = "echo -- md5; seq 1 1000 | md5sum; echo -- end";
    let ended = run_script(&kernel, &files, &["--tier", "0"], WITHOUT_LONG_STEPS, script);
    assert_eq!(ended.section("md5"), ["53d025127ae99ab79e8502aae2d9bea6  -"]);
}

/// What a KVM that emulates kernel code does without (docs/testing.md), beside the long steps.
const FOR_SLOW_KVM: &str = "noxsave clearcpuid=cx16,smap nokaslr mitigations=off nowatchdog";

#[test]
#[ignore = "takes up to ten minutes where KVM emulates kernel code"]
fn linux_boots_under_the_hosts_kvm() {
    let Some(files) = guest() else { return };
    let Some((_dir, kernel)) = elf_kernel(&files) else { return };
    let script = run_argument("echo -- md5; seq 1 1000 | md5sum; echo -- end");
    let cmdline =
        format!("console=ttyS0 panic=-1 {FOR_SLOW_KVM} {WITHOUT_LONG_STEPS},blake2s_mod_init {script}");
    let files = ["--kernel", word(&kernel), "--initrd", word(&files.initrd), "--cmdline", &cmdline];
    let mut machine = Machine::start(&[&["--accel", "kvm"][..], &files].concat());
    // Each is a minute or two after the one before.
    for step in ["Memory: ", "PCI: Using configuration", "Freeing initrd memory", "Run /init", "-- md5"] {
        machine.expect(step);
    }
    let ended = machine.end().with_code(0);
    assert_eq!(ended.section("md5"), ["53d025127ae99ab79e8502aae2d9bea6  -"]);
}

#[test]
fn the_default_guest_takes_more_words_for_its_command_line() {
    let Some(_) = guest() else { return };
    let words = format!("quiet {}", run_argument("echo -- words; cat /proc/cmdline; echo -- end"));
    let ended = Machine::start(&["--cmdline", &words]).end().with_code(0);
    assert_eq!(ended.section("words"), [format!("console=ttyS0 panic=-1 {words}")]);
}

/// Boots the default guest to its shell on a terminal.
fn start_shell(options: &[&str]) -> Machine {
    let mut machine = Machine::on_terminal(&[&["--cmdline", "quiet"], options].concat());
    expect_shell(&mut machine);
    machine
}

/// Waits for the default guest's shell.
pub fn expect_shell(machine: &mut Machine) {
    machine.expect("poweroff ends the virtual machine.");
    machine.expect("# ");
}

#[test]
fn the_shell_takes_what_is_typed_and_reboots() {
    let Some(_) = guest() else { return };
    let mut machine = start_shell(&[]);
    machine.type_in("echo $((6 * 7)) answers; sleep 100 & jobs\n");
    machine.expect("42 answers");
    machine.expect("Running");
    machine.type_in("reboot\n");
    expect_shell(&mut machine);
    machine.type_in("jobs; poweroff\n");
    machine.end().with_code(0);
}

/// Tells when it begins, when it goes on and when it is interrupted. The backslashes keep the echo of the line from
/// looking like its output.
const JOB: &str = r#"sh -c 'trap "echo go\es on" CONT; trap "echo int\errupted; exit 7" INT; echo be\gins
while :; do sleep 0.1; done'
"#;

#[test]
fn the_shell_has_job_control() {
    let Some(_) = guest() else { return };
    let mut machine = start_shell(&[]);
    machine.type_in(JOB);
    machine.expect("begins");
    machine.type_in("\x1a");
    machine.expect("Stopped");
    machine.expect("# ");
    machine.type_in("jobs\n");
    machine.expect("Stopped");
    machine.expect("# ");
    machine.type_in("fg\n");
    machine.expect("goes on");
    machine.type_in("\x03");
    machine.expect("interrupted");
    machine.type_in("echo status $?\n");
    machine.expect("status 7");
    machine.type_in("poweroff\n");
    machine.end().with_code(0);
}

/// An idle guest with ticks that stop uses next to nothing of the host.
#[test]
fn an_idle_guest_leaves_the_host_alone() {
    const TIME: Duration = Duration::from_secs(5);
    let Some(_) = guest() else { return };
    let machine = start_shell(&["--cpus", "2"]);
    let mut shares = Vec::new();
    // A guest may still have something to do after its boot, and hosts are noisy.
    while shares.len() < 5 && shares.last().is_none_or(|share| *share >= 0.03) {
        let (used, start) = (machine.cpu_time(), Instant::now());
        thread::sleep(TIME);
        shares.push((machine.cpu_time() - used).as_secs_f64() / start.elapsed().as_secs_f64());
    }
    println!("shares of one core: {shares:?}");
    assert!(*shares.last().unwrap() < 0.03, "{shares:?}");
}

#[test]
fn an_interrupt_ends_the_machine() {
    let Some(_) = guest() else { return };
    let machine = start_shell(&[]);
    machine.signal("INT");
    let ended = machine.end().with_code(1);
    assert!(ended.messages.contains("ended by SIGINT"), "{}", ended.messages);
}

#[test]
fn a_guest_that_would_stand_still_after_its_panic_is_ended() {
    let Some(files) = guest() else { return };
    let cmdline = format!("console=ttyS0 panic=0 {}", run_argument("echo c > /proc/sysrq-trigger"));
    let kernel = ["--kernel", word(&files.kernel), "--initrd", word(&files.initrd), "--cmdline", &cmdline];
    let ended = Machine::start(&[&kernel[..], &["--cpus", "2"]].concat()).end().with_code(4);
    for text in
        ["the guest panicked: Kernel panic - not syncing: sysrq triggered crash", "the state of vCPU "]
    {
        assert!(ended.messages.contains(text), "{}", ended.messages);
    }
}

#[test]
fn a_panic_of_the_guest_has_its_exit_code() {
    let Some(_) = guest() else { return };
    let words = ["--cmdline", "rdinit=/no/such/init root=/dev/none"];
    let ended = Machine::on_terminal(&words).end().with_code(4);
    assert!(ended.console.contains("Kernel panic - not syncing"), "{}", ended.console);
    for part in
        ["the guest panicked: Kernel panic - not syncing: ", "the state of vCPU 0", "CR0 ", "code at RIP"]
    {
        assert!(ended.messages.contains(part), "{part} in\n{}", ended.messages);
    }
}
