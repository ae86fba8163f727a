use super::registers as r;
use super::*;
use ruse_arch::msr;
use ruse_random::Random;

const TSC_HZ: u64 = 2_000_000_000;

fn lapic() -> Lapic {
    let mut lapic = Lapic::new(0, TSC_HZ);
    let _ = set(&mut lapic, r::SVR, 0x1ff, 0);
    lapic
}

fn set(lapic: &mut Lapic, number: usize, value: u32, now: u64) -> Outcome {
    lapic.write(number as u64 * 16, &value.to_le_bytes(), now)
}

fn get(lapic: &mut Lapic, number: usize, now: u64) -> u32 {
    let mut data = [0; 4];
    lapic.read(number as u64 * 16, &mut data, now);
    u32::from_le_bytes(data)
}

fn x2apic(id: u32) -> Lapic {
    let mut lapic = Lapic::new(id, TSC_HZ);
    let base = lapic.apic_base();
    lapic.write_msr(msr::APIC_BASE, base | BASE_X2APIC, 0).map(drop).unwrap();
    lapic.write_msr(0x80f, 0x1ff, 0).map(drop).unwrap();
    lapic
}

#[test]
fn power_up_values() {
    let mut lapic = Lapic::new(3, TSC_HZ);
    assert_eq!(lapic.apic_base(), DEFAULT_BASE | BASE_ENABLE);
    assert_eq!(get(&mut lapic, r::ID, 0), 3 << 24);
    assert_eq!(get(&mut lapic, r::VERSION, 0), 0x0105_0014);
    assert_eq!(get(&mut lapic, r::SVR, 0), 0xff);
    assert_eq!(get(&mut lapic, r::DFR, 0), u32::MAX);
    assert_eq!(get(&mut lapic, r::LVT_LINT0, 0), r::LVT_MASKED);
    assert_eq!(Lapic::new(0, TSC_HZ).apic_base() & BASE_BSP, BASE_BSP);
}

#[test]
fn priorities_nest() {
    let mut lapic = lapic();
    assert!(lapic.accept_fixed(0x41, false));
    assert!(lapic.accept_fixed(0x52, false));
    assert_eq!(lapic.acknowledge(), Some(0x52));
    assert_eq!(get(&mut lapic, r::PPR, 0), 0x50);
    assert_eq!(lapic.acknowledge(), None);
    assert!(lapic.accept_fixed(0x5f, false));
    assert_eq!(lapic.pending_vector(), None, "the same class waits");
    assert!(lapic.accept_fixed(0x61, false));
    assert_eq!(lapic.acknowledge(), Some(0x61));
    assert_eq!(set(&mut lapic, r::EOI, 0, 0).eoi, None);
    assert_eq!(set(&mut lapic, r::EOI, 0, 0).eoi, None);
    assert_eq!(lapic.acknowledge(), Some(0x5f));
    let _ = set(&mut lapic, r::EOI, 0, 0);
    lapic.set_cr8(4);
    assert_eq!(lapic.pending_vector(), None, "the task priority holds class 4");
    lapic.set_cr8(3);
    assert_eq!(lapic.cr8(), 3);
    assert_eq!(lapic.acknowledge(), Some(0x41));
}

#[test]
fn level_interrupts_broadcast_their_end() {
    let mut lapic = lapic();
    lapic.accept_fixed(0x30, true);
    assert_eq!(get(&mut lapic, r::TMR + 1, 0), 1 << 16);
    lapic.acknowledge();
    assert_eq!(set(&mut lapic, r::EOI, 0, 0).eoi, Some(0x30));
    let _ = set(&mut lapic, r::SVR, 0x11ff, 0);
    lapic.accept_fixed(0x30, true);
    lapic.acknowledge();
    assert_eq!(set(&mut lapic, r::EOI, 0, 0).eoi, None, "suppressed");
    assert_eq!(set(&mut lapic, r::EOI, 0, 0), Outcome::default(), "nothing in service");
}

