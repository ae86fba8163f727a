//! What a watchdog does, in a word.

use std::str::FromStr;

use ruse_devices::Power;
use serde::{Deserialize, Serialize};

/// What becomes of a machine whose system does not answer its watchdog in time.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum WatchdogAction {
    /// It is reset.
    Reset,
    /// It ends, as if its system had powered it off.
    Poweroff,
    /// It is held until its user lets it go on.
    Pause,
    /// Nothing but a message.
    None,
}

impl WatchdogAction {
    pub(crate) fn power(self) -> Option<Power> {
        match self {
            Self::Reset => Some(Power::Reset),
            Self::Poweroff => Some(Power::Off),
            Self::Pause => Some(Power::Pause),
            Self::None => None,
        }
    }
}

impl FromStr for WatchdogAction {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "reset" => Ok(Self::Reset),
            "poweroff" => Ok(Self::Poweroff),
            "pause" => Ok(Self::Pause),
            "none" => Ok(Self::None),
            _ => Err("expected reset, poweroff, pause or none".into()),
        }
    }
}
