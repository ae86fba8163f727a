//! Names of programs: what they do, and the seed from which they are made.

use std::fmt;
use std::str::FromStr;

use ruse_random::Random;

use crate::programs::{KINDS, Kind};

/// A program.
#[derive(Clone, Copy)]
pub struct Name {
    /// What it does.
    pub kind: &'static Kind,
    /// From which all of it is made.
    pub seed: u64,
}

impl Name {
    /// The `n`th program of a run.
    pub fn nth(seed: u64, n: u64) -> Name {
        let seed = Random::new(Random::new(seed).word().wrapping_add(n)).word();
        Name { kind: &KINDS[n as usize % KINDS.len()], seed }
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{:016x}", self.kind.name, self.seed)
    }
}

impl FromStr for Name {
    type Err = &'static str;

    fn from_str(text: &str) -> Result<Name, &'static str> {
        let (kind, seed) = text.split_once('-').ok_or("a name is KIND-SEED")?;
        let kind = KINDS.iter().find(|known| known.name == kind).ok_or("there are no such programs")?;
        let seed = u64::from_str_radix(seed, 16).map_err(|_| "a seed has hexadecimal digits")?;
        Ok(Name { kind, seed })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_says_which_program_it_is() {
        for n in 0..20 {
            let name = Name::nth(7, n);
            let read: Name = name.to_string().parse().unwrap();
            assert_eq!((read.kind.name, read.seed), (name.kind.name, name.seed));
        }
        assert_ne!(Name::nth(7, 0).seed, Name::nth(8, 0).seed);
        for wrong in ["", "code", "nothing-1", "code-x"] {
            assert!(wrong.parse::<Name>().is_err(), "{wrong}");
        }
    }
}
