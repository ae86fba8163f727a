//! The interrupt command register as a value (SDM volume 3, 10.6).

/// What a message makes its target do (SDM volume 3, 10.6.1 and 10.11.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DeliveryMode {
    /// Interrupt with the message's vector.
    Fixed,
    /// The same, at the one target of lowest priority.
    LowestPriority,
    /// System management interrupt; nothing here takes it.
    Smi,
    /// Non-maskable interrupt.
    Nmi,
    /// INIT.
    Init,
    /// Start-up IPI; the vector is the page number. In a device's message the code is reserved.
    StartUp,
    /// The vector comes from the 8259.
    ExtInt,
    /// Not defined.
    Reserved,
}

impl DeliveryMode {
    /// The mode of a three-bit code.
    pub const fn from_bits(bits: u32) -> Self {
        match bits & 7 {
            0 => Self::Fixed,
            1 => Self::LowestPriority,
            2 => Self::Smi,
            4 => Self::Nmi,
            5 => Self::Init,
            6 => Self::StartUp,
            7 => Self::ExtInt,
            _ => Self::Reserved,
        }
    }
}

/// Destination shorthand (10.6.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shorthand {
    /// The destination field says who.
    None,
    /// The sender.
    OnlySelf,
    /// All.
    All,
    /// All but the sender.
    AllButSelf,
}

/// An interprocessor interrupt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Ipi {
    /// Vector; for a start-up IPI the page number.
    pub vector: u8,
    /// What it does.
    pub mode: DeliveryMode,
    /// Whether the destination is logical.
    pub logical: bool,
    /// Shorthand in place of the destination.
    pub shorthand: Shorthand,
    /// Destination: 8 bits from an xAPIC, 32 from an x2APIC.
    pub destination: u32,
    /// The sender is in x2APIC mode: the destination is 32 bits wide.
    pub wide: bool,
}

/// ICR: the level bit, cleared for "INIT level de-assert".
const LEVEL: u32 = 1 << 14;
/// ICR: level trigger.
const TRIGGER: u32 = 1 << 15;
/// ICR: logical destination.
const LOGICAL: u32 = 1 << 11;

impl Ipi {
    /// The IPI that a write of `low` to the ICR sends. `None` for what does nothing on this generation: "INIT level
    /// de-assert" (10.6.1), undefined delivery modes and shorthands that table 10-3 rules out.
    pub(super) fn from_icr(low: u32, destination: u32, wide: bool) -> Option<Self> {
        let mode = DeliveryMode::from_bits(low >> 8);
        let shorthand = match low >> 18 & 3 {
            0 => Shorthand::None,
            1 => Shorthand::OnlySelf,
            2 => Shorthand::All,
            _ => Shorthand::AllButSelf,
        };
        let includes_self = matches!(shorthand, Shorthand::OnlySelf | Shorthand::All);
        match mode {
            DeliveryMode::Init if low & (LEVEL | TRIGGER) == TRIGGER => return None,
            DeliveryMode::Init | DeliveryMode::StartUp if includes_self => return None,
            DeliveryMode::Smi | DeliveryMode::ExtInt | DeliveryMode::Reserved => return None,
            _ => {}
        }
        Some(Self { vector: low as u8, mode, logical: low & LOGICAL != 0, shorthand, destination, wide })
    }
}
