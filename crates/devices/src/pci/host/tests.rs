//! Tests of the host bridge.

use std::sync::{Arc, Mutex};

use super::*;
use crate::pci::testing::{Dummy, windows};
use crate::pci::{Bar, RootPort, UNCLAIMED};
use crate::{Effects, Power};

fn plug(host: &mut PciHost, at: PciAddress, space: ConfigSpace) -> Result<(), SlotTaken> {
    let mut effects = Effects::default();
    let function = Arc::new(Mutex::new(Dummy::new(space)));
    host.insert(&mut Access { now: 0, effects: &mut effects }, at, function)
}
fn device() -> ConfigSpace {
    let mut space = ConfigSpace::new(Identity { vendor: 0x1af4, device: 0x1042, ..Identity::default() });
    space.set_bar(0, Bar::Memory64 { size: 0x8000, prefetchable: false });
    space.set_bar(2, Bar::Io(32));
    space.set_bar(4, Bar::Memory64 { size: 1 << 33, prefetchable: true });
    space
}
fn host() -> PciHost {
    let mut host = PciHost::new(256, windows());
    plug(&mut host, PciAddress::new(3, 0), device()).unwrap();
    host
}
/// Writes a register, and says where everything is from then on if that changes.
fn config(host: &mut PciHost, at: PciAddress, register: u16, value: u32) -> Option<PciRanges> {
    let mut effects = Effects::default();
    host.config_write(&mut Access { now: 0, effects: &mut effects }, at, register, value, 0xf);
    effects.pci_ranges
}
/// First address and owner of each range of memory that a base address register has.
fn memory(ranges: &PciRanges) -> Vec<(u64, String)> {
    let ranges = ranges.memory.iter().filter(|(_, _, target)| target.bar != UNCLAIMED);
    ranges.map(|(first, _, target)| (first, format!("{target:?}"))).collect()
}
fn read<const N: usize>(host: &mut PciHost, offset: u64) -> [u8; N] {
    let mut data = [0; N];
    host.read(&mut Access { now: 0, effects: &mut Effects::default() }, offset, &mut data);
    data
}
fn write(host: &mut PciHost, offset: u64, data: &[u8]) -> Option<Power> {
    let mut effects = Effects::default();
    host.write(&mut Access { now: 0, effects: &mut effects }, offset, data);
    effects.power
}
fn dword(host: &mut PciHost, address: u32) -> u32 {
    write(host, 0, &address.to_le_bytes());
    u32::from_le_bytes(read(host, 4))
}

/// The steps of Linux's `pci_check_type1` and `pci_sanity_check` (arch/x86/pci/direct.c).
#[test]
fn linux_finds_mechanism_1() {
    let mut host = host();
    write(&mut host, 3, &[1]);
    write(&mut host, 0, &0x8000_0000u32.to_le_bytes());
    assert_eq!(u32::from_le_bytes(read(&mut host, 0)), 0x8000_0000);
    assert_eq!(dword(&mut host, 0x8000_0008) >> 16, 0x0600);
    assert_eq!(dword(&mut host, 0x8000_1800), 0x1042_1af4);
    assert_eq!(dword(&mut host, 0x8000_1900), !0);
    assert_eq!(dword(&mut host, 0x8001_0000), !0);
    assert_eq!(dword(&mut host, 0x0000_0000), !0, "not enabled");
}

#[test]
fn data_takes_bytes_and_words() {
    let mut host = host();
    dword(&mut host, 0x8000_1800);
    assert_eq!(read::<2>(&mut host, 6), [0x42, 0x10]);
    assert_eq!(read::<1>(&mut host, 5), [0x1a]);
    dword(&mut host, 0x8000_1804);
    write(&mut host, 5, &[0xff]);
    assert_eq!(read::<4>(&mut host, 4), [0, 4, 0, 0]);
    assert_eq!(read::<4>(&mut host, 2), [0xff, 0xff, 0, 4]);
}

