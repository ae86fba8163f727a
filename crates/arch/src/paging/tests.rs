//! The walk against a plain model of SDM volume 3, chapter 4, that shares nothing with it: entries are taken apart as the
//! tables there draw them, one function for each paging mode.

use std::collections::BTreeMap;

use ruse_random::Random;

use super::*;

/// Physical memory all of which holds random entries: what has been looked at or changed is noted.
#[derive(Clone, PartialEq, Debug)]
struct Memory {
    seed: u64,
    entries: BTreeMap<u64, u64>,
}

impl Memory {
    fn read(&mut self, at: u64, wide: bool) -> u64 {
        let seed = self.seed ^ at;
        *self.entries.entry(at).or_insert_with(|| random_entry(&mut Random::new(seed), wide))
    }
}

impl PhysMemory for Memory {
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64 {
        self.read(gpa, wide)
    }

    fn set_bits(&mut self, gpa: u64, _: bool, old: u64, bits: u64) -> bool {
        let entry = self.entries.get_mut(&gpa).expect("what is changed has been read");
        assert_eq!(*entry, old);
        *entry |= bits;
        true
    }
}

/// An entry that mostly is present and mostly allows everything, with a reserved bit now and then.
fn random_entry(random: &mut Random, wide: bool) -> u64 {
    let likely = [pte::P, pte::W, pte::U].into_iter().filter(|_| random.chance(88)).sum::<u64>();
    let even = random.word() & (pte::A | pte::D | pte::G | 0xe18);
    let large = if random.chance(35) { pte::PS } else { 0 };
    let low = likely | even | large;
    if !wide {
        // Where the high half of a PSE-36 address lies, zeroes come often enough.
        let address = random.word() & 0xffff_f000;
        return low | if random.chance(50) { address & 0xffc0_0000 } else { address };
    }
    let aligned = if large != 0 && random.chance(85) { 0x3fff_c000_0000 } else { 0x3fff_ffff_f000 };
    let mut entry = low | random.word() & aligned;
    if large != 0 && random.chance(50) {
        entry |= random.word() & 0x3fff_ffe0_0000 | random.word() & 1 << 12;
    }
    if random.chance(15) {
        entry |= pte::NX;
    }
    if random.chance(8) {
        entry |= 1 << (46 + random.below(17));
    }
    entry
}

/// What the model says of an access that is allowed.
#[derive(Debug, PartialEq)]
struct Allowed {
    address: u64,
    shift: u32,
    user: bool,
    writable: bool,
    executable: bool,
    global: bool,
    dirty: bool,
}

struct Model<'a> {
    mode: &'a PagingMode,
    access: Access,
    who: Privilege,
    memory: &'a mut Memory,
    /// Addresses and values of the entries that were used.
    used: Vec<(u64, u64)>,
}

/// Why there is no translation.
enum Missing {
    NotPresent,
    Reserved,
}

fn bit(value: u64, n: u32) -> bool {
    value >> n & 1 == 1
}

/// Bits `high` to `low` of a value, where they are.
fn field(value: u64, high: u32, low: u32) -> u64 {
    (low..=high).filter(|&n| bit(value, n)).map(|n| 1 << n).sum()
}

