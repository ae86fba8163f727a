//! A machine around a vCPU that answers anything and checks what it is asked.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use ruse_arch::paging::PHYS_BITS;
use ruse_engine::{Bus, MsrFault, VcpuHandle};
use ruse_memory::GuestRam;
use ruse_random::Random;

/// The machine. Its answers depend only on the seed and on what it was asked before.
pub(crate) struct FuzzBus {
    ram: GuestRam,
    random: Mutex<Random>,
    /// Questions for an interrupt that are left until the vCPU is stopped.
    turns: AtomicU64,
    handle: OnceLock<Arc<dyn VcpuHandle>>,
}

impl FuzzBus {
    pub(crate) fn new(ram: GuestRam, seed: u64) -> Self {
        Self {
            ram,
            random: Mutex::new(Random::new(seed)),
            turns: AtomicU64::new(u64::MAX),
            handle: OnceLock::new(),
        }
    }

    /// Stops the vCPU when it has asked for an interrupt so many times.
    pub(crate) fn stop_after(&self, turns: u64, handle: Arc<dyn VcpuHandle>) {
        self.turns.store(turns, Ordering::Relaxed);
        assert!(self.handle.set(handle).is_ok(), "a bus has one vCPU");
    }

    fn next(&self) -> u64 {
        self.random.lock().expect("nothing panics with it").word()
    }

    fn check_memory(&self, gpa: u64, width: usize) {
        assert!(matches!(width, 1 | 2 | 4 | 8), "{width} bytes at {gpa:#x}");
        assert_eq!(gpa >> PHYS_BITS, 0, "{gpa:#x}");
        assert!(self.ram.host_page(gpa).is_none(), "{gpa:#x} is RAM");
    }

    fn answer(&self, data: &mut [u8]) {
        data.copy_from_slice(&self.next().to_le_bytes()[..data.len()]);
    }
}

fn check_port(width: usize) {
    assert!(matches!(width, 1 | 2 | 4), "{width} bytes of a port");
}

impl Bus for FuzzBus {
    fn pio_read(&self, _: u32, _: u16, data: &mut [u8]) {
        check_port(data.len());
        self.answer(data);
    }
    fn pio_write(&self, _: u32, _: u16, data: &[u8]) {
        check_port(data.len());
    }
    fn mmio_read(&self, _: u32, gpa: u64, data: &mut [u8]) {
        self.check_memory(gpa, data.len());
        // The same each time, for code may be fetched here.
        Random::new(gpa).fill(data);
    }
    fn mmio_write(&self, _: u32, gpa: u64, data: &[u8]) {
        self.check_memory(gpa, data.len());
    }

    fn interrupt_pending(&self, _: u32) -> bool {
        let left = self.turns.load(Ordering::Relaxed);
        self.turns.store(left.saturating_sub(1), Ordering::Relaxed);
        if left == 0
            && let Some(handle) = self.handle.get()
        {
            handle.kick();
        }
        self.next().is_multiple_of(16)
    }
    fn acknowledge_interrupt(&self, _: u32) -> Option<u8> {
        let answer = self.next();
        (answer & 0x300 != 0).then_some(answer as u8)
    }
    fn cr8(&self, _: u32) -> u8 {
        self.next() as u8 & 15
    }
    fn set_cr8(&self, _: u32, value: u8) {
        assert!(value < 16, "CR8 has four bits");
    }
    fn apic_msr(&self, _: u32, _: u32) -> Result<u64, MsrFault> {
        let answer = self.next();
        if answer & 1 == 0 { Ok(answer) } else { Err(MsrFault) }
    }
    fn set_apic_msr(&self, _: u32, _: u32, _: u64) -> Result<(), MsrFault> {
        if self.next() & 1 == 0 { Ok(()) } else { Err(MsrFault) }
    }
}