#[test]
fn the_reset_register_takes_bytes_only() {
    let mut host = host();
    assert_eq!(write(&mut host, 0, &[0, 6, 0, 0x80]), None);
    assert_eq!(write(&mut host, 1, &[6, 0]), None);
    assert_eq!(write(&mut host, 1, &[2]), None);
    assert_eq!(read::<1>(&mut host, 1), [2]);
    assert_eq!(write(&mut host, 1, &[6]), Some(Power::Reset));
    assert_eq!(read::<1>(&mut host, 0), [0xff]);
    assert_eq!(u32::from_le_bytes(read(&mut host, 0)), 0x8000_0600, "CONFIG_ADDRESS is untouched");
}

#[test]
fn memory_mapped_space_reaches_the_same_functions() {
    let mut host = host();
    let at = PciHost::ECAM + (3 << 15);
    assert_eq!(read::<8>(&mut host, at), [0xf4, 0x1a, 0x42, 0x10, 0, 0, 0, 0]);
    write(&mut host, at + 4, &[7, 0]);
    assert_eq!(dword(&mut host, 0x8000_1804), 7);
    assert_eq!(read::<4>(&mut host, PciHost::ECAM + (1 << 20)), [0xff; 4]);
    assert_eq!(read::<4>(&mut host, PciHost::ECAM + (1 << 28) + (3 << 15)), [0xff; 4]);
    assert_eq!(decode_ecam(0x0ab1_9123), (PciAddress { bus: 0xab, device: 3, function: 1 }, 0x123));
}

#[test]
fn slots_are_taken_once() {
    let mut host = host();
    for (device, taken) in [(0, true), (3, true), (4, false)] {
        let space = ConfigSpace::new(Identity::default());
        assert_eq!(plug(&mut host, PciAddress::new(device, 0), space).is_err(), taken);
    }
    assert!(plug(&mut host, PciAddress::behind(1), device()).is_err(), "no root port leads there");
    let mut effects = Effects::default();
    let access = &mut Access { now: 0, effects: &mut effects };
    assert!(host.remove(access, PciAddress::new(3, 0)).is_some());
    assert_eq!(dword(&mut host, 0x8000_1800), !0);
}

const DEVICE: PciAddress = PciAddress { bus: 0, device: 3, function: 0 };

#[test]
fn ranges_are_where_firmware_or_the_guest_puts_them() {
    let mut host = host();
    host.assign();
    let at = |host: &mut PciHost, register| {
        host.config_read(&mut Access { now: 0, effects: &mut Effects::default() }, DEVICE, register)
    };
    let places = [0x10, 0x14, 0x18, 0x20, 0x24].map(|register| at(&mut host, register));
    assert_eq!(places, [0xc000_0004, 0, 0x1001, 0x0000_000c, 0x10]);
    assert!(config(&mut host, DEVICE, 0x10, 0xc000_8000).is_none(), "it answers nothing yet");
    let ranges = config(&mut host, DEVICE, 0x04, 3).unwrap();
    let large = (0x10_0000_0000, "00:03.0 BAR 4".to_string());
    assert_eq!(memory(&ranges), [(0xc000_8000, "00:03.0 BAR 0".into()), large.clone()]);
    assert_eq!(
        ranges.ports.iter().map(|(first, last, _)| (first, last)).collect::<Vec<_>>(),
        [(0x1000, 0x101f)]
    );
    let ranges = config(&mut host, DEVICE, 0x10, 0xd000_0000).unwrap();
    assert_eq!(memory(&ranges), [(0xd000_0000, "00:03.0 BAR 0".into()), large]);
    assert_eq!(ranges.doorbells[0].address, 0xd000_0040);
    assert!(config(&mut host, DEVICE, 0x3c, 5).is_none());
    let ranges = config(&mut host, DEVICE, 0x04, 0).unwrap();
    assert!(
        memory(&ranges).is_empty() && ranges.ports.iter().next().is_none() && ranges.doorbells.is_empty()
    );
}

