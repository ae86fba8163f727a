//! Tier 0.

use ruse_cases::case::{Case, Executor, Outcome};
use ruse_dbt::{
    cpu::{Cpu, CpuBox},
    tier0,
};
use ruse_memory::GuestRam;

use crate::guest::{ALIASES, NullBus, add_aliases, load, machine, unload};

/// Steps after which a case counts as endless.
const MOST_STEPS: u32 = 200_000;

/// The executor.
pub struct Tier0 {
    cpu: CpuBox,
    ram: GuestRam,
    higher: u64,
}

impl Tier0 {
    /// A CPU with everything that the engine offers.
    pub fn new() -> Self {
        let (cpu, ram) = machine();
        Self { cpu, ram, higher: 0 }
    }

    /// The same, with the code at the last of [`ALIASES`].
    pub fn higher() -> Self {
        let tier0 = Self { higher: ALIASES[1], ..Self::new() };
        add_aliases(&tier0.ram);
        tier0
    }

    fn one(&mut self, case: &Case) -> Outcome {
        load(&mut self.cpu, &self.ram, case, self.higher);
        let fault =
            self.cpu.with_bus(&NullBus, |cpu: &mut Cpu| (0..MOST_STEPS).find_map(|_| tier0::step(cpu).err()));
        match fault {
            Some(fault) => unload(&self.cpu, &self.ram, case, self.higher, fault),
            None => Outcome::EMPTY,
        }
    }
}

impl Executor for Tier0 {
    fn name(&self) -> &'static str {
        "tier 0"
    }
    fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        cases.iter().map(|case| self.one(case)).collect()
    }
}
