//! `ruse doctor`: the host's report for people or as JSON.

use std::io::Write;

use anyhow::Context;
use ruse_vmm::config::format_size;
use ruse_vmm::doctor::HostReport;

use crate::failure::Failure;
use crate::options::DoctorOptions;
use crate::run::engine_name;

/// Prints the report.
pub fn doctor(options: &DoctorOptions) -> Result<u8, Failure> {
    let report = HostReport::collect();
    let text = if options.json {
        serde_json::to_string_pretty(&report).context("cannot write the report")?
    } else {
        describe(&report)
    };
    // A reader who has gone has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(0)
}

fn describe(report: &HostReport) -> String {
    let limit = |bytes: Option<u64>| bytes.map_or("unlimited".into(), format_size);
    let number = |n: Option<u64>| n.map_or("unlimited".into(), |n| n.to_string());
    let cpu = &report.cpu;
    let missing = if report.missing_features.is_empty() {
        "none that guests use".into()
    } else {
        report.missing_features.join(", ")
    };
    let lines = [
        ("CPU", format!("{} ({}), {} usable", cpu.model, cpu.vendor, cpu.count)),
        ("missing", missing),
        ("memory", format_size(report.memory)),
        ("KVM", report.kvm.describe()),
        (
            "generated code",
            match &report.executable_memory {
                Ok(()) => "executable memory can be made".into(),
                Err(error) => format!("executable memory cannot be made: {error}"),
            },
        ),
        (
            "direct execution",
            match &report.direct_execution {
                Ok(()) => "user code can run in processes of its own".into(),
                Err(error) => format!("user code is translated: {error}"),
            },
        ),
        ("address space", limit(report.limits.address_space)),
        ("locked memory", limit(report.limits.locked_memory)),
        ("open files", number(report.limits.open_files)),
        ("mappings", number(report.limits.mappings)),
        (
            "perf",
            match report.perf_event_paranoid {
                Some(level) => format!("perf_event_paranoid is {level}"),
                None => "not available".into(),
            },
        ),
        ("--accel auto", format!("{}: {}", engine_name(report.auto.engine), report.auto.reason)),
    ];
    lines.iter().map(|(name, value)| format!("{name:17} {value}\n")).collect()
}