#[test]
fn software_disable_masks_the_lvt() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::LVT_TIMER, 0x40, 0);
    assert_eq!(get(&mut lapic, r::LVT_TIMER, 0), 0x40);
    let _ = set(&mut lapic, r::SVR, 0xff, 0);
    assert_eq!(get(&mut lapic, r::LVT_TIMER, 0), 0x1_0040);
    let _ = set(&mut lapic, r::LVT_TIMER, 0x41, 0);
    assert_eq!(get(&mut lapic, r::LVT_TIMER, 0), 0x1_0041);
    assert!(!lapic.accept_fixed(0x80, false));
    assert_eq!(lapic.pending_vector(), None);
}

#[test]
fn errors_show_after_a_write() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::LVT_ERROR, 0xfe, 0);
    let _ = set(&mut lapic, r::ICR, 5, 0);
    assert_eq!(lapic.pending_vector(), Some(0xfe));
    lapic.accept_fixed(3, false);
    get(&mut lapic, 0x3f, 0);
    assert_eq!(get(&mut lapic, r::ESR, 0), 0);
    let _ = set(&mut lapic, r::ESR, 0, 0);
    assert_eq!(get(&mut lapic, r::ESR, 0), r::ESR_SEND_VECTOR | r::ESR_RECEIVE_VECTOR | r::ESR_REGISTER);
    let _ = set(&mut lapic, r::ESR, 0, 0);
    assert_eq!(get(&mut lapic, r::ESR, 0), 0);
    // An error entry with an illegal vector must not go round in circles.
    let _ = set(&mut lapic, r::LVT_ERROR, 0, 0);
    lapic.accept_fixed(3, false);
}

#[test]
fn ipis_are_values() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::ICR_HIGH, 7 << 24, 0);
    let sipi = set(&mut lapic, r::ICR, 0x4612, 0).ipi.unwrap();
    assert_eq!((sipi.mode, sipi.vector, sipi.destination), (DeliveryMode::StartUp, 0x12, 7));
    let init = set(&mut lapic, r::ICR, 0xc4500, 0).ipi.unwrap();
    assert_eq!((init.mode, init.shorthand), (DeliveryMode::Init, Shorthand::AllButSelf));
    assert_eq!(set(&mut lapic, r::ICR, 0x8500, 0).ipi, None, "INIT level de-assert");
    assert_eq!(get(&mut lapic, r::ICR, 0), 0x8500);
}

#[test]
fn one_shot_timer() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::LVT_TIMER, 0x40, 0);
    let _ = set(&mut lapic, r::DIVIDE, 0b0011, 0); // by 16
    let _ = set(&mut lapic, r::INITIAL_COUNT, 100, 1000);
    assert_eq!(lapic.deadline(), Some(2600));
    assert_eq!(get(&mut lapic, r::CURRENT_COUNT, 1000), 100);
    assert_eq!(get(&mut lapic, r::CURRENT_COUNT, 1800), 50);
    let _ = set(&mut lapic, r::DIVIDE, 0b1011, 1800); // by 1
    assert_eq!(lapic.deadline(), Some(1850));
    lapic.tick(1849);
    assert_eq!(lapic.pending_vector(), None);
    lapic.tick(1850);
    assert_eq!(lapic.pending_vector(), Some(0x40));
    assert_eq!((lapic.deadline(), get(&mut lapic, r::CURRENT_COUNT, 1850)), (None, 0));
}

#[test]
fn periodic_timer_catches_up_once() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::LVT_TIMER, 0x2_0040, 0);
    let _ = set(&mut lapic, r::DIVIDE, 0b1011, 0);
    let _ = set(&mut lapic, r::INITIAL_COUNT, 1_000_000, 0);
    lapic.tick(10_500_000);
    assert_eq!(lapic.deadline(), Some(11_000_000));
    assert_eq!(get(&mut lapic, r::CURRENT_COUNT, 10_500_000), 500_000);
    assert_eq!(lapic.acknowledge(), Some(0x40));
    assert_eq!(lapic.pending_vector(), None);
    // The shortest period must not make a tick endless, nor the deadlines dense.
    let _ = set(&mut lapic, r::INITIAL_COUNT, 1, 11_000_000);
    lapic.tick(u64::MAX / 2);
    assert!(lapic.deadline().unwrap() >= u64::MAX / 2 + MIN_INTERVAL_NS);
    lapic.tick(u64::MAX);
    let _ = set(&mut lapic, r::INITIAL_COUNT, 0, 0);
    assert_eq!(lapic.deadline(), None);
}