#[test]
fn nobody_answers_outside_of_the_windows_or_in_anothers_range() {
    let mut host = host();
    host.assign();
    config(&mut host, DEVICE, 0x04, 3);
    for outside in [0x10_0000, 0xbfff_8000, 0xe000_0000, 0xfec0_0000, 0xffff_8000] {
        let ranges = config(&mut host, DEVICE, 0x10, outside).unwrap_or_else(|| host.ranges());
        assert_eq!(memory(&ranges).len(), 1, "{outside:#x}");
        assert!(ranges.doorbells.is_empty());
    }
    config(&mut host, DEVICE, 0x10, 0xc000_0000);
    let second = PciAddress::new(4, 0);
    plug(&mut host, second, device()).unwrap();
    config(&mut host, second, 0x10, 0xc000_0000);
    config(&mut host, second, 0x04, 2);
    assert_eq!(memory(&host.ranges())[0].1, "00:03.0 BAR 0");
    let ranges = config(&mut host, DEVICE, 0x10, 0xc100_0000).unwrap();
    assert_eq!(memory(&ranges)[0], (0xc000_0000, "00:04.0 BAR 0".into()), "it is free now");
}

const PORT: PciAddress = PciAddress { bus: 0, device: 24, function: 0 };

/// A device behind a root port, to bus 5, as firmware leaves them.
fn behind_a_port() -> PciHost {
    let mut host = host();
    let port = Arc::new(Mutex::new(RootPort::new(PORT, 16, 5)));
    let mut effects = Effects::default();
    host.insert(&mut Access { now: 0, effects: &mut effects }, PORT, port).unwrap();
    plug(&mut host, PciAddress::behind(5), device()).unwrap();
    host.assign();
    host
}

#[test]
fn a_reset_of_the_bus_behind_a_root_port_is_one_of_its_device_alone() {
    let mut host = behind_a_port();
    let slot = PciAddress { bus: 5, device: 0, function: 0 };
    config(&mut host, slot, 0x04, 2);
    config(&mut host, DEVICE, 0x04, 2);
    config(&mut host, PORT, 0x04, 2);
    assert_eq!(memory(&host.ranges()).len(), 3);
    // The interrupt line beside it is written with it.
    let ranges = config(&mut host, PORT, 0x3c, 1 << 22 | 9).expect("a device has let go of its addresses");
    assert_eq!(memory(&ranges).iter().filter(|(_, who)| who.starts_with("05")).count(), 0);
    assert_eq!(memory(&ranges).len(), 2);
    assert_eq!(dword(&mut host, 0x8000_c03c), 0x0040_0109, "the port itself is as it was");
    assert_eq!((dword(&mut host, 0x8005_0004) & 0xffff, dword(&mut host, 0x8005_0010)), (0, 4));
    config(&mut host, slot, 0x10, 0xc010_0000);
    for value in [1 << 22, 0] {
        assert!(config(&mut host, PORT, 0x3c, value).is_none(), "only a bit that is set anew resets");
    }
    assert_eq!(dword(&mut host, 0x8005_0010), 0xc010_0004);
}

#[test]
fn a_device_behind_a_root_port_is_reached_through_its_bridge() {
    let mut host = behind_a_port();
    let at = PORT;
    assert_eq!(dword(&mut host, 0x8005_0000), 0x1042_1af4);
    assert_eq!(dword(&mut host, 0x8005_0800), !0, "there is one device behind a port");
    let slot = PciAddress { bus: 5, device: 0, function: 0 };
    config(&mut host, slot, 0x04, 2);
    assert!(memory(&host.ranges()).is_empty(), "the bridge does not forward memory");
    let ranges = config(&mut host, at, 0x04, 2).unwrap();
    assert_eq!(memory(&ranges), [(0xc010_0000, "05:00.0 BAR 0".into())]);
    config(&mut host, at, 0x18, 0x0007_0700);
    assert_eq!((dword(&mut host, 0x8005_0000), dword(&mut host, 0x8007_0000)), (!0, 0x1042_1af4));
    let ranges = config(&mut host, PciAddress { bus: 7, ..slot }, 0x10, 0xc020_0000).unwrap();
    assert!(memory(&ranges).is_empty(), "outside of the bridge's window");
    let ranges = config(&mut host, at, 0x20, 0xc020_c020).unwrap();
    assert_eq!(memory(&ranges), [(0xc020_0000, "05:00.0 BAR 0".into())]);
}

