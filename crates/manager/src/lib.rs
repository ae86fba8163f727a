//! The running machines of a user: each has a folder with its control socket, and the socket of its serial console.
//!
//! A machine's process makes the folder ([`Registry::register`]), answers at the sockets ([`serve`]) and removes the
//! folder at its end. Others find machines with [`Registry::list`] and speak to them with a [`Client`]. What they say
//! is in [`protocol`], and in `docs/control.md`.

mod client;
mod console;
mod error;
pub mod protocol;
mod registry;
mod server;

pub use client::{Client, Ended, attach};
pub use console::{ConsoleHub, SCROLLBACK};
pub use error::ManagerError;
pub use registry::{Entry, Name, Record, Registration, Registry};
pub use server::{Guests, Target, serve};
