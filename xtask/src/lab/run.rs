//! One run of the lab: QEMU, and what the cases print.

use std::io::Write;
use std::process::{ChildStdin, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use ruse_guest::{EXIT_MARK, run_argument};

use super::Options;
use super::image::Image;
use crate::bench::{QEMU, qemu_version};
use crate::running::Running;

/// How a case ended.
pub struct Outcome {
    /// The case.
    pub name: String,
    /// Whether it did what it should.
    pub passed: bool,
    /// How long it took.
    pub seconds: f64,
    /// What it says of itself.
    pub says: String,
}

/// A case that runs.
struct Case {
    name: String,
    begun: f64,
    lines: Vec<String>,
    says: Vec<String>,
}

/// How often the lab is interrupted. VMRUN and #VMEXIT in QEMU change the word of pending interrupts without a lock, and one
/// that comes at that moment is lost until the next one comes: if it was the timer's, the lab would stand still.
const INTERRUPTED: Duration = Duration::from_secs(2);

/// Runs the cases. A lab that hangs is started once more for those that are left.
pub fn run(image: &Image, cases: &[&str], options: &Options) -> Result<Vec<Outcome>> {
    let mut outcomes = Vec::new();
    let Err(hang) = run_once(image, cases, options, &mut outcomes) else { return Ok(outcomes) };
    let left = cases.get(outcomes.len()..).unwrap_or_default();
    eprintln!("the lab hangs, and is started once more for {}: {hang:#}", left.join(", "));
    run_once(image, left, options, &mut outcomes)?;
    Ok(outcomes)
}

/// Runs cases until they have all ended, in their order.
fn run_once(image: &Image, cases: &[&str], options: &Options, outcomes: &mut Vec<Outcome>) -> Result<()> {
    let script = format!("exec sh /lab/cases {}", cases.join(" "));
    let mut lab = start(image, &script, options.timeout, options.verbose)?;
    let mut case: Option<Case> = None;
    let mut ended = false;
    while let Some((at, line)) = lab.next_line()? {
        if options.verbose {
            println!("{at:8.2} {line}");
        }
        if let Some((_, name)) = line.split_once("LAB-BEGIN ") {
            lab.allow(options.timeout);
            eprintln!("{at:8.1} s: {name}");
            case = Some(Case { name: name.into(), begun: at, lines: Vec::new(), says: Vec::new() });
        } else if let Some((_, status)) = line.split_once("LAB-END ") {
            lab.allow(options.timeout);
            let case = case.take().context("a case ends that has not begun")?;
            outcomes.push(case.end(at, status == "0", options));
        } else if let Some(case) = &mut case {
            case.hear(at, line);
        } else {
            ended |= line.contains(EXIT_MARK);
        }
    }
    ensure!(ended, "the lab did not come to its end:\n{}", lab.last_lines());
    Ok(())
}

/// How many CPUs a version of QEMU emulates well. Before 8.1, code that one CPU writes while another translates it may stay
/// there as it was: when Linux rewrites a branch (its scheduler has one for KVM's first and last machine), that CPU then meets
/// the breakpoint that stood there in between for ever.
fn cpus(version: &str) -> &'static str {
    const MANY: (u32, u32) = (8, 1);
    let words = version.split_once("version ").map(|(_, words)| words).unwrap_or_default();
    let mut numbers = words.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    let known = numbers.next().zip(numbers.next());
    if known.is_some_and(|version| version >= MANY) { "2" } else { "1" }
}

/// Starts the lab, which runs a script and has so many seconds.
pub fn start(image: &Image, script: &str, timeout: u64, verbose: bool) -> Result<Running> {
    let mut command = command(image, &format!("stty -echo < /dev/console; {script}"));
    // It complains of each feature of the CPU that it does not emulate.
    command.stderr(if verbose { Stdio::inherit() } else { Stdio::null() });
    let mut lab = Running::start_reading(Stdio::piped(), command, timeout)?;
    let keys = lab.input().context("the lab has no input")?;
    thread::spawn(|| interrupt(keys));
    Ok(lab)
}

/// Types lines that nobody reads, until the lab has ended.
fn interrupt(mut keys: ChildStdin) {
    while keys.write_all(b"\n").is_ok() {
        thread::sleep(INTERRUPTED);
    }
}

/// The emulated machine, which runs a script: a CPU with AMD-V and nested paging.
fn command(image: &Image, script: &str) -> Command {
    let mut command = Command::new(QEMU);
    command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "EPYC,+svm,+npt"]);
    command.args(["-smp", cpus(&qemu_version()), "-m", "2048"]);
    command.args(["-nodefaults", "-no-user-config", "-display", "none"]);
    command.args(["-no-reboot", "-serial", "stdio"]).arg("-kernel").arg(&image.kernel);
    command.arg("-initrd").arg(&image.initrd);
    // All CPUs have one time-stamp counter, which their model does not say. A host that does not trust it
    // reads a device instead, and KVM's clock for guests wavers by milliseconds then.
    let words = format!("console=ttyS0 quiet panic=-1 tsc=reliable {}", run_argument(script));
    command.arg("-append").arg(words);
    command
}

impl Case {
    /// Takes a line that the case has printed.
    fn hear(&mut self, at: f64, line: String) {
        let after = at - self.begun;
        if line.contains("GUEST-UP") {
            let cpus = line.split_whitespace().find(|word| word.starts_with("cpus=")).unwrap_or("");
            self.says.push(format!("up after {after:.1} s, {cpus}"));
        } else if let Some(result) = line.strip_prefix("test result: ") {
            self.says.push(result.split("; 0 measured").next().unwrap_or(result).to_owned());
        } else if let Some((_, figure)) = line.split_once("FIGURE ") {
            self.says.push(figure.to_owned());
        }
        self.lines.push(line);
    }

    /// The case has ended. A kernel's boot has to get to a system with all its CPUs.
    fn end(self, at: f64, status_is_zero: bool, options: &Options) -> Outcome {
        let says = self.says.join("; ");
        let boots = super::BOOTS.contains(&&*self.name);
        let cpus = self.name.rsplit('-').next().unwrap_or_default();
        let passed = status_is_zero && (!boots || says.ends_with(&format!("cpus={cpus}")));
        if !passed && !options.verbose {
            eprintln!("{}", self.lines.join("\n"));
        }
        Outcome { name: self.name, passed, seconds: at - self.begun, says }
    }
}

#[cfg(test)]
mod tests {
    use super::cpus;

    #[test]
    fn old_emulators_get_one_cpu() {
        for (version, expected) in [
            ("QEMU emulator version 7.2.22 (Debian 1:7.2+dfsg-7+deb12u18)", "1"),
            ("QEMU emulator version 8.0.5", "1"),
            ("QEMU emulator version 8.1.0", "2"),
            ("QEMU emulator version 10.0.2 (Debian 1:10.0.2+ds-2+deb13u1)", "2"),
            ("", "1"),
        ] {
            assert_eq!(cpus(version), expected, "{version}");
        }
    }
}
