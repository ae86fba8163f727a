//! What cloud-init in a guest is to set up.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// Files for cloud-init, of which those that the guest needs are made if they are not given.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct SeedConfig {
    /// What to set up: a script, or `#cloud-config`.
    pub user_data: Option<PathBuf>,
    /// Which instance this is, and what it is called.
    pub meta_data: Option<PathBuf>,
    /// Its networks.
    pub network_config: Option<PathBuf>,
}

impl SeedConfig {
    /// These files, if there is any.
    pub fn of(
        user_data: Option<PathBuf>,
        meta_data: Option<PathBuf>,
        network_config: Option<PathBuf>,
    ) -> Option<Self> {
        let given = [&user_data, &meta_data, &network_config].into_iter().any(Option::is_some);
        given.then_some(Self { user_data, meta_data, network_config })
    }
}
