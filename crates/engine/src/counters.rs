//! What engines count, for diagnosis.

use std::borrow::Cow;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// Counters by name. The parts of a name go from the general to the special and have dots between them.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Counters(BTreeMap<Cow<'static, str>, u64>);

impl Counters {
    /// The counter of this name, 0 if there is none.
    pub fn get(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    /// All of them by name.
    pub fn iter(&self) -> impl Iterator<Item = (&str, u64)> {
        self.0.iter().map(|(name, &count)| (&**name, count))
    }

    /// Adds those of another vCPU.
    pub fn add(&mut self, other: &Counters) {
        for (name, count) in &other.0 {
            *self.0.entry(name.clone()).or_default() += count;
        }
    }
}

impl<N: Into<Cow<'static, str>>> Extend<(N, u64)> for Counters {
    fn extend<I: IntoIterator<Item = (N, u64)>>(&mut self, counters: I) {
        self.0.extend(counters.into_iter().map(|(name, count)| (name.into(), count)));
    }
}

impl<N: Into<Cow<'static, str>>> FromIterator<(N, u64)> for Counters {
    fn from_iter<I: IntoIterator<Item = (N, u64)>>(counters: I) -> Self {
        let mut all = Self::default();
        all.extend(counters);
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_of_vcpus_are_added_by_name() {
        let mut all = Counters::from_iter([("exits.link", 3), ("tlb.fills", 1)]);
        all.add(&Counters::from_iter([("exits.link", 4), ("flushes", 2)]));
        assert_eq!(all.iter().collect::<Vec<_>>(), [("exits.link", 7), ("flushes", 2), ("tlb.fills", 1)]);
        assert_eq!((all.get("tlb.fills"), all.get("exits")), (1, 0));
    }
}
