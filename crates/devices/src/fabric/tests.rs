use super::*;
use crate::lapic::BASE_X2APIC;

fn lapics(count: u32) -> Vec<Lapic> {
    let mut all: Vec<_> = (0..count).map(|id| Lapic::new(id, 1_000_000_000)).collect();
    for lapic in &mut all {
        let _ = lapic.write(0xf0, &0x1ffu32.to_le_bytes(), 0);
    }
    all
}

fn x2apics(count: u32) -> Vec<Lapic> {
    let mut all = lapics(count);
    for lapic in &mut all {
        let base = lapic.apic_base();
        lapic.write_msr(0x1b, base | BASE_X2APIC, 0).map(drop).unwrap();
    }
    all
}

fn targets(request: &Request, all: &[Lapic]) -> Vec<usize> {
    (0..all.len()).filter(|cpu| request.targets(*cpu, &all[*cpu])).collect()
}

fn request(destination: u32, logical: bool, wide: bool) -> Request {
    let mode = DeliveryMode::Fixed;
    let shorthand = Shorthand::None;
    Request { vector: 0x40, mode, level: false, destination, logical, wide, shorthand, sender: Some(1) }
}

fn set_logical(all: &mut [Lapic], dfr: u32, ids: &[u32]) {
    for (lapic, id) in all.iter_mut().zip(ids) {
        let _ = lapic.write(0xe0, &dfr.to_le_bytes(), 0);
        let _ = lapic.write(0xd0, &(id << 24).to_le_bytes(), 0);
    }
}

#[test]
fn messages_decode() {
    let msi = Msi { address: 0xfee0_3000, data: 0xc141 };
    let decoded = msi.decode().unwrap();
    assert_eq!((decoded.destination, decoded.vector, decoded.level), (3, 0x41, true));
    assert_eq!(decoded.mode, DeliveryMode::LowestPriority);
    assert_eq!(Msi { address: 0xfee0_300c, data: 0x41 }.decode().unwrap().mode, DeliveryMode::LowestPriority);
    assert_eq!(Msi { address: 0xfee0_3028, data: 0x41 }.decode().unwrap().destination, 0x103);
    assert_eq!(Msi { address: 0xfec0_0000, data: 0 }.decode(), None);
    assert_eq!(Msi { address: 0x1_fee0_0000, data: 0 }.decode(), None);
    assert_eq!(Msi { address: 0xfee0_0000, data: 0x8041 }.decode(), None);
    assert_eq!(Msi { address: 0xfee0_0000, data: 0x600 }.decode().unwrap().mode, DeliveryMode::Reserved);
}

#[test]
fn physical_and_shorthands() {
    let all = lapics(4);
    assert_eq!(targets(&request(2, false, false), &all), [2]);
    assert_eq!(targets(&request(0xff, false, false), &all), [0, 1, 2, 3]);
    assert_eq!(targets(&request(u32::MAX, false, true), &all), [0, 1, 2, 3]);
    assert_eq!(targets(&request(0x102, false, true), &all), [0usize; 0]);
    let with = |shorthand| Request { shorthand, ..request(0, false, false) };
    assert_eq!(targets(&with(Shorthand::OnlySelf), &all), [1]);
    assert_eq!(targets(&with(Shorthand::All), &all), [0, 1, 2, 3]);
    assert_eq!(targets(&with(Shorthand::AllButSelf), &all), [0, 2, 3]);
}

#[test]
fn logical_flat_and_cluster() {
    let mut all = lapics(4);
    set_logical(&mut all, u32::MAX, &[1, 2, 4, 8]);
    assert_eq!(targets(&request(0b0110, true, false), &all), [1, 2]);
    set_logical(&mut all, 0x0fff_ffff, &[0x01, 0x02, 0x11, 0x12]);
    assert_eq!(targets(&request(0x13, true, false), &all), [2, 3]);
    assert_eq!(targets(&request(0xf2, true, false), &all), [1, 3]);
    assert_eq!(targets(&request(0xff, true, false), &all), [0, 1, 2, 3]);
}

#[test]
fn x2apic_destinations() {
    let all = x2apics(300);
    assert_eq!(targets(&request(0x10 << 16 | 0b101, true, true), &all), [256, 258]);
    assert_eq!(targets(&request(0x102, false, true), &all), [0x102]);
    assert_eq!(targets(&request(0xff, false, true), &all), [0xff]);
    assert_eq!(targets(&request(0b11, true, false), &all), [0, 1]);
    assert_eq!(targets(&request(0xff, false, false), &all).len(), 300);
}

#[test]
fn lowest_priority_takes_the_idlest() {
    let mut all = lapics(3);
    all[0].set_cr8(3);
    all[1].set_cr8(1);
    all[2].set_cr8(2);
    let request = request(0xff, false, false);
    assert_eq!(request.lowest_priority(&all), Some(1));
    let _ = all[1].write(0xf0, &0xffu32.to_le_bytes(), 0);
    assert_eq!(request.lowest_priority(&all), Some(2));
    assert_eq!(request.lowest_priority(&[]), None);
}
