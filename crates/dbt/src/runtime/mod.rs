//! What runs guest code: the vCPU's loop, the store of translated regions, entry into generated code, host faults.

pub mod blocks;
mod check;
#[cfg(test)]
mod cross_tests;
pub mod engine;
mod enter;
mod fault;
#[cfg(test)]
mod isolation_tests;
#[cfg(test)]
mod lock_tests;
mod marks;
mod mode;
mod packed;
pub mod profile;
mod rewritten;
#[cfg(test)]
mod system_tests;
mod templates;
#[cfg(test)]
mod tests;
mod user;
pub mod vcpu;
