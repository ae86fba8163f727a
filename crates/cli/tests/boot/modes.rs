//! What small guests find in the modes of 16 and 32 bits is what a CPU gives.

use crate::bare::{Bare, image};

#[track_caller]
fn check(image: &[u8], code: i32, transcript: &str) {
    let ended = Bare::flat(image).run(&[]).with_code(code);
    assert_eq!(ended.console, transcript);
}

#[test]
fn real_mode_has_interrupts_a_timer_faults_and_limits() {
    let transcript = "\
real mode
ticks 0000000a
division fault at + 00000000
service 00011234
high memory 1badb002
limit fault at + 00000000
unreal 1badb002
";
    let image = image!(guest_real_mode, guest_real_mode_end);
    check(image, 33, transcript);
    let ended = Bare::elf32(image).run(&["--tier", "0"]).with_code(33);
    assert_eq!(ended.console, transcript);
}

#[test]
fn protected_mode_checks_segments_pages_and_rings() {
    let transcript = "\
segments
  fault 0000000d 00000000
  fault 0000000d 00000000
  fault 0000000d 00000000
  fault 0000000b 00000030
  fault 0000000d 00000058
  fault 0000000d 00000018
  fault 0000000d 00000000
  fault 00000006 00000000
  fault 00000000 00000000
pages
large page 1badb002
  fault 0000000e 00000000 00300004
  fault 0000000e 00000002 00300008
late page 12345678
  fault 0000000e 00000003 00302000
entry 00302065
entry 00303003
entry 000000a3
ring 3
called with 0000003b
from 0000003b
whose SS is 00000043
  fault 0000000d 00000000
  fault 0000000d 00000000
  fault 0000000d 00000000
  fault 0000000d 00000000
  fault 0000000d 0000010a
  fault 0000000e 00000005 00303000
  fault 0000000e 00000007 00302000
  fault 0000000e 00000004 00300000
  fault 0000000d 00000010
called with 00000077
from 0000003b
whose SS is 00000043
back with ESP 0017ffec
";
    check(image!(guest_protected_mode, guest_protected_mode_end), 35, transcript);
}

#[test]
fn paging_of_three_levels_has_pages_that_are_not_executable() {
    let transcript = "\
paging with 64-bit entries
second GiB 1badb002
  page fault 00000011 at 00170000
  page fault 00000011 at 40172000
  page fault 00000009 at 00171000
  page fault 00000000 at 80000000
second GiB 1badb002
  page fault 00000000 at 40100000
  general protection 00000000
entry 002000e3
entry 00171003
entry 00172023
";
    check(image!(guest_pae, guest_pae_end), 37, transcript);
}

#[test]
fn tasks_are_switched_by_calls_jumps_returns_and_gates() {
    let transcript = "\
tasks
second, back link 00000018
second, NT 00004000
first, type 0000008b
first, own EBX 00001111
first, CR0.TS 00000008
second again, EBX 00002222
second, type 00000089
third, first's type 00000089
first again
fourth, back link 00000018
fourth, EAX of the first 00000007
first, NT 00000000
trap, DR6 00008000
fourth again
general protection 00000018
double fault, error 00000000
ESP of the first 12345678
its EIP, + 00000000
";
    check(image!(guest_tasks, guest_tasks_end), 39, transcript);
}

#[test]
fn virtual_8086_mode_leaves_what_it_may_not_do_to_a_monitor() {
    let transcript = "\
virtual-8086 mode
hello from the 8086
IF 00000200
IF 00000000
INT 21h 0000edcb
carry 00000001
port 21h 000000aa
trapped 00000008
with IOPL 3
flags 00003046
gate, DS 00000000
gate, VM and IOPL 00023000
CR0.PE 00000001
trapped 00000009
";
    check(image!(guest_virtual_8086, guest_virtual_8086_end), 0, transcript);
}

#[test]
fn multiboot_kernels_are_told_of_memory_command_line_and_modules() {
    let image = image!(guest_multiboot, guest_multiboot_end);
    for bare in [Bare::flat(image), Bare::elf32(image)] {
        let modules = [bare.file("one", "abcdefg"), bare.file("two", "xyz") + " a b"].join(",");
        let ended = bare.run(&["--cmdline", "some  words", "--initrd", &modules]).with_code(41);
        let (kernel, (one, two)) = (bare.kernel(), modules.split_once(',').unwrap());
        let transcript = format!(
            "\
EAX 2badb002
command line: {kernel} some  words
KiB from 1 MiB on 00003c00
base 00000000
  length 0009fc00
  type 00000001
base 0009fc00
  length 00060400
  type 00000002
base 00100000
  length 00f00000
  type 00000001
base e0000000
  length 10000000
  type 00000002
module {one}
  bytes 00000007
  first 64636261
module {two}
  bytes 00000003
  first 007a7978
"
        );
        assert_eq!(ended.console, transcript);
    }
}

#[test]
fn counters_are_written_and_printed_at_the_end() {
    let bare = Bare::flat(image!(guest_real_mode, guest_real_mode_end));
    let file = bare.file("stats", "");
    let ended = bare.run(&["-v", "--stats", &file]).with_code(33);
    let stats: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let count = |path: &str| stats.pointer(path).and_then(|count| count.as_u64()).unwrap();
    let executed = count("/counters/tier0");
    assert!(executed > 100 && count("/counters/tier0.out") > 10, "{stats}");
    assert_eq!(count("/vcpus/0/counters/tier0"), executed);
    assert!(ended.messages.contains(&format!("  tier0: {executed}\n")), "{}", ended.messages);
}

#[test]
fn a_triple_fault_has_its_exit_code_and_shows_the_state() {
    let bare = Bare::flat(image!(guest_triple_fault, guest_triple_fault_end));
    for tier in ["0", "1"] {
        let ended = bare.run(&["--tier", tier]).with_code(3);
        for part in [
            "ruse: vCPU 0 made a triple fault; its state:\n",
            "RIP 0000000000100031",
            "RAX 00000000deadbeef",
            "CR0 0000000000000011",
            "IDT       base 0000000000000000  limit 00000000",
            "code at RIP: 0f 0b 00",
        ] {
            assert!(ended.messages.contains(part), "{part} in\n{}", ended.messages);
        }
    }
}
