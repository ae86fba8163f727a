//! Accesses that may fault, and say so.

use std::arch::naked_asm;
use std::io;
use std::ptr::null_mut;

/// What became of an access.
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Access {
    /// The value read, or the address that the fault names.
    pub value: u64,
    /// Nothing, or `si_code` of the fault.
    pub fault: u64,
}

/// Catches the faults of [`read()`], [`write()`] and [`call()`], in this process and its children.
pub fn catch() {
    // SAFETY: a handler that only changes the context of these functions.
    unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_NODEFER;
        assert_eq!(
            libc::sigaction(libc::SIGSEGV, &raw const action, null_mut()),
            0,
            "{}",
            io::Error::last_os_error()
        );
    }
}

/// Reads eight bytes.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn read(_from: u64) -> Access {
    naked_asm!("mov rax, [rdi]", "xor edx, edx", "ret")
}

/// Writes eight bytes.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn write(_to: u64, _value: u64) -> Access {
    naked_asm!("mov [rdi], rsi", "mov rax, rsi", "xor edx, edx", "ret")
}

/// Calls a function that may not be executable.
#[unsafe(naked)]
pub unsafe extern "sysv64" fn call(_argument: u64, _function: u64) -> Access {
    naked_asm!("call rsi", "xor edx, edx", "ret")
}

/// Makes a function whose first instruction has faulted return. Where that is the one that [`call`] calls, `call` does.
extern "C" fn handler(_: i32, info: *const libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: what the kernel hands over is valid; the stack pointer is that of a function which has just been called.
    unsafe {
        let registers = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs;
        let [rip, rsi] = [libc::REG_RIP, libc::REG_RSI].map(|r| registers[r as usize]);
        let rsp = &mut registers[libc::REG_RSP as usize];
        if rip == rsi {
            *rsp += 8;
        } else if rip != read as *const () as i64 && rip != write as *const () as i64 {
            libc::_exit(102);
        }
        let to = *(*rsp as *const i64);
        *rsp += 8;
        registers[libc::REG_RIP as usize] = to;
        registers[libc::REG_RAX as usize] = (*info).si_addr() as i64;
        registers[libc::REG_RDX as usize] = i64::from((*info).si_code);
    }
}
