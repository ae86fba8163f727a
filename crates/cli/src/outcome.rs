//! How a machine ended, as a message and an exit code.

use ruse_vmm::{CpuDump, Outcome};

use crate::failure::{FAILED, GUEST_PANIC, TRIPLE_FAULT, complain};

/// Says on standard error what there is to say and gives the exit code. `signal` is the signal that ended the machine.
pub fn finish(outcome: &Outcome, signal: Option<&str>) -> u8 {
    match outcome {
        Outcome::PowerOff => 0,
        Outcome::DebugExit(code) => *code,
        Outcome::Stopped => match signal {
            Some(name) => {
                complain(&format!("ended by {name}"));
                FAILED
            }
            None => 0,
        },
        Outcome::TripleFault { vcpu, dump } => {
            complain(&format!("vCPU {vcpu} made a triple fault; its state:"));
            show(dump);
            TRIPLE_FAULT
        }
        Outcome::GuestPanic { message, vcpu, dump } => {
            complain(&format!("the guest panicked: {message}"));
            if let Some(dump) = dump {
                complain(&format!("the state of vCPU {vcpu} then:"));
                show(dump);
            }
            GUEST_PANIC
        }
        Outcome::Failed { what, vcpu } => {
            match vcpu {
                Some(vcpu) => complain(&format!("vCPU {vcpu}: {what}")),
                None => complain(what),
            }
            FAILED
        }
    }
}

fn show(dump: &CpuDump) {
    use std::io::Write;
    let _ = writeln!(std::io::stderr(), "{dump}");
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn outcomes_have_codes() {
        let dump = CpuDump { state: Default::default(), code: vec![0x90] };
        assert_eq!(finish(&Outcome::PowerOff, None), 0);
        assert_eq!(finish(&Outcome::DebugExit(33), None), 33);
        assert_eq!(finish(&Outcome::Stopped, None), 0);
        assert_eq!(finish(&Outcome::Stopped, Some("SIGTERM")), 1);
        assert_eq!(finish(&Outcome::TripleFault { vcpu: 1, dump: Box::new(dump) }, None), 3);
        assert_eq!(finish(&Outcome::GuestPanic { message: "x".into(), vcpu: 0, dump: None }, None), 4);
        assert_eq!(finish(&Outcome::Failed { what: "x".into(), vcpu: None }, None), 1);
    }
}