impl Model<'_> {
    fn entry(&mut self, at: u64, wide: bool) -> Result<u64, Missing> {
        let entry = self.memory.read(at, wide);
        if !bit(entry, 0) {
            return Err(Missing::NotPresent);
        }
        self.used.push((at, entry));
        Ok(entry)
    }

    /// An entry of PAE or 4-level paging, some of whose bits must be zero. Bit 63 is one of them unless EFER.NXE is set.
    fn wide_entry(&mut self, at: u64, reserved: &[(u32, u32)]) -> Result<u64, Missing> {
        let entry = self.entry(at, true)?;
        let execute_disable = bit(self.mode.efer, 11);
        let wrong = reserved.iter().any(|&(high, low)| field(entry, high, low) != 0);
        if wrong || bit(entry, 63) && !execute_disable { Err(Missing::Reserved) } else { Ok(entry) }
    }

    /// SDM 4.3, tables 4-4 to 4-6.
    fn two_levels(&mut self, la: u64) -> Result<(u64, u32), Missing> {
        let pde = self.entry(field(self.mode.cr3, 31, 12) | field(la, 31, 22) >> 20, false)?;
        if bit(pde, 7) && bit(self.mode.cr4, 4) {
            if bit(pde, 21) {
                return Err(Missing::Reserved);
            }
            let address = field(pde, 20, 13) << 19 | field(pde, 31, 22) | field(la, 21, 0);
            return Ok((address, 22));
        }
        let pte = self.entry(field(pde, 31, 12) | field(la, 21, 12) >> 10, false)?;
        Ok((field(pte, 31, 12) | field(la, 11, 0), 12))
    }

    /// SDM 4.4, tables 4-8 to 4-11.
    fn pae(&mut self, la: u64) -> Result<(u64, u32), Missing> {
        let pdpte = self.mode.pdpte[(field(la, 31, 30) >> 30) as usize];
        if !bit(pdpte, 0) {
            return Err(Missing::NotPresent);
        }
        let at = field(pdpte, 45, 12) | field(la, 29, 21) >> 18;
        if bit(self.memory.read(at, true), 7) {
            let pde = self.wide_entry(at, &[(62, 46), (20, 13)])?;
            return Ok((field(pde, 45, 21) | field(la, 20, 0), 21));
        }
        let pde = self.wide_entry(at, &[(62, 46)])?;
        let pte = self.wide_entry(field(pde, 45, 12) | field(la, 20, 12) >> 9, &[(62, 46)])?;
        Ok((field(pte, 45, 12) | field(la, 11, 0), 12))
    }

    /// SDM 4.5, tables 4-14 to 4-20.
    fn four_levels(&mut self, la: u64) -> Result<(u64, u32), Missing> {
        let high = (51, 46);
        let pml4e =
            self.wide_entry(field(self.mode.cr3, 45, 12) | field(la, 47, 39) >> 36, &[high, (7, 7)])?;
        let at = field(pml4e, 45, 12) | field(la, 38, 30) >> 27;
        if bit(self.memory.read(at, true), 7) {
            let pdpte = self.wide_entry(at, &[high, (29, 13)])?;
            return Ok((field(pdpte, 45, 30) | field(la, 29, 0), 30));
        }
        let pdpte = self.wide_entry(at, &[high])?;
        let at = field(pdpte, 45, 12) | field(la, 29, 21) >> 18;
        if bit(self.memory.read(at, true), 7) {
            let pde = self.wide_entry(at, &[high, (20, 13)])?;
            return Ok((field(pde, 45, 21) | field(la, 20, 0), 21));
        }
        let pde = self.wide_entry(at, &[high])?;
        let pte = self.wide_entry(field(pde, 45, 12) | field(la, 20, 12) >> 9, &[high])?;
        Ok((field(pte, 45, 12) | field(la, 11, 0), 12))
    }

    /// SDM 4.6.1.
    fn is_allowed(&self, user_address: bool, writable: bool, executable: bool) -> bool {
        let (cr0, cr4) = (self.mode.cr0, self.mode.cr4);
        let (write_protect, smep, smap) = (bit(cr0, 16), bit(cr4, 20), bit(cr4, 21));
        match (self.who.user, self.access) {
            (false, Access::Fetch) if user_address => !smep && executable,
            (false, Access::Fetch) => executable,
            (false, _) if user_address && smap && !self.who.ac => false,
            (false, Access::Read) => true,
            (false, Access::Write) => !write_protect || writable,
            (true, _) if !user_address => false,
            (true, Access::Read) => true,
            (true, Access::Write) => writable,
            (true, Access::Fetch) => executable,
        }
    }

    /// SDM 4.7.
    fn error(&self, present: bool, reserved: bool) -> u32 {
        let fetch = self.access == Access::Fetch
            && (bit(self.mode.cr4, 20) || bit(self.mode.cr4, 5) && bit(self.mode.efer, 11));
        let bits = [present, self.access == Access::Write, self.who.user, reserved, fetch];
        bits.into_iter().enumerate().map(|(n, set)| u32::from(set) << n).sum()
    }

    fn run(mut self, la: u64) -> Result<Allowed, u32> {
        let long = bit(self.mode.efer, 10);
        let pae = bit(self.mode.cr4, 5);
        let found = match (long, pae) {
            (true, _) => self.four_levels(la),
            (false, true) => self.pae(field(la, 31, 0)),
            (false, false) => self.two_levels(field(la, 31, 0)),
        };
        let (address, shift) = found.map_err(|missing| match missing {
            Missing::NotPresent => self.error(false, false),
            Missing::Reserved => self.error(true, true),
        })?;
        let user = self.used.iter().all(|&(_, entry)| bit(entry, 2));
        let writable = self.used.iter().all(|&(_, entry)| bit(entry, 1));
        let disabled = pae && bit(self.mode.efer, 11) && self.used.iter().any(|&(_, entry)| bit(entry, 63));
        if !self.is_allowed(user, writable, !disabled) {
            return Err(self.error(true, false));
        }
        // SDM 4.8.
        let (leaf, leaf_value) = *self.used.last().expect("a translation has a leaf");
        for (at, _) in &self.used {
            *self.memory.entries.get_mut(at).expect("it was read") |= 1 << 5;
        }
        if self.access == Access::Write {
            *self.memory.entries.get_mut(&leaf).expect("it was read") |= 1 << 6;
        }
        let global = bit(leaf_value, 8) && bit(self.mode.cr4, 7);
        let dirty = bit(leaf_value, 6) || self.access == Access::Write;
        Ok(Allowed { address, shift, user, writable, executable: !disabled, global, dirty })
    }
}

