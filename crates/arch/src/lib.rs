//! Guest-visible x86 architecture as plain data: registers, model-specific registers, descriptors,
//! exceptions, page-table formats and walks. Nothing here calls the host.
//!
//! Section numbers are those of the Intel 64 and IA-32 Architectures Software Developer's Manual (SDM)
//! unless AMD's manual (APM) is named.

pub mod exception;
pub mod flags;
pub mod lapic;
pub mod msr;
pub mod paging;
pub mod paravirt;
pub mod segment;
pub mod state;

pub use exception::Exception;
pub use lapic::LapicState;
pub use paravirt::Paravirt;
pub use segment::{DescriptorTable, Segment};
pub use state::{FpuState, MpState, VcpuState};
