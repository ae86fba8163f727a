//! Filters of system calls (seccomp, in the kernel's packet filter language).

use crate::stub::{STOP, Stub};

/// An instruction (`struct sock_filter`), as bytes.
type Instruction = [u8; 8];

const LOAD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
const RETURN: u16 = 0x06; // BPF_RET | BPF_K

/// Offsets in `struct seccomp_data`.
const NUMBER: u32 = 0;
const ARCHITECTURE: u32 = 4;
const POINTER: u32 = 8;

/// The value of `architecture` for 64-bit code.
pub const X86_64: u32 = 0xc000_003e;

#[derive(Default)]
struct Filter {
    code: Vec<Instruction>,
}

impl Filter {
    fn push(&mut self, op: u16, yes: u8, no: u8, value: u32) {
        let [a, b] = op.to_le_bytes();
        let [c, d, e, f] = value.to_le_bytes();
        self.code.push([a, b, yes, no, c, d, e, f]);
    }

    /// Answers `answer` to a system call made right before an address; others go on behind.
    fn at(&mut self, number: u32, from: u64, answer: u32) {
        let conditions = [
            (NUMBER, number),
            (ARCHITECTURE, X86_64),
            (POINTER, from as u32),
            (POINTER + 4, (from >> 32) as u32),
        ];
        for (i, (offset, value)) in conditions.into_iter().enumerate() {
            self.push(LOAD, 0, 0, offset);
            self.push(JUMP_EQUAL, 0, 7 - 2 * i as u8, value);
        }
        self.push(RETURN, 0, 0, answer);
    }

    fn end(mut self, answer: u32) -> Vec<u8> {
        self.push(RETURN, 0, 0, answer);
        self.code.concat()
    }
}

/// Tells the monitor of the stub's stop and allows everything else: for both threads.
pub fn for_stops(stub: Stub) -> Vec<u8> {
    let mut filter = Filter::default();
    filter.at(STOP, stub.stop(), libc::SECCOMP_RET_USER_NOTIF);
    filter.end(libc::SECCOMP_RET_ALLOW)
}

/// For the thread of user code: allows what the stub's handler does, from where it does it. Everything else is a trap.
pub fn for_user_code(stub: Stub) -> Vec<u8> {
    let mut filter = Filter::default();
    filter.at(STOP, stub.stop(), libc::SECCOMP_RET_ALLOW);
    filter.at(libc::SYS_rt_sigreturn as u32, stub.sigreturn(), libc::SECCOMP_RET_ALLOW);
    filter.end(libc::SECCOMP_RET_TRAP)
}
