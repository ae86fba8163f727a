//! `ruse disk check`.

use std::io::Write;

use anyhow::Context;
use ruse_block::{CheckReport, OpenOptions, Repair};

use super::{CheckArgs, RepairName, failed};
use crate::failure::{FAILED, Failure};

/// Looks for damage; what is left of it gives the exit code.
pub fn check(args: &CheckArgs) -> Result<u8, Failure> {
    let repair = match args.repair {
        None => Repair::Nothing,
        Some(RepairName::Leaks) => Repair::Leaks,
        Some(RepairName::All) => Repair::All,
    };
    let options = OpenOptions {
        format: args.format,
        read_only: repair == Repair::Nothing,
        for_repair: true,
        // What is behind it is another matter, and may be in use.
        alone: true,
    };
    let image = ruse_block::open(&args.path, &options)?;
    let format = image.info().map_err(failed(&args.path))?.format;
    let report = image.check(repair).map_err(failed(&args.path))?;
    let Some(report) = report else {
        return Err(Failure::input(format!("{format} images say nothing twice that could be compared")));
    };
    let text = match args.json {
        true => serde_json::to_string_pretty(&report).context("cannot write as JSON")?,
        false => describe(&report),
    };
    // A reader who has gone has seen enough.
    let _ = writeln!(std::io::stdout(), "{}", text.trim_end());
    Ok(if report.is_clean() { 0 } else { FAILED })
}

fn describe(report: &CheckReport) -> String {
    let mut text: String = report.errors.iter().map(|error| format!("{error}\n")).collect();
    let unsaid = report.error_count - report.errors.len() as u64;
    if unsaid > 0 {
        text += &format!("and {unsaid} more\n");
    }
    if report.error_count > 0 {
        text += &format!("errors: {}, of which {} were mended\n", report.error_count, report.repaired_errors);
    }
    if report.leaks > 0 {
        text += &format!(
            "clusters that nobody uses: {}, of which {} were freed\n",
            report.leaks, report.repaired_leaks
        );
    }
    if text.is_empty() {
        text += "nothing is wrong\n";
    }
    text + &format!("{} of {} clusters are in the image\n", report.allocated_clusters, report.total_clusters)
}