#[test]
fn tsc_deadline_timer() {
    let mut lapic = lapic();
    assert_eq!(lapic.write_msr(msr::TSC_DEADLINE, 5, 0), Ok(Outcome::default()));
    assert_eq!(lapic.read_msr(msr::TSC_DEADLINE, 0), Ok(0), "ignored in one-shot mode");
    let _ = set(&mut lapic, r::LVT_TIMER, 0x4_0040, 0);
    let _ = lapic.write_msr(msr::TSC_DEADLINE, 2001, 0);
    assert_eq!(lapic.deadline(), Some(1001), "rounded up");
    assert_eq!(lapic.read_msr(msr::TSC_DEADLINE, 1000), Ok(2001));
    let _ = set(&mut lapic, r::INITIAL_COUNT, 7, 0);
    assert_eq!(lapic.deadline(), Some(1001), "the initial count is ignored");
    lapic.tick(1001);
    assert_eq!(lapic.read_msr(msr::TSC_DEADLINE, 1001), Ok(0));
    assert_eq!(lapic.acknowledge(), Some(0x40));
    let _ = set(&mut lapic, r::EOI, 0, 0);
    let _ = lapic.write_msr(msr::TSC_DEADLINE, 1, 5000);
    assert_eq!(lapic.pending_vector(), Some(0x40), "a past deadline fires at once");
    let _ = lapic.write_msr(msr::TSC_DEADLINE, 1 << 40, 5000);
    let _ = lapic.write_msr(msr::TSC_DEADLINE, 0, 5000);
    assert_eq!(lapic.deadline(), None);
    let _ = lapic.write_msr(msr::TSC_DEADLINE, u64::MAX, 5000);
    let _ = set(&mut lapic, r::LVT_TIMER, 0x40, 5000);
    assert_eq!(lapic.deadline(), None, "a change of mode disarms");
}

#[test]
fn base_transitions() {
    let mut lapic = lapic();
    let base = lapic.apic_base();
    let mut write = |value| lapic.write_msr(msr::APIC_BASE, value, 0).map(drop);
    assert_eq!(write(base | 1 << 9), Err(MsrError));
    assert_eq!(write(base | 1 << 50), Err(MsrError));
    assert_eq!(write(base & !BASE_ENABLE | BASE_X2APIC), Err(MsrError));
    assert_eq!(write(base | BASE_X2APIC), Ok(()));
    assert_eq!(write(base), Err(MsrError), "x2APIC to xAPIC");
    assert_eq!(write(base & !BASE_ENABLE), Ok(()));
    assert_eq!(write(base | BASE_X2APIC), Err(MsrError), "off to x2APIC");
    assert!(lapic.extint_enabled());
    assert_eq!(lapic.page(), None);
    lapic.write_msr(msr::APIC_BASE, 0x1234_5000 | BASE_ENABLE, 0).map(drop).unwrap();
    assert_eq!(lapic.page(), Some(0x1234_5000));
    assert!(!lapic.extint_enabled());
}

#[test]
fn x2apic_registers() {
    let mut lapic = x2apic(0x123);
    assert_eq!(lapic.read_msr(0x802, 0), Ok(0x123));
    assert_eq!(lapic.read_msr(0x80d, 0), Ok(0x12_0008));
    for number in [0x80b, 0x80e, 0x82f, 0x831, 0x83f, 0x800, 0x8ff] {
        assert_eq!(lapic.read_msr(number, 0), Err(MsrError), "{number:#x}");
    }
    for (number, value) in [(0x802, 0), (0x80a, 0), (0x80b, 1), (0x808, 0x100), (0x830, 1 << 12), (0x828, 1)]
    {
        assert_eq!(lapic.write_msr(number, value, 0), Err(MsrError), "{number:#x}");
    }
    let ipi = lapic.write_msr(0x830, 0x1_0000_0000 | 0x40, 0).unwrap().ipi.unwrap();
    assert!(ipi.wide && ipi.destination == 1);
    assert_eq!(lapic.read_msr(0x830, 0), Ok(0x1_0000_0040));
    let ipi = lapic.write_msr(0x83f, 0x77, 0).unwrap().ipi.unwrap();
    assert_eq!((ipi.vector, ipi.shorthand), (0x77, Shorthand::OnlySelf));
    assert_eq!(get(&mut lapic, r::ID, 0), u32::MAX, "the page is not there");
    lapic.init_reset();
    assert!(lapic.is_x2apic());
    assert_eq!(lapic.read_msr(0x802, 0), Ok(0x123));
}

