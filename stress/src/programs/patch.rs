//! Functions that one thread patches while others execute them. Who has seen a version announced, and has serialized
//! since (SDM volume 3, 8.1.3), executes that version or a later one.

use std::arch::x86_64::__cpuid;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;

use ruse_random::Random;

use crate::fault;
use crate::memory::{File, Mapping, PAGE, RW, RWX, RX};

/// Versions of each function.
const VERSIONS: u64 = 1200;
/// Bytes between functions that are patched: some share a page, some do not.
const STRIDE: usize = PAGE * 3 / 4;
/// Functions.
const FUNCTIONS: usize = 3;
/// Threads that execute them.
const READERS: usize = 2;

/// Who serializes.
#[derive(Clone, Copy)]
enum By {
    /// The reader, by CPUID.
    Reader,
    /// The writer, which makes all threads do so (membarrier(2), `SYNC_CORE`).
    Writer,
}

/// A function under change.
struct Function {
    /// Where its constant is written.
    constant: u64,
    /// Where it is executed.
    address: u64,
    /// The newest version that may be there.
    written: AtomicU64,
    /// The newest version that is announced.
    announced: AtomicU64,
}

impl Function {
    /// Writes `MOV RAX, 0; RET` so that the constant is a whole word of memory, which is changed at once.
    fn new(write: u64, execute: u64, offset: usize) -> Function {
        let start = offset as u64 / 8 * 8 + 6;
        for (n, byte) in [0x48, 0xb8, 0, 0, 0, 0, 0, 0, 0, 0, 0xc3].into_iter().enumerate() {
            // SAFETY: within the mapping, which nothing executes yet.
            unsafe { *((write + start) as *mut u8).add(n) = byte };
        }
        Function {
            constant: write + start + 2,
            address: execute + start,
            written: AtomicU64::new(0),
            announced: AtomicU64::new(0),
        }
    }

    fn patch(&self, version: u64, by: By) {
        self.written.store(version, Ordering::SeqCst);
        // SAFETY: an aligned word of the mapping, which only this thread writes.
        unsafe { AtomicU64::from_ptr(self.constant as *mut u64) }.store(version, Ordering::Release);
        if let By::Writer = by {
            membarrier(libc::MEMBARRIER_CMD_PRIVATE_EXPEDITED_SYNC_CORE);
        }
        self.announced.store(version, Ordering::SeqCst);
    }

    /// Executes it and gives the version that it had.
    fn execute(&self, by: By) -> u64 {
        let announced = self.announced.load(Ordering::SeqCst);
        if let By::Reader = by {
            __cpuid(0);
        }
        // SAFETY: a function is there, whatever its constant.
        let found = unsafe { fault::call(0, self.address) }.value;
        let written = self.written.load(Ordering::SeqCst);
        assert!((announced..=written).contains(&found), "version {found} of {announced} to {written}");
        found
    }
}

fn membarrier(command: libc::c_int) {
    // SAFETY: a system call that changes nothing.
    let done = unsafe { libc::syscall(libc::SYS_membarrier, command, 0, 0) };
    assert_eq!(done, 0, "membarrier: {}", std::io::Error::last_os_error());
}

/// One thread patches, the others execute until they have seen the last version of each function.
pub fn run(random: &mut Random) -> u64 {
    let by = random.pick(&[By::Reader, By::Writer]);
    if let By::Writer = by {
        membarrier(libc::MEMBARRIER_CMD_REGISTER_PRIVATE_EXPEDITED_SYNC_CORE);
    }
    let len = (STRIDE * FUNCTIONS).next_multiple_of(PAGE);
    let file = File::new(len);
    let (write, execute) = match random.below(2) {
        0 => (Mapping::new(len, RWX), None),
        _ => (Mapping::of(&file, RW), Some(Mapping::of(&file, RX))),
    };
    let executed = execute.as_ref().unwrap_or(&write).start() as u64;
    let shift = random.below(128) as usize;
    let functions: [Function; FUNCTIONS] =
        std::array::from_fn(|n| Function::new(write.start() as u64, executed, n * STRIDE + shift));
    let pause = random.pick(&[0, 50, 2000]);
    thread::scope(|threads| {
        for _ in 0..READERS {
            threads.spawn(|| {
                for function in &functions {
                    while function.execute(by) < VERSIONS {}
                }
            });
        }
        for version in 1..=VERSIONS {
            for function in &functions {
                function.patch(version, by);
                (0..random.below(pause + 1)).for_each(|_| std::hint::spin_loop());
            }
        }
    });
    functions.iter().map(|function| function.execute(by)).sum()
}
