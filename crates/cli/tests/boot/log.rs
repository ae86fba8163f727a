//! What a Linux guest says of its machine: in its log, in /proc/cpuinfo, of mitigations. Nothing may be wrong there.

use crate::machine::Ended;

/// Prints the sections that [`check`] looks at.
pub const SCRIPT: &str = r"
echo -- log; dmesg -r
echo -- cpuinfo; cat /proc/cpuinfo
echo -- vulnerabilities; grep . /sys/devices/system/cpu/vulnerabilities/*
echo -- clock; cat /sys/devices/system/clocksource/clocksource0/current_clocksource
";

/// Lines at the level of warnings and above that are no warnings, and why.
const EXPECTED: &[(&str, &str)] = &[
    (" #", "the list of CPUs, begun at level 6, goes on at the default level as each of them comes up"),
    (
        "PCI: Fatal: No config space access function found",
        "a machine without PCI; with it, no device would be there",
    ),
    ("PCI: System does not support PCI", "the same"),
];

/// What hints at something wrong at any level.
const SUSPICIOUS: &[&str] = &[
    "irmware bug",
    "irmware Bug",
    "BUG",
    "WARNING",
    "Call Trace",
    "unchecked MSR",
    "nstable",
    "warp",
    "Vulnerable",
    "disabled by BIOS",
    "calibration",
];

/// Level of warnings (include/linux/kern_levels.h); lower ones are worse.
const WARNING: u32 = 4;

/// Fails the test if the guest found something wrong with its `cpus` processors.
pub fn check(ended: &Ended, cpus: u32) {
    check_log(&ended.section("log"));
    check_cpuinfo(&ended.section("cpuinfo"), cpus);
    check_mitigations(&ended.section("vulnerabilities"));
    assert_eq!(ended.section("clock"), ["tsc"]);
}

fn check_log(log: &[&str]) {
    assert!(log.len() > 100, "{log:#?}");
    let bad: Vec<_> = log.iter().filter(|line| is_bad(line)).collect();
    assert!(bad.is_empty(), "{bad:#?}");
    // Linux knows the counter's frequency and need not measure it; of the paravirtual interfaces it uses what there is.
    for text in ["tsc: Detected ", "kvm-clock: Using msrs 4b564d01 and 4b564d00", "x2apic enabled"] {
        assert!(log.iter().any(|line| line.contains(text)), "{text:?}: {log:#?}");
    }
}

/// Judges a line of `dmesg -r`: `<PRIORITY>[TIME] TEXT`.
fn is_bad(line: &str) -> bool {
    let parts = line.strip_prefix('<').and_then(|rest| rest.split_once('>'));
    let (priority, rest) = parts.unwrap_or_else(|| panic!("a line without a priority: {line}"));
    let level = priority.parse::<u32>().expect("priorities are numbers") & 7;
    let text = rest.split_once("] ").map_or(rest, |(_, text)| text);
    let expected = EXPECTED.iter().any(|(begin, _)| text.starts_with(begin));
    (level <= WARNING && !expected) || SUSPICIOUS.iter().any(|word| text.contains(word))
}

fn check_cpuinfo(cpuinfo: &[&str], cpus: u32) {
    let values = |name: &str| -> Vec<&str> {
        let fields = cpuinfo.iter().filter_map(|line| line.split_once(':'));
        fields.filter(|(field, _)| field.trim() == name).map(|(_, value)| value.trim()).collect()
    };
    assert_eq!(values("processor").len(), cpus as usize);
    assert!(values("model name").iter().all(|name| *name == "Ruse virtual CPU"), "{cpuinfo:#?}");
    let mhz: Vec<f64> = values("cpu MHz").iter().map(|mhz| mhz.parse().unwrap()).collect();
    assert!(mhz.iter().all(|mhz| (500.0..8000.0).contains(mhz)), "{mhz:?}");
    // Every CPU has these, and no more of them: what they cost is little.
    for bugs in values("bugs") {
        assert_eq!(bugs, "spectre_v1 spectre_v2 swapgs bhi");
    }
}

/// Guests need no mitigation that costs them time, and none that is missing.
fn check_mitigations(lines: &[&str]) {
    assert!(lines.len() > 5, "{lines:#?}");
    for line in lines {
        let (name, state) = line.split_once(':').unwrap();
        let name = name.rsplit('/').next().unwrap();
        match name {
            "spectre_v1" => assert!(state.starts_with("Mitigation: usercopy/swapgs barriers"), "{line}"),
            "spectre_v2" => {
                assert!(state.starts_with("Mitigation: Enhanced"), "{line}");
                assert!(state.contains("BHI: BHI_DIS_S"), "{line}");
            }
            _ => assert_eq!(state, "Not affected", "{line}"),
        }
    }
}
