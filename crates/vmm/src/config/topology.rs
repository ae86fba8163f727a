//! How vCPUs are arranged.

use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// vCPUs as sockets of cores of threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Topology {
    /// Processor packages.
    pub sockets: u32,
    /// Cores of each.
    pub cores: u32,
    /// Threads of each core.
    pub threads: u32,
}

/// Why a text is not a topology.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopologyError {
    /// Neither a number nor a list of parts.
    #[error("expected a number of CPUs or sockets=N,cores=N,threads=N")]
    Syntax,
    /// A part is named twice.
    #[error("'{0}' is given twice")]
    Twice(&'static str),
}

impl Default for Topology {
    fn default() -> Self {
        Self::flat(1)
    }
}

impl Topology {
    /// One socket of `cores` cores of one thread.
    pub const fn flat(cores: u32) -> Self {
        Self { sockets: 1, cores, threads: 1 }
    }

    /// The number of vCPUs; whatever the parts are, it does not overflow in a way that makes it small.
    pub fn count(&self) -> u64 {
        u64::from(self.sockets).saturating_mul(self.cores.into()).saturating_mul(self.threads.into())
    }
}

impl FromStr for Topology {
    type Err = TopologyError;

    fn from_str(text: &str) -> Result<Self, TopologyError> {
        // Beyond 32 bits any number is as impossible as the next.
        let number = |text: &str| match text.parse::<u64>() {
            Ok(n) if text.bytes().all(|b| b.is_ascii_digit()) => Ok(n.min(u32::MAX.into()) as u32),
            _ => Err(TopologyError::Syntax),
        };
        if !text.contains('=') {
            return Ok(Self::flat(number(text)?));
        }
        let [mut sockets, mut cores, mut threads] = [None; 3];
        for part in text.split(',') {
            let (name, value) = part.split_once('=').ok_or(TopologyError::Syntax)?;
            let (name, place) = match name {
                "sockets" => ("sockets", &mut sockets),
                "cores" => ("cores", &mut cores),
                "threads" => ("threads", &mut threads),
                _ => return Err(TopologyError::Syntax),
            };
            if place.replace(number(value)?).is_some() {
                return Err(TopologyError::Twice(name));
            }
        }
        Ok(Self { sockets: sockets.unwrap_or(1), cores: cores.unwrap_or(1), threads: threads.unwrap_or(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_forms_are_understood() {
        assert_eq!("2".parse(), Ok(Topology::flat(2)));
        assert_eq!("sockets=2,cores=4,threads=1".parse(), Ok(Topology { sockets: 2, cores: 4, threads: 1 }));
        assert_eq!("threads=2".parse(), Ok(Topology { sockets: 1, cores: 1, threads: 2 }));
        assert_eq!("0".parse::<Topology>().unwrap().count(), 0);
    }

    #[test]
    fn other_texts_are_refused() {
        for text in ["", "two", "-1", "+1", "1.5", "cores=", "cores=2,", "cpus=2", "cores", "2,cores=2"] {
            assert_eq!(text.parse::<Topology>(), Err(TopologyError::Syntax), "{text}");
        }
        assert_eq!("cores=2,cores=3".parse::<Topology>(), Err(TopologyError::Twice("cores")));
    }

    #[test]
    fn huge_counts_stay_huge() {
        let all = "sockets=99999999999,cores=99999999999,threads=9".parse::<Topology>().unwrap();
        assert!(all.count() > 1 << 60);
    }
}
