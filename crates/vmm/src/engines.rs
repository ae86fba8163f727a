//! Makes the engine that was chosen.

use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::Engine;
use ruse_kvm::KvmEngine;

use crate::config::{Accel, MachineConfig};
use crate::doctor::{Choice, ChoiceError, choose};

/// The engine for a machine, and why it is that one.
pub fn engine_for(config: &MachineConfig) -> Result<(Box<dyn Engine>, Choice), ChoiceError> {
    let choice = choose(config.accel)?;
    let engine: Box<dyn Engine> = match choice.engine {
        Accel::Kvm => Box::new(KvmEngine::open()?),
        Accel::Dbt | Accel::Auto => {
            Box::new(DbtEngine::new(DbtOptions { tier: config.tier, check: config.check }))
        }
    };
    Ok((engine, choice))
}
