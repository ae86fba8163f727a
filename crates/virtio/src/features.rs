//! Feature bits that are not of one device type (virtio 1.2, 6).

/// Chains may be in tables of their own.
pub const INDIRECT_DESC: u64 = 1 << 28;
/// Notifications and interrupts are suppressed by index.
pub const EVENT_IDX: u64 = 1 << 29;
/// Not a legacy device.
pub const VERSION_1: u64 = 1 << 32;
/// Packed rings.
pub const RING_PACKED: u64 = 1 << 34;
/// Queues can be reset one by one.
pub const RING_RESET: u64 = 1 << 40;

/// What every device here offers.
pub const COMMON: u64 = INDIRECT_DESC | EVENT_IDX | VERSION_1 | RING_PACKED | RING_RESET;
