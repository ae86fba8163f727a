//! Host faults in generated code: a guest instruction that runs as itself may fault as itself (division, alignment,
//! unmasked floating-point exceptions). The handler leads to a way out of generated code; tier 0 then executes the
//! instruction and raises what the guest must see.

use std::{
    cell::Cell,
    mem::MaybeUninit,
    sync::{Once, OnceLock},
};

/// Signals that a host instruction can raise.
const SIGNALS: [libc::c_int; 4] = [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL];

/// Generated code of the thread's vCPU and its way out.
#[derive(Clone, Copy, Default)]
struct Region {
    start: u64,
    end: u64,
    exit: u64,
}

thread_local! {
    static REGION: Cell<Region> = const { Cell::new(Region { start: 0, end: 0, exit: 0 }) };
    static STACK: SignalStack = SignalStack::new();
}

/// What was installed before, by signal.
static PREVIOUS: OnceLock<[libc::sigaction; 4]> = OnceLock::new();

/// Says where this thread's generated code lies, and where it leaves after a host fault.
pub fn arm(code: &std::ops::Range<u64>, exit: u64) {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(install);
    STACK.with(|_| {});
    REGION.set(Region { start: code.start, end: code.end, exit });
}

fn install() {
    let previous = SIGNALS.map(|signal| {
        let mut action: libc::sigaction = zeroed_action();
        action.sa_sigaction = handle as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        let mut old = zeroed_action();
        // SAFETY: both structures are valid; the handler has the signature that SA_SIGINFO asks for.
        unsafe { libc::sigaction(signal, &action, &mut old) };
        old
    });
    let _ = PREVIOUS.set(previous);
}

fn zeroed_action() -> libc::sigaction {
    // SAFETY: a plain C structure for which zeroes are valid.
    unsafe { MaybeUninit::zeroed().assume_init() }
}

/// An alternate signal stack: the handler must not depend on the state of the interrupted one.
struct SignalStack {
    memory: Box<[u8]>,
}

impl SignalStack {
    const SIZE: usize = 64 << 10;

    fn new() -> Self {
        let mut memory = vec![0u8; Self::SIZE].into_boxed_slice();
        let stack = libc::stack_t { ss_sp: memory.as_mut_ptr().cast(), ss_flags: 0, ss_size: Self::SIZE };
        // SAFETY: the memory stays where it is until `drop` disables the stack.
        unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
        Self { memory }
    }
}

impl Drop for SignalStack {
    fn drop(&mut self) {
        let stack = libc::stack_t {
            ss_sp: self.memory.as_mut_ptr().cast(),
            ss_flags: libc::SS_DISABLE,
            ss_size: Self::SIZE,
        };
        // SAFETY: disables the stack before its memory goes.
        unsafe { libc::sigaltstack(&stack, std::ptr::null_mut()) };
    }
}

/// The signal handler. Async-signal-safe: it reads a thread-local without destructor and changes the saved context.
extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: SA_SIGINFO passes a valid ucontext.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let region = REGION.get();
    let pc = registers[libc::REG_RIP as usize] as u64;
    // SAFETY: SA_SIGINFO passes a valid siginfo.
    let code = unsafe { (*info).si_code };
    if (region.start..region.end).contains(&pc) && is_the_instructions(signal, code) {
        registers[libc::REG_R14 as usize] = pc as i64;
        registers[libc::REG_RIP as usize] = region.exit as i64;
        return;
    }
    pass_on(signal, info, std::ptr::from_mut(context).cast());
}

/// Whether an instruction of the guest may have brought the signal about by itself. An address that the host has not mapped
/// is none that a probe has found: going on would let whoever made the access look for another.
fn is_the_instructions(signal: libc::c_int, code: libc::c_int) -> bool {
    /// A general-protection exception (arch/x86/kernel/traps.c of Linux).
    const SI_KERNEL: libc::c_int = 0x80;
    signal != libc::SIGSEGV || code == SI_KERNEL
}

/// Not ours: what was there before decides.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let index = SIGNALS.iter().position(|&s| s == signal);
    let previous = index.and_then(|i| PREVIOUS.get().map(|p| p[i]));
    match previous {
        Some(old) if old.sa_sigaction != libc::SIG_DFL && old.sa_sigaction != libc::SIG_IGN => {
            if old.sa_flags & libc::SA_SIGINFO != 0 {
                // SAFETY: installed with SA_SIGINFO, so it has this signature.
                let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) =
                    unsafe { std::mem::transmute(old.sa_sigaction) };
                handler(signal, info, context);
            } else {
                // SAFETY: installed without SA_SIGINFO, so it has this signature.
                let handler: extern "C" fn(libc::c_int) = unsafe { std::mem::transmute(old.sa_sigaction) };
                handler(signal);
            }
        }
        _ => {
            let default = zeroed_action();
            // SAFETY: back to the default action; returning repeats the fault, which ends the process.
            unsafe { libc::sigaction(signal, &default, std::ptr::null_mut()) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::code_memory::CodeMemory;

    /// How a process ends that executes `code` as generated code: with exit code 7 if the way out was taken.
    fn end_of(code: &[u8]) -> libc::c_int {
        let mut memory = CodeMemory::new(4096).unwrap();
        // mov edi, 7; mov eax, 231 (exit_group); syscall
        let exit = memory.push(&[0xbf, 7, 0, 0, 0, 0xb8, 231, 0, 0, 0, 0x0f, 0x05], 16).unwrap();
        let start = memory.push(code, 16).unwrap();
        arm(&(start as u64..start as u64 + code.len() as u64), exit as u64);
        // SAFETY: the child executes nothing but the code above and the signal handler.
        let child = unsafe { libc::fork() };
        if child == 0 {
            // SAFETY: the code ends the process one way or the other.
            unsafe { std::mem::transmute::<*const u8, extern "C" fn()>(start)() };
        }
        let mut status = 0;
        // SAFETY: our own child, which is waited for once.
        unsafe { libc::waitpid(child, &mut status, 0) };
        status
    }

    #[test]
    fn what_an_instruction_raises_itself_leads_out_of_generated_code() {
        // xor ecx, ecx; div ecx
        let division = end_of(&[0x31, 0xc9, 0xf7, 0xf1]);
        // mov rax, 1 << 63; mov al, [rax]
        let no_address = end_of(&[0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0x80, 0x8a, 0x00]);
        for status in [division, no_address] {
            assert!(libc::WIFEXITED(status) && libc::WEXITSTATUS(status) == 7, "{status:#x}");
        }
    }

    #[test]
    fn an_access_to_what_is_not_mapped_ends_the_process() {
        // mov al, [8]
        let status = end_of(&[0x8a, 0x04, 0x25, 8, 0, 0, 0]);
        assert!(libc::WIFSIGNALED(status) && libc::WTERMSIG(status) == libc::SIGSEGV, "{status:#x}");
    }
}