#[test]
fn what_a_root_port_forwards_reads_as_zeros_where_nobody_answers() {
    let mut host = host();
    let at = PciAddress::new(24, 0);
    let port = Arc::new(Mutex::new(RootPort::new(at, 16, 5)));
    let mut effects = Effects::default();
    host.insert(&mut Access { now: 0, effects: &mut effects }, at, port).unwrap();
    let slot = PciAddress::behind(5);
    plug(&mut host, slot, device()).unwrap();
    host.assign();
    let bytes = |ranges: &PciRanges, address| {
        let mut data = [0x55; 4];
        ranges.memory.read(address, &mut data, |target, offset, data| {
            let mut effects = Effects::default();
            let access = &mut Access { now: 0, effects: &mut effects };
            lock(&target.function).bar_read(access, target.bar, offset, data);
        });
        data
    };
    config(&mut host, slot, 0x10, 0xc010_8000);
    config(&mut host, slot, 0x20, 0xc010_000c);
    assert_eq!(bytes(&host.ranges(), 0xc010_0000), [0xff; 4], "it forwards nothing");
    // It forwards one MiB, and behind that as much again, which is another function's.
    config(&mut host, DEVICE, 0x10, 0xc020_0000);
    config(&mut host, DEVICE, 0x04, 2);
    config(&mut host, at, 0x24, 0xc020_c020);
    config(&mut host, at, 0x04, 2);
    let ranges = config(&mut host, slot, 0x04, 2).unwrap();
    let kinds = |ranges: &PciRanges| {
        let low = ranges.memory.iter().filter(|(first, ..)| *first < 1 << 32);
        low.map(|(first, last, target)| (first, last, target.bar)).collect::<Vec<_>>()
    };
    let unclaimed = |first, last| (first, last, UNCLAIMED);
    assert_eq!(
        kinds(&ranges),
        [
            unclaimed(0xc010_0000, 0xc010_7fff),
            (0xc010_8000, 0xc010_ffff, 0),
            unclaimed(0xc011_0000, 0xc01f_ffff),
            (0xc020_0000, 0xc020_7fff, 0),
            unclaimed(0xc020_8000, 0xc02f_ffff),
        ]
    );
    let mut effects = Effects::default();
    host.remove(&mut Access { now: 0, effects: &mut effects }, slot).unwrap();
    let ranges = effects.pci_ranges.unwrap();
    assert_eq!(kinds(&ranges)[0], unclaimed(0xc010_0000, 0xc01f_ffff), "it has been torn out");
    assert_eq!(bytes(&ranges, 0xc010_8014), [0; 4]);
    assert_eq!(bytes(&ranges, 0xc030_0000), [0xff; 4], "behind the window");
    assert_eq!(dword(&mut host, 0x8005_0000), !0, "its configuration space reads as ones");
    for (register, value) in [(0x24, 0x0001_0001), (0x28, 0), (0x2c, !0), (0x24, 0xfff1_0001)] {
        config(&mut host, at, register, value);
        assert!(
            kinds(&host.ranges()).len() < 3,
            "a window that is not in one of the host's forwards nothing"
        );
    }
}

#[test]
fn a_reset_is_as_power_up() {
    let mut host = host();
    host.assign();
    config(&mut host, DEVICE, 0x04, 3);
    config(&mut host, DEVICE, 0x10, 0xd000_0000);
    let mut effects = Effects::default();
    host.reset(&mut Access { now: 0, effects: &mut effects });
    assert!(memory(&effects.pci_ranges.unwrap()).is_empty());
    assert_eq!(dword(&mut host, 0x8000_1810), 0xc000_0004);
}