/// One of the paging modes with any of the other bits that the walk depends on.
fn random_mode(random: &mut Random) -> PagingMode {
    let mut any = |bits: u64| random.word() & bits;
    let mut mode = PagingMode {
        cr0: cr0::PE | cr0::PG | any(cr0::WP),
        cr3: any(0x3fff_ffff_ffff),
        cr4: any(cr4::PSE | cr4::PGE | cr4::SMEP | cr4::SMAP),
        efer: any(efer::NXE),
        pdpte: [0; 4],
    };
    match random.below(3) {
        0 => mode.cr3 &= 0xffff_ffff,
        1 => {
            mode.cr4 |= cr4::PAE;
            // Loading CR3 checks the reserved bits.
            mode.pdpte = [(); 4].map(|()| random.word() & 0x3fff_ffff_fe18 | u64::from(random.chance(80)));
        }
        _ => {
            mode.cr4 |= cr4::PAE;
            mode.efer |= efer::LME | efer::LMA;
        }
    }
    mode
}

fn compare(seed: u64) {
    let mut random = Random::new(seed);
    let mode = random_mode(&mut random);
    let la = ((random.word() as i64) << 16 >> 16) as u64;
    let access = [Access::Read, Access::Write, Access::Fetch][random.below(3) as usize];
    let who = Privilege { user: random.chance(50), ac: random.chance(50) };
    let mut expected_memory = Memory { seed, entries: BTreeMap::new() };
    let mut memory = expected_memory.clone();
    let model = Model { mode: &mode, access, who, memory: &mut expected_memory, used: Vec::new() };
    let expected = model.run(la);
    let found = walk(&mode, la, access, who, &mut memory).map(|t| Allowed {
        address: t.gpa,
        shift: t.page_shift,
        user: t.user,
        writable: t.writable,
        executable: t.executable,
        global: t.global,
        dirty: t.dirty,
    });
    let context = || format!("seed {seed:#x}: {la:#x} {access:?} {who:?} {mode:#x?} {expected_memory:#x?}");
    assert_eq!(found, expected, "{}", context());
    assert_eq!(memory, expected_memory, "{}", context());
}

