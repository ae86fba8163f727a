//! Tier 0.

use ruse_cases::case::{Case, Executor, Outcome};
use ruse_dbt::{
    cpu::{Cpu, CpuBox},
    tier0,
};
use ruse_memory::GuestRam;

use crate::guest::{NullBus, load, machine, unload};

/// Steps after which a case counts as endless.
const MOST_STEPS: u32 = 200_000;

/// The executor.
pub struct Tier0 {
    cpu: CpuBox,
    ram: GuestRam,
}

impl Tier0 {
    /// A CPU with everything that the engine offers.
    pub fn new() -> Self {
        let (cpu, ram) = machine();
        Self { cpu, ram }
    }

    fn one(&mut self, case: &Case) -> Outcome {
        load(&mut self.cpu, &self.ram, case);
        let fault =
            self.cpu.with_bus(&NullBus, |cpu: &mut Cpu| (0..MOST_STEPS).find_map(|_| tier0::step(cpu).err()));
        match fault {
            Some(fault) => unload(&self.cpu, &self.ram, case, fault),
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
