//! What is known of the scratch registers, and of what they left in the block, before a host instruction.

use super::super::groups::GROUPS;

/// What T0 holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Address {
    /// Anything.
    #[default]
    Any,
    /// A constant.
    Constant(u64),
    /// The value of this host register.
    Copy(u8),
    /// A distance from a tag of the TLB's entry in T1; at most `limit` if it has been compared.
    FromTag {
        write: bool,
        of: Option<u8>,
        limit: Option<u32>,
    },
    /// A distance from the page that a group remembers.
    FromPage {
        group: usize,
        limit: Option<u32>,
    },
    /// A host address of so many bytes of guest RAM; `write`: they may be written. `of`: the register whose linear address
    /// it is.
    Host {
        span: u32,
        write: bool,
        of: Option<u8>,
    },
    /// T0 and T1 together are a host address of so many bytes of guest RAM.
    Sum {
        span: u32,
        write: bool,
    },
    /// As [`Address::Host`], or 0.
    HostOrZero {
        span: u32,
        write: bool,
    },
    /// The host address for the register `of`, from which on RCX elements of `size` bytes lie on the page.
    Run {
        of: u8,
        size: u32,
        write: bool,
    },
    /// The tag, or the host address, of the entry in T1, which has matched.
    Tag {
        write: bool,
    },
    Page {
        write: bool,
    },
    /// The entries of a view of the TLB.
    View,
}

/// What T1 holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scratch {
    /// Anything.
    #[default]
    Any,
    /// A constant.
    Constant(u64),
    /// No bits but these.
    Bits(u64),
    /// The address of an entry of the TLB.
    Entry,
    /// The same, and the linear address at hand has matched.
    Matched {
        write: bool,
    },
    /// The address of an entry of the jump cache, which is that of the linear address in T0 if `matched`.
    Jump {
        matched: bool,
    },
    /// The lower half of this register; its place on the page; the place behind RCX elements of `size` bytes from there.
    Low(u8),
    Place(u8),
    End {
        of: u8,
        size: u32,
    },
}

/// The last comparison.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Compared {
    /// Nothing that counts.
    #[default]
    Nothing,
    /// T0, T1 or RCX with a number.
    T0(u32),
    T1(u32),
    Rcx(u32),
    /// T0 with 0.
    Zero,
    /// T0 with the entry of the jump cache in T1.
    Jump,
}

/// A page that a group remembers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Remembered {
    /// Anything.
    #[default]
    Unknown,
    /// None: no distance from it is small.
    None,
    /// The linear address is there, the host address is not yet.
    Half { write: bool },
    /// One that is in the TLB with this right.
    Known { write: bool },
}

/// All that is known before an instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct State {
    pub t0: Address,
    pub t1: Scratch,
    pub compared: Compared,
    /// RCX is at most this.
    pub rcx: Option<u32>,
    /// RSI and RDI hold host addresses.
    pub rsi: Address,
    pub rdi: Address,
    /// What was stored into the places of groups, and into the first word of scratch.
    pub groups: [Address; GROUPS],
    pub pages: [Remembered; GROUPS],
    pub saved: Address,
    pub saved_scratch: Scratch,
    /// The flags lie on the host's stack.
    pub pushed: bool,
}

impl Address {
    fn meet(self, other: Self) -> Self {
        use Address::{Any, Host};
        match (self, other) {
            _ if self == other => self,
            (Host { span: a, write: v, of }, Host { span: b, write: w, of: also }) => {
                Host { span: a.min(b), write: v && w, of: of.filter(|_| of == also) }
            }
            _ => Any,
        }
    }

    /// What is left when a register changes.
    fn without(self, register: u8) -> Self {
        match self {
            Address::Copy(of) | Address::Run { of, .. } if of == register => Address::Any,
            Address::FromTag { write, of: Some(of), limit } if of == register => {
                Address::FromTag { write, of: None, limit }
            }
            Address::Host { span, write, of: Some(of) } if of == register => {
                Address::Host { span, write, of: None }
            }
            _ => self,
        }
    }