/// `RUSE_PAGING_CASES` says how many.
#[test]
fn random_tables_are_walked_as_the_manual_says() {
    let cases = std::env::var("RUSE_PAGING_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(400_000);
    for seed in 0..cases {
        compare(seed);
    }
}

#[test]
fn the_model_meets_every_kind_of_outcome() {
    let (mut shifts, mut errors) = (BTreeMap::<u32, u32>::new(), BTreeMap::<u32, u32>::new());
    for seed in 0..20_000 {
        let mut random = Random::new(seed);
        let mode = random_mode(&mut random);
        let mut memory = Memory { seed, entries: BTreeMap::new() };
        let who = Privilege { user: random.chance(50), ac: false };
        let access = [Access::Read, Access::Write, Access::Fetch][random.below(3) as usize];
        let model = Model { mode: &mode, access, who, memory: &mut memory, used: Vec::new() };
        match model.run(random.word()) {
            Ok(allowed) => *shifts.entry(allowed.shift).or_default() += 1,
            Err(error) => *errors.entry(error).or_default() += 1,
        }
    }
    assert_eq!(shifts.keys().copied().collect::<Vec<_>>(), [12, 21, 22, 30]);
    // Not present, denied and reserved, each for reads, writes and fetches (with and without the fetch bit) of both
    // privileges; a supervisor's read is denied by SMAP.
    let kinds: Vec<u32> = (0..32).filter(|e| e & 0b1001 != 0b1000 && e & 0b10010 != 0b10010).collect();
    assert_eq!(errors.keys().copied().collect::<Vec<_>>(), kinds);
}

/// Another CPU changes an entry between the walk's look at it and its update.
struct Contended {
    memory: Memory,
    /// What the first update finds in place of the old value.
    change: Option<u64>,
}

impl PhysMemory for Contended {
    fn read_entry(&mut self, gpa: u64, wide: bool) -> u64 {
        self.memory.read(gpa, wide)
    }

    fn set_bits(&mut self, gpa: u64, wide: bool, old: u64, bits: u64) -> bool {
        if let Some(new) = self.change.take() {
            self.memory.entries.insert(gpa, new);
            return false;
        }
        self.memory.set_bits(gpa, wide, old, bits)
    }
}

#[test]
fn an_entry_that_changes_under_the_walk_is_looked_at_again() {
    let mode = PagingMode {
        cr0: cr0::PE | cr0::PG,
        cr3: 0x1000,
        cr4: cr4::PAE,
        efer: efer::LMA | efer::NXE,
        pdpte: [0; 4],
    };
    let link = pte::P | pte::W | pte::U;
    let entries =
        [(0x1000, 0x2000 | link), (0x2000, 0x3000 | link), (0x3000, 0x4000 | link), (0x4000, 0x5000 | link)];
    let run = |change| {
        let memory = Memory { seed: 0, entries: entries.into_iter().collect() };
        let mut memory = Contended { memory, change: Some(change) };
        let who = Privilege { user: true, ac: false };
        let found = walk(&mode, 0x123, Access::Write, who, &mut memory);
        (found.map(|t| t.gpa), memory.memory.entries[&0x1000])
    };
    assert_eq!(run(0), (Err(fault::W | fault::U), 0));
    assert_eq!(
        run(0x2000 | pte::P | pte::U),
        (Err(fault::P | fault::W | fault::U), 0x2000 | pte::P | pte::U)
    );
    let accessed = 0x2000 | link | pte::A;
    assert_eq!(run(accessed), (Ok(0x5123), accessed));
}

#[test]
fn without_paging_addresses_have_32_bits() {
    let mut memory = Memory { seed: 0, entries: BTreeMap::new() };
    let who = Privilege { user: true, ac: false };
    let found = walk(&PagingMode::default(), 0x1_2345_6789, Access::Write, who, &mut memory).unwrap();
    assert_eq!(found.gpa, 0x2345_6789);
    assert!(memory.entries.is_empty());
}
