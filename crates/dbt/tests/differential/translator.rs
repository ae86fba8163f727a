//! The translator: blocks of host code, first made and then used again; or, as its user code may be, executed directly.

use ruse_arch::flags::cr4;
use ruse_cases::case::{Case, Executor, Outcome};
use ruse_dbt::{DbtOptions, DirectMode, runtime::vcpu::DbtVcpu};
use ruse_engine::Vcpu;
use ruse_memory::GuestRam;

use crate::guest::{ALIASES, NullBus, add_aliases, forget_addresses, load, machine, unload};

/// Cases between two that begin with empty TLBs.
const FORGETFUL: u64 = 16;

/// The executor. Code stays translated from one case to the next if it is the same.
pub struct Translator {
    vcpu: DbtVcpu,
    ram: GuestRam,
    cases: u64,
    /// At which distances a case runs, one after the other; what becomes of it at the last one counts.
    places: &'static [u64],
    name: &'static str,
}

impl Translator {
    /// A CPU with everything that the engine offers.
    pub fn new() -> Self {
        Self::with("the translator", DirectMode::Off)
    }

    /// One that executes user code, which all cases are, directly.
    pub fn directly() -> Self {
        let mut direct = Self::with("direct execution", DirectMode::Always);
        direct.vcpu.cpu_mut().paging.cr4 |= cr4::FSGSBASE;
        direct
    }

    fn with(name: &'static str, direct: DirectMode) -> Self {
        let (cpu, ram) = machine();
        let vcpu = DbtVcpu::new(cpu, DbtOptions { audit: true, direct, ..DbtOptions::default() })
            .expect("memory for generated code");
        Self { vcpu, ram, cases: 0, places: &[0], name }
    }

    /// Each case runs at several addresses, so that code that was made for one is copied for the others.
    pub fn copying() -> Self {
        let copying = Self { places: &ALIASES, ..Self::new() };
        add_aliases(&copying.ram);
        copying
    }

    /// How often translated code was entered, and how many instructions were left to tier 0.
    pub fn work(&self) -> (u64, u64) {
        let counters = &self.vcpu.cpu().counters;
        (counters.dispatches, counters.tier0)
    }

    /// One of the engine's counters.
    pub fn counter(&self, name: &str) -> u64 {
        self.vcpu.counters().get(name)
    }

    fn one(&mut self, case: &Case) -> Outcome {
        self.cases += 1;
        if self.cases.is_multiple_of(FORGETFUL) {
            forget_addresses(self.vcpu.cpu_mut(), &self.ram);
        }
        let mut outcome = Outcome::EMPTY;
        for &place in self.places {
            load(self.vcpu.cpu_mut(), &self.ram, case, place);
            let fault = self.vcpu.run_until_fault(&NullBus);
            outcome = unload(self.vcpu.cpu(), &self.ram, case, place, fault);
        }
        outcome
    }
}

impl Executor for Translator {
    fn name(&self) -> &'static str {
        self.name
    }
    fn forgets_dead_flags(&self) -> bool {
        true
    }
    fn run(&mut self, cases: &[Case]) -> Vec<Outcome> {
        cases.iter().map(|case| self.one(case)).collect()
    }
}
