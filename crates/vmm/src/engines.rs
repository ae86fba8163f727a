//! Makes the engine that was chosen.

use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::Engine;
use ruse_kvm::KvmEngine;

use crate::config::{Accel, MachineConfig};
use crate::doctor::{Choice, ChoiceError};

/// The engine that was chosen for a machine.
pub fn engine_for(config: &MachineConfig, choice: &Choice) -> Result<Box<dyn Engine>, ChoiceError> {
    Ok(match choice.engine {
        Accel::Kvm => Box::new(KvmEngine::open()?),
        Accel::Dbt | Accel::Auto => {
            Box::new(DbtEngine::new(DbtOptions { tier: config.tier, check: config.check }))
        }
    })
}