#[test]
fn pins() {
    let mut lapic = Lapic::new(0, TSC_HZ);
    assert!(!lapic.extint_enabled());
    lapic.virtual_wire();
    assert!(lapic.extint_enabled());
    assert_eq!(lapic.set_lint(1, true), LintEvent::Nmi);
    assert_eq!(lapic.set_lint(1, true), LintEvent::None);
    let _ = set(&mut lapic, r::LVT_LINT0, 0x35, 0);
    assert_eq!(lapic.set_lint(0, true), LintEvent::None);
    assert_eq!(lapic.pending_vector(), Some(0x35));
    assert_eq!(lapic.set_lint(9, true), LintEvent::None);
}

#[test]
fn save_and_restore() {
    let mut lapic = lapic();
    let _ = set(&mut lapic, r::LVT_TIMER, 0x2_0040, 0);
    let _ = set(&mut lapic, r::INITIAL_COUNT, 12345, 77);
    lapic.accept_fixed(0x99, true);
    lapic.acknowledge();
    lapic.accept_fixed(0x31, false);
    lapic.accept_fixed(1, false);
    let saved = lapic.state(100);
    let mut other = Lapic::new(0, TSC_HZ);
    other.restore(&saved).unwrap();
    assert_eq!(other.state(100), saved);
    assert_eq!(other.deadline(), lapic.deadline());
    let mut derived = LapicState { timer_expiry: None, ..saved.clone() };
    derive_expiry(&mut derived, 100, TSC_HZ);
    assert!(derived.timer_expiry.unwrap().abs_diff(lapic.deadline().unwrap()) < 2);
    other.reset();
    assert_eq!(other.state(0), Lapic::new(0, TSC_HZ).state(0));
    let short = LapicState { regs: vec![0; 3], ..saved.clone() };
    assert!(matches!(other.restore(&short), Err(StateError::Registers { .. })));
    let bad = LapicState { apic_base: 1, ..saved };
    assert_eq!(other.restore(&bad), Err(StateError::Base(1)));
}

#[test]
fn anything_survives() {
    let mut random = Random::new(0);
    let mut next = || random.word();
    for mut lapic in [lapic(), x2apic(5)] {
        for _ in 0..200_000 {
            let (offset, now, value) = (next() & 0x1fff, next() >> (next() & 63), next());
            let mut data = value.to_le_bytes();
            let width = 1 << (next() & 3);
            match next() % 8 {
                0 => lapic.read(offset, &mut data[..width], now),
                1 => drop(lapic.write(next(), &data[..width], now)),
                2 => drop(lapic.write(offset & !0xf, &data[..4], now)),
                3 => drop(lapic.read_msr(0x800 + offset as u32 % 256, now)),
                4 => drop(lapic.write_msr(0x800 + offset as u32 % 256, value >> (next() & 63), now)),
                5 => drop(lapic.write_msr(msr::TSC_DEADLINE, value, now)),
                6 => lapic.tick(now),
                _ => drop((lapic.accept_fixed(value as u8, value >> 8 & 1 != 0), lapic.acknowledge())),
            }
        }
        let mut state = lapic.state(next());
        let mut other = Lapic::new(lapic.id(), TSC_HZ);
        other.restore(&state).unwrap();
        state.regs.iter_mut().for_each(|reg| *reg = next() as u32);
        other.restore(&state).unwrap();
        other.tick(u64::MAX);
        other.state(u64::MAX);
    }
}
