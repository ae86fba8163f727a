//! Makes the engine that was chosen.

use ruse_dbt::{DbtEngine, DbtOptions, DirectMode, ProfileOptions};
use ruse_engine::Engine;
use ruse_kvm::KvmEngine;

use crate::config::{Accel, Direct, MachineConfig};
use crate::doctor::{Choice, ChoiceError};

/// The engine that was chosen for a machine.
pub fn engine_for(config: &MachineConfig, choice: &Choice) -> Result<Box<dyn Engine>, ChoiceError> {
    Ok(match choice.engine {
        Accel::Kvm => Box::new(KvmEngine::open()?),
        Accel::Dbt | Accel::Auto => {
            let direct = match config.direct {
                Direct::Auto => DirectMode::Auto,
                Direct::Always => DirectMode::Always,
                Direct::Off => DirectMode::Off,
            };
            let options =
                DbtOptions { tier: config.tier, check: config.check, direct, ..DbtOptions::default() };
            let profile = ProfileOptions { perf_map: config.perf_map, jitdump: config.jitdump.clone() };
            Box::new(DbtEngine::with_profile(options, profile))
        }
    })
}
