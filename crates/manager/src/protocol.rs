//! What is said at a machine's control socket: a line of JSON for each request, and one for its answer.

use ruse_vmm::{BalloonInfo, DiskInfo, MachineConfig, MachineInfo, MemoryInfo, NetInfo};
use serde::{Deserialize, Serialize};

/// The version of the protocol. It grows when a program that knows the one before would misunderstand.
pub const VERSION: u32 = 1;
/// Most bytes of a line of a request.
pub const LINE_LIMIT: u64 = 64 << 10;

/// What a machine is asked.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "kebab-case")]
pub enum Request {
    /// What it is doing, in detail.
    Info,
    /// Hold its vCPUs.
    Pause,
    /// Let them run on.
    Resume,
    /// Reset it.
    Reset,
    /// Press its power button: the guest's system shuts down, if it listens.
    PowerButton,
    /// End it at once.
    Stop,
    /// Let its guest have so much RAM.
    Memory {
        /// Bytes.
        size: u64,
    },
    /// Ask its guest to give back so much by the balloon.
    Balloon {
        /// Bytes.
        size: u64,
    },
    /// Plug or pull the cable of network devices.
    Link {
        /// Plug it.
        up: bool,
        /// Which one, as [`Info::nets`] names it; all without a word of it.
        #[serde(default)]
        device: Option<String>,
    },
    /// Put a disk into a slot.
    AttachDisk {
        /// The disk in the words of `ruse run --disk`; relative paths are those of the machine's process.
        disk: String,
    },
    /// Put a network device into a slot.
    AttachNet {
        /// The network in the words of `ruse run --net`.
        net: String,
    },
    /// Take a device out of its slot, as soon as the guest's system lets go of it.
    Detach {
        /// What it was called when it was attached.
        id: String,
        /// Do not wait for the guest's system.
        #[serde(default)]
        force: bool,
    },
}

/// A request as it is on the wire.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Call {
    /// The version of the protocol that is spoken.
    pub version: u32,
    /// What is asked.
    #[serde(flatten)]
    pub request: Request,
}

impl Call {
    /// Reads a line.
    pub fn parse(line: &[u8]) -> Result<Self, Answer> {
        #[derive(Deserialize)]
        struct Header {
            version: u32,
        }
        let bad = |error: serde_json::Error| Answer::error(ErrorKind::BadRequest, error.to_string());
        let Header { version } = serde_json::from_slice(line).map_err(bad)?;
        if version != VERSION {
            let message = format!("version {version} of the protocol is not known here, {VERSION} is");
            return Err(Answer::error(ErrorKind::BadVersion, message));
        }
        serde_json::from_slice(line).map_err(bad)
    }
}

/// What a machine answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub enum Answer {
    /// It is done, or begun.
    Done,
    /// To [`Request::AttachDisk`] and [`Request::AttachNet`].
    Attached {
        /// What the device is called.
        id: String,
    },
    /// To [`Request::Info`].
    Info(Box<Info>),
    /// It is not done.
    Error {
        /// For programs.
        kind: ErrorKind,
        /// For people.
        message: String,
    },
}

impl Answer {
    /// An error.
    pub fn error(kind: ErrorKind, message: impl Into<String>) -> Self {
        Self::Error { kind, message: message.into() }
    }
}

/// Why a request is not done.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum ErrorKind {
    /// The request is not understood.
    BadRequest,
    /// The version of the protocol is another one.
    BadVersion,
    /// The machine cannot do so: there is no such device, no free slot, no such file and the like.
    Impossible,
    /// The machine has ended.
    Ended,
    /// It failed.
    Failed,
}

/// What a machine tells about itself.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Info {
    /// The version of Ruse that runs it.
    pub ruse: String,
    /// Its process.
    pub pid: u32,
    /// What it is doing.
    #[serde(flatten)]
    pub machine: MachineInfo,
    /// Its RAM, if it can have more or less.
    pub pluggable: Option<MemoryInfo>,
    /// Its balloon. Each answer asks the guest for its statistics, which the next one has.
    pub balloon: Option<BalloonInfo>,
    /// Its disks.
    pub disks: Vec<DiskInfo>,
    /// Its network devices.
    #[serde(default)]
    pub nets: Vec<NetInfo>,
    /// What it was made from.
    pub config: MachineConfig,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_is_one_line_that_says_its_version() {
        let call = Call { version: VERSION, request: Request::PowerButton };
        let line = serde_json::to_string(&call).unwrap();
        assert_eq!(line, r#"{"version":1,"request":"power-button"}"#);
        assert_eq!(Call::parse(line.as_bytes()).unwrap(), call);
        let call = Call { version: VERSION, request: Request::Memory { size: 1 << 40 } };
        let line = serde_json::to_string(&call).unwrap();
        assert_eq!(line, r#"{"version":1,"request":"memory","size":1099511627776}"#);
        assert_eq!(Call::parse(line.as_bytes()).unwrap(), call);
        let line = r#"{"version":1,"request":"detach","id":"slot1"}"#;
        let request = Request::Detach { id: "slot1".into(), force: false };
        assert_eq!(Call::parse(line.as_bytes()).unwrap(), Call { version: VERSION, request });
    }

    #[test]
    fn what_is_not_understood_is_answered() {
        for (line, kind) in [
            ("", ErrorKind::BadRequest),
            ("{}", ErrorKind::BadRequest),
            (r#"{"version":1}"#, ErrorKind::BadRequest),
            (r#"{"version":1,"request":"dance"}"#, ErrorKind::BadRequest),
            (r#"{"version":1,"request":"memory"}"#, ErrorKind::BadRequest),
            (r#"{"version":1,"request":"balloon","size":-1}"#, ErrorKind::BadRequest),
            (r#"{"version":2,"request":"dance"}"#, ErrorKind::BadVersion),
            (r#"{"version":-1,"request":"info"}"#, ErrorKind::BadRequest),
        ] {
            let Err(Answer::Error { kind: found, .. }) = Call::parse(line.as_bytes()) else {
                panic!("{line} is accepted")
            };
            assert_eq!(found, kind, "{line}");
        }
    }
}
