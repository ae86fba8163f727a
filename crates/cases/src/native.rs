//! The host's CPU: cases run in a child process, with the data and the code at fixed addresses.

use std::{arch::naked_asm, mem::offset_of};

use crate::case::{
    CODE, CODE_BYTES, Case, DIED, Executor, GS_BASE, NONE, Outcome, State, WINDOW, WINDOW_BYTES, digest,
};

/// Page of the child at a low address, for absolute addressing: a [`Control`].
const CONTROL: u64 = 0x3b5a_d000;
/// Where the cases and outcomes are in the parent and the child.
const MOST_CASES: usize = 256;
/// Vector of the UD2 behind a case.
const UD: u64 = 6;
/// Seconds of CPU time that a batch may take. Others may have the CPU for much longer than that.
const PATIENCE: i64 = 20;
const STATE: usize = offset_of!(Control, state);
const GPR: usize = CONTROL as usize + STATE + offset_of!(State, gpr);
const FLAGS: usize = CONTROL as usize + STATE + offset_of!(State, flags);
const HOST_RSP: usize = CONTROL as usize + offset_of!(Control, host_rsp);
const ENTRY: usize = CONTROL as usize + offset_of!(Control, entry);
const FPU: usize = CONTROL as usize + STATE;

/// What the child's machine code uses.
#[repr(C, align(64))]
struct Control {
    state: State,
    host_rsp: u64,
    entry: u64,
    fault: [u64; 3],
}

/// What parent and child share.
#[repr(C)]
struct Shared {
    cases: [Case; MOST_CASES],
    outcomes: [Outcome; MOST_CASES],
    /// Cases begun.
    begun: usize,
}

/// The executor.
pub struct Native {
    shared: *mut Shared,
}

fn map(at: u64, len: usize, prot: i32, flags: i32) -> *mut u8 {
    // SAFETY: a new mapping that replaces none.
    let found = unsafe { libc::mmap(at as *mut _, len, prot, flags | libc::MAP_ANONYMOUS, -1, 0) };
    assert!(found != libc::MAP_FAILED, "mmap: {}", std::io::Error::last_os_error());
    found.cast()
}

impl Default for Native {
    fn default() -> Self {
        let len = size_of::<Shared>();
        Self { shared: map(0, len, libc::PROT_READ | libc::PROT_WRITE, libc::MAP_SHARED).cast() }
    }
}

impl Native {
    /// Runs cases from `from` on in a child; returns how many were begun.
    fn batch(&mut self, from: usize, count: usize) -> usize {
        // SAFETY: the child only makes system calls and touches the shared memory and its own mappings.
        unsafe {
            (*self.shared).begun = from;
            match libc::fork() {
                0 => child(self.shared, from, count),
                pid => {
                    assert!(pid > 0, "fork");
                    let mut status = 0;
                    while libc::waitpid(pid, &raw mut status, 0) != pid {}
                }
            }
            (&raw const (*self.shared).begun).read_volatile()
        }
    }
}

impl Drop for Native {
    fn drop(&mut self) {
        // SAFETY: mapped in `default`.
        unsafe { libc::munmap(self.shared.cast(), size_of::<Shared>()) };
    }
}

impl Executor for Native {
    fn name(&self) -> &'static str {
        "the host"
    }

    fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        assert!(cases.len() <= MOST_CASES);
        // SAFETY: no child runs, so that the memory is this process's alone.
        let shared = unsafe { &mut *self.shared };
        shared.cases[..cases.len()].copy_from_slice(cases);
        for outcome in &mut shared.outcomes[..cases.len()] {
            outcome.vector = DIED;
        }
        let mut done = 0;
        while done < cases.len() {
            // A case that killed the child keeps its mark.
            done = self.batch(done, cases.len());
        }
        shared.outcomes[..cases.len()].to_vec()
    }
}

/// The child: runs the cases one after the other and leaves.
unsafe fn child(shared: *mut Shared, from: usize, count: usize) -> ! {
    let fixed = libc::MAP_PRIVATE | libc::MAP_FIXED_NOREPLACE | libc::MAP_POPULATE;
    let rw = libc::PROT_READ | libc::PROT_WRITE;
    map(WINDOW, WINDOW_BYTES, rw, fixed);
    map(CODE, CODE_BYTES, rw | libc::PROT_EXEC, fixed);
    map(CONTROL, size_of::<Control>().next_multiple_of(4096), rw, fixed);
    let stack = map(0, 1 << 16, rw, libc::MAP_PRIVATE);
    // SAFETY: the pages were just mapped; `shared` is this process's alone while it runs.
    unsafe {
        install_handlers(stack);
        limit_cpu_time();
        const ARCH_SET_GS: libc::c_int = 0x1001;
        libc::syscall(libc::SYS_arch_prctl, ARCH_SET_GS, GS_BASE);
        // From here on little more than returning from a signal and leaving is possible.
        libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_STRICT);
        for n in from..count {
            (&raw mut (*shared).begun).write_volatile(n + 1);
            one(&(*shared).cases[n], &mut (*shared).outcomes[n]);
        }
        libc::syscall(libc::SYS_exit, 0);
    }
    unreachable!("the process has left")
}

