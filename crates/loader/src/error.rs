//! Why a guest could not be loaded: one clear line each, with the name of the file at fault.

use std::fmt;

/// Why a guest could not be loaded.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The path leads nowhere.
    #[error("'{name}': no such file")]
    NoSuchFile {
        /// File at fault.
        name: String,
    },
    /// The file cannot be opened or read.
    #[error("cannot read '{name}': {source}")]
    Read {
        /// File at fault.
        name: String,
        /// The host's answer.
        source: std::io::Error,
    },
    /// The file came through a pipe and is larger than a pipe may be.
    #[error("'{name}' is not a regular file and has more than {}", Size(*.max))]
    TooLarge {
        /// File at fault.
        name: String,
        /// Most bytes taken from a pipe.
        max: u64,
    },
    /// The file is none of the kinds of kernel that can be loaded.
    #[error(
        "'{name}' is not a kernel: it looks like {found}; expected a Linux bzImage, an ELF kernel with a PVH \
         note, an uncompressed 64-bit Linux (vmlinux) or a multiboot kernel"
    )]
    NotAKernel {
        /// File at fault.
        name: String,
        /// What its first bytes say that it is.
        found: String,
    },
    /// The file ends before a part that its headers announce.
    #[error("'{name}' is truncated: {missing} bytes of its {part} are missing")]
    Truncated {
        /// File at fault.
        name: String,
        /// The part that is not whole.
        part: &'static str,
        /// Bytes that the file is too short.
        missing: u64,
    },
    /// A header contradicts itself or its specification.
    #[error("'{name}' has a bad header: {what}")]
    BadHeader {
        /// File at fault.
        name: String,
        /// What is wrong.
        what: String,
    },
    /// A kernel that is valid but needs what this loader does not do.
    #[error("'{name}' cannot be loaded: {what}")]
    Unsupported {
        /// File at fault.
        name: String,
        /// What it needs.
        what: String,
    },
    /// The kernel does not fit in RAM.
    #[error("the VM has {} of RAM, but '{name}' needs at least {}", Size(*.available), Size(*.needed))]
    RamTooSmall {
        /// Kernel that does not fit.
        name: String,
        /// Bytes of RAM that would do.
        needed: u64,
        /// Bytes of usable RAM, counted from address 0 to its first hole.
        available: u64,
    },
    /// An initial RAM disk or module does not fit beside the kernel.
    #[error(
        "the initrd '{name}' of {} does not fit in RAM: {} are free where the kernel can use it",
        Size(*.size), Size(*.space)
    )]
    InitrdDoesNotFit {
        /// Initrd or module at fault.
        name: String,
        /// Its bytes.
        size: u64,
        /// Bytes of the largest free run below the kernel's limit.
        space: u64,
    },
    /// The command line is longer than the kernel can take.
    #[error("the command line has {len} bytes, but '{name}' takes at most {max}")]
    CmdlineTooLong {
        /// Kernel that sets the limit.
        name: String,
        /// Bytes of the command line.
        len: usize,
        /// Most bytes that the kernel takes.
        max: usize,
    },
    /// The command line holds a zero byte, which would end it.
    #[error("the command line contains a zero byte")]
    CmdlineZero,
    /// A name in a list of modules is missing.
    #[error("the list of modules '{list}' has an empty entry")]
    EmptyModule {
        /// The list as given.
        list: String,
    },
    /// The kernel leaves no room in low memory for what is passed to it.
    #[error("'{name}' leaves no room in the first 640 KiB for {what} ({size} bytes)")]
    NoRoom {
        /// Kernel at fault.
        name: String,
        /// What had to be placed.
        what: &'static str,
        /// Its bytes.
        size: u64,
    },
    /// The configuration of the ACPI tables is impossible.
    #[error("cannot describe this machine by ACPI: {0}")]
    Acpi(String),
    /// Guest memory refused an access that the checks allowed; a bug of the loader.
    #[error("cannot write to guest memory: {0}")]
    Memory(#[from] vm_memory::GuestMemoryError),
}

/// Bytes in the largest unit that loses nothing that a reader needs.
pub(crate) struct Size(pub u64);

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const UNITS: [(u32, &str); 3] = [(30, "GiB"), (20, "MiB"), (10, "KiB")];
        for (shift, unit) in UNITS {
            if self.0 >= 1 << shift {
                let tenths = (u128::from(self.0) * 10).div_ceil(1 << shift);
                return match tenths % 10 {
                    0 => write!(f, "{} {unit}", tenths / 10),
                    part => write!(f, "{}.{part} {unit}", tenths / 10),
                };
            }
        }
        write!(f, "{} bytes", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        let shown: Vec<_> =
            [0, 1023, 1024, 1025, 1 << 20, 3 << 29, u64::MAX].map(|n| Size(n).to_string()).into();
        assert_eq!(
            shown,
            ["0 bytes", "1023 bytes", "1 KiB", "1.1 KiB", "1 MiB", "1.5 GiB", "17179869184 GiB"]
        );
    }

    #[test]
    fn errors_are_one_line() {
        let e = LoadError::InitrdDoesNotFit { name: "initrd.img".into(), size: 50 << 20, space: 3 << 20 };
        assert_eq!(
            e.to_string(),
            "the initrd 'initrd.img' of 50 MiB does not fit in RAM: 3 MiB are free where the kernel can use it"
        );
    }
}
