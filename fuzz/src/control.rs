//! What comes to a machine's control socket, and what a client reads there: lines of JSON.

use arbitrary::Unstructured;
use ruse_manager::protocol::{Answer, Call, ErrorKind, Request, VERSION};
use ruse_vmm::{DiskConfig, NetOption};

use crate::input::{byte, one_in, pick};

/// Pieces of lines, most of which mean something in their place.
const PIECES: [&str; 32] = [
    "{",
    "}",
    "\"version\":1",
    "\"version\":2",
    "\"version\":-1",
    ",",
    ":",
    "[",
    "]",
    "\"request\":\"info\"",
    "\"request\":\"stop\"",
    "\"request\":\"link\",\"up\":true",
    "\"request\":\"attach-disk\",\"disk\":\"",
    "\"request\":\"attach-net\",\"net\":\"",
    "\"request\":\"detach\",\"id\":\"slot1\"",
    "\"answer\":\"done\"",
    "\"answer\":\"attached\",\"id\":\"slot1\"",
    "\"answer\":\"error\",\"kind\":\"failed\",\"message\":\"",
    "\"",
    "\\u0000",
    "\\ud800",
    "/d,format=raw,queues=",
    "64",
    "65536",
    "1e999",
    "user,dns=::1,mtu=",
    "tap=t,queues=",
    ",mac=02:00:00:00:00:01",
    "null",
    "true",
    "\n",
    " ",
];

fn line(u: &mut Unstructured) -> Vec<u8> {
    if one_in(u, 8) {
        return u.bytes(u.len()).unwrap_or_default().to_vec();
    }
    let head = if one_in(u, 3) { "" } else { "{\"version\":1," };
    let pieces = byte(u) % 12;
    let tail = if one_in(u, 3) { "" } else { "}" };
    let mut line = head.as_bytes().to_vec();
    (0..pieces).for_each(|_| line.extend(pick(u, &PIECES).bytes()));
    line.extend(tail.bytes());
    line
}

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let line = line(u);
    match Call::parse(&line) {
        Ok(call) => {
            assert_eq!(call.version, VERSION);
            let text = serde_json::to_vec(&call).expect("a request is written as it was read");
            assert!(!text.contains(&b'\n'));
            assert_eq!(Call::parse(&text).ok(), Some(call.clone()));
            check(call.request);
        }
        Err(Answer::Error { kind: ErrorKind::BadRequest | ErrorKind::BadVersion, message }) => {
            let answer = Answer::error(ErrorKind::BadRequest, message);
            assert!(!serde_json::to_vec(&answer).expect("an answer").contains(&b'\n'), "one line");
        }
        Err(other) => panic!("{other:?} is no answer to what is not understood"),
    }
    // What a machine answers, a client reads or refuses.
    let _ = serde_json::from_slice::<Answer>(&line);
}

/// The words within a request are read as those of the command line.
fn check(request: Request) {
    match request {
        Request::AttachDisk { disk } => {
            if let Ok(disk) = disk.parse::<DiskConfig>() {
                assert!(disk.queues.is_none_or(|queues| (1..=64).contains(&queues)));
            }
        }
        Request::AttachNet { net } => {
            if let Ok(NetOption(Some(net))) = net.parse() {
                assert!(net.mac.is_none_or(|mac| mac.0[0] & 1 == 0));
            }
        }
        _ => {}
    }
}