/// Ends this process when it has had its time.
fn limit_cpu_time() {
    let time = |seconds| libc::timeval { tv_sec: seconds, tv_usec: 0 };
    let limit = libc::itimerval { it_interval: time(0), it_value: time(PATIENCE) };
    // SAFETY: a plain system call; the signal's default action ends the process.
    unsafe { libc::setitimer(libc::ITIMER_PROF, &raw const limit, std::ptr::null_mut()) };
}

unsafe fn install_handlers(stack: *mut u8) {
    // SAFETY: plain system calls with valid arguments.
    unsafe {
        let alternate = libc::stack_t { ss_sp: stack.cast(), ss_flags: 0, ss_size: 1 << 16 };
        libc::sigaltstack(&raw const alternate, std::ptr::null_mut());
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = handler as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | libc::SA_NODEFER;
        for signal in [libc::SIGSEGV, libc::SIGBUS, libc::SIGFPE, libc::SIGILL, libc::SIGTRAP] {
            libc::sigaction(signal, &raw const action, std::ptr::null_mut());
        }
    }
}

unsafe fn one(case: &Case, outcome: &mut Outcome) {
    // SAFETY: the fixed pages are mapped in this process and nothing else refers to them.
    unsafe {
        let window = std::slice::from_raw_parts_mut(WINDOW as *mut u8, WINDOW_BYTES);
        case.fill(window);
        let code = std::slice::from_raw_parts_mut(CODE as *mut u8, CODE_BYTES);
        code.copy_from_slice(&case.code);
        let control = CONTROL as *mut Control;
        (*control).state = case.state;
        (*control).entry = case.entry();
        (*control).fault = [NONE, 0, 0];
        enter();
        outcome.state = (*control).state;
        [outcome.vector, outcome.error, outcome.address] = (*control).fault;
        if outcome.vector == UD && outcome.state.rip == case.end() {
            (outcome.vector, outcome.error, outcome.address) = (NONE, 0, 0);
        }
        outcome.window.copy_from_slice(window);
        outcome.code = digest(code);
    }
}

/// Loads the registers and jumps to the code.
#[unsafe(naked)]
unsafe extern "sysv64" fn enter() {
    naked_asm!(
        "push rbx", "push rbp", "push r12", "push r13", "push r14", "push r15",
        "mov [{host_rsp}], rsp",
        "mov eax, 7", "xor edx, edx", "xrstor64 [{fpu}]",
        "push qword ptr [{flags}]", "popfq",
        "mov rax, [{gpr}]", "mov rcx, [{gpr} + 8]", "mov rdx, [{gpr} + 16]", "mov rbx, [{gpr} + 24]",
        "mov rsp, [{gpr} + 32]", "mov rbp, [{gpr} + 40]", "mov rsi, [{gpr} + 48]", "mov rdi, [{gpr} + 56]",
        "mov r8, [{gpr} + 64]", "mov r9, [{gpr} + 72]", "mov r10, [{gpr} + 80]", "mov r11, [{gpr} + 88]",
        "mov r12, [{gpr} + 96]", "mov r13, [{gpr} + 104]", "mov r14, [{gpr} + 112]", "mov r15, [{gpr} + 120]",
        "jmp qword ptr [{entry}]",
        host_rsp = const HOST_RSP, fpu = const FPU, flags = const FLAGS, gpr = const GPR, entry = const ENTRY,
    )
}

/// Returns from [`enter`].
#[unsafe(naked)]
unsafe extern "sysv64" fn back() {
    naked_asm!(
        "mov rsp, [{host_rsp}]",
        "cld", "fninit", "vzeroupper",
        "push 0x1f80", "ldmxcsr [rsp]", "pop rax",
        "pop r15", "pop r14", "pop r13", "pop r12", "pop rbp", "pop rbx",
        "ret",
        host_rsp = const HOST_RSP,
    )
}

/// Notes the registers of a fault and makes the thread go on in [`back`].
extern "C" fn handler(_: i32, _: *const libc::siginfo_t, context: *mut libc::c_void) {
    const ORDER: [i32; 16] = [
        libc::REG_RAX,
        libc::REG_RCX,
        libc::REG_RDX,
        libc::REG_RBX,
        libc::REG_RSP,
        libc::REG_RBP,
        libc::REG_RSI,
        libc::REG_RDI,
        libc::REG_R8,
        libc::REG_R9,
        libc::REG_R10,
        libc::REG_R11,
        libc::REG_R12,
        libc::REG_R13,
        libc::REG_R14,
        libc::REG_R15,
    ];
    // SAFETY: the kernel's context is valid while the handler runs; the control page is mapped.
    unsafe {
        let machine = &mut (*context.cast::<libc::ucontext_t>()).uc_mcontext;
        let control = CONTROL as *mut Control;
        let get = |r: i32| machine.gregs[r as usize] as u64;
        let state = &mut (*control).state;
        for (to, r) in state.gpr.iter_mut().zip(ORDER) {
            *to = get(r);
        }
        (state.rip, state.flags) = (get(libc::REG_RIP), get(libc::REG_EFL));
        (*control).fault = [get(libc::REG_TRAPNO), get(libc::REG_ERR), get(libc::REG_CR2)];
        let image = machine.fpregs.cast::<u8>();
        std::ptr::copy_nonoverlapping(image, state.fpu.as_mut_ptr(), 832);
        if state.fpu[512] & 4 == 0 {
            state.fpu[576..].fill(0);
        }
        machine.gregs[libc::REG_RIP as usize] = back as *const () as i64;
        machine.gregs[libc::REG_EFL as usize] = 0x202;
    }
}
