//! Makes the engine that was chosen.

use ruse_dbt::{DbtEngine, DbtOptions};
use ruse_engine::Engine;

use crate::config::MachineConfig;
use crate::doctor::{Choice, ChoiceError, choose};

/// The engine for a machine, and why it is that one.
pub fn engine_for(config: &MachineConfig) -> Result<(Box<dyn Engine>, Choice), ChoiceError> {
    let choice = choose(config.accel)?;
    let options = DbtOptions { tier: config.tier, check: config.check };
    Ok((Box::new(DbtEngine::new(options)), choice))
}