    /// What is left when T1 leads to another entry.
    fn without_entry(self) -> Self {
        match self {
            Address::FromTag { .. } | Address::Tag { .. } | Address::Page { .. } | Address::Sum { .. } => {
                Address::Any
            }
            _ => self,
        }
    }
}

impl Remembered {
    fn meet(self, other: Self) -> Self {
        use Remembered::{Known, None, Unknown};
        match (self, other) {
            _ if self == other => self,
            (None, Known { write }) | (Known { write }, None) => Known { write },
            (Known { write: v }, Known { write: w }) => Known { write: v && w },
            _ => Unknown,
        }
    }
}

impl State {
    /// If T0 and T1 together are a host address: of how many bytes, and whether they may be written.
    pub fn sum_of_both(&self) -> Option<(u32, bool)> {
        match (self.t0, self.t1) {
            (Address::Sum { span, write }, _) => Some((span, write)),
            (Address::Host { span, write, .. }, Scratch::Constant(0)) => Some((span, write)),
            _ => None,
        }
    }

    fn meet_t0(&self, other: &Self) -> Address {
        match (self.t0.meet(other.t0), self.sum_of_both(), other.sum_of_both()) {
            (Address::Any, Some((a, v)), Some((b, w))) => Address::Sum { span: a.min(b), write: v && w },
            (t0, ..) => t0,
        }
    }

    /// What holds in both.
    pub fn meet(&self, other: &Self) -> Self {
        let t1 = match (self.t1, other.t1) {
            (a, b) if a == b => a,
            (Scratch::Entry | Scratch::Matched { .. }, Scratch::Entry | Scratch::Matched { .. }) => {
                Scratch::Entry
            }
            _ => Scratch::Any,
        };
        Self {
            t0: self.meet_t0(other),
            t1,
            compared: if self.compared == other.compared { self.compared } else { Compared::Nothing },
            rcx: self.rcx.zip(other.rcx).map(|(a, b)| a.max(b)),
            rsi: self.rsi.meet(other.rsi),
            rdi: self.rdi.meet(other.rdi),
            groups: std::array::from_fn(|n| self.groups[n].meet(other.groups[n])),
            pages: std::array::from_fn(|n| self.pages[n].meet(other.pages[n])),
            saved: self.saved.meet(other.saved),
            saved_scratch: if self.saved_scratch == other.saved_scratch {
                self.saved_scratch
            } else {
                Scratch::Any
            },
            pushed: self.pushed || other.pushed,
        }
    }

    /// T1 gets another value.
    pub fn set_t1(&mut self, value: Scratch) {
        self.t1 = value;
        self.t0 = self.t0.without_entry();
        for group in &mut self.groups {
            *group = group.without_entry();
        }
        for page in &mut self.pages {
            if matches!(page, Remembered::Half { .. }) {
                *page = Remembered::Unknown;
            }
        }
    }

    /// A general register that may hold something gets a value of which nothing is known.
    pub fn forget(&mut self, register: u8) {
        match register {
            1 => {
                self.rcx = None;
                for at in [&mut self.t0, &mut self.rsi, &mut self.rdi, &mut self.saved] {
                    if matches!(at, Address::Run { .. }) {
                        *at = Address::Any;
                    }
                }
            }
            6 => self.rsi = Address::Any,
            7 => self.rdi = Address::Any,
            14 => self.t0 = Address::Any,
            15 => self.set_t1(Scratch::Any),
            _ => {}
        }
        self.t0 = self.t0.without(register);
        self.t1 = match self.t1 {
            Scratch::Low(of) | Scratch::Place(of) | Scratch::End { of, .. } if of == register => Scratch::Any,
            Scratch::End { .. } if register == 1 => Scratch::Any,
            t1 => t1,
        };
    }

    /// After an instruction that tier 0 has executed: it takes no page away, so that the block's addresses still hold.
    pub fn forget_registers(&mut self) {
        self.set_t1(Scratch::Any);
        *self = Self { groups: self.groups, pages: self.pages, ..Self::default() };
    }
}
