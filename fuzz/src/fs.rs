//! The server of a shared folder under a hostile client: requests with names, numbers and handles that mean something, and any
//! bytes in their places. Nothing outside the folder is read, changed or made.

use std::fs;
use std::os::unix::fs::symlink;

use arbitrary::Unstructured;
use ruse_fs::abi::{Header, opcode};
use ruse_fs::{Cache, Options, Reply, Request, Server};
use vm_memory::VolatileSlice;

use crate::input::{byte, number, one_in, pick, steps};

/// Requests of one input at most.
const MOST_STEPS: usize = 200;
/// What nobody may read.
const SECRET: &[u8] = b"a secret of the host's";
/// Most bytes of data of a request.
const DATA: usize = 4096;
/// Sizes and places in files; larger ones would fill the host's disk.
const SIZES: [u64; 8] = [0, 1, 7, 4095, 4096, 65_536, 1 << 20, u64::MAX];
/// Names, also such that no folder has.
const NAMES: [&[u8]; 14] = [
    b"a\0",
    b"b\0",
    b"sub\0",
    b"out\0",
    b"up\0",
    b"..\0",
    b".\0",
    b"../secret\0",
    b"sub/../../secret\0",
    b"/\0",
    b"\0",
    b"no end",
    b"\xff\xfe\0",
    b"pipe\0",
];

/// Runs the target.
pub(crate) fn run(data: &[u8]) {
    let u = &mut Unstructured::new(data);
    let around = tempfile::tempdir().expect("a folder");
    let folder = around.path().join("folder");
    let secret = around.path().join("secret");
    fs::create_dir_all(folder.join("sub")).expect("a folder");
    fs::write(&secret, SECRET).expect("a file");
    fs::write(folder.join("a"), "content").expect("a file");
    symlink("../secret", folder.join("out")).expect("a link");
    symlink("..", folder.join("up")).expect("a link");
    let options =
        Options { read_only: one_in(u, 8), cache: pick(u, &[Cache::Never, Cache::Auto, Cache::Always]) };
    let server = Server::new(&folder, options).expect("the folder is there");
    steps(u, MOST_STEPS, |u| step(u, &server));
    let mut names: Vec<_> = fs::read_dir(around.path())
        .expect("it is there")
        .map(|entry| entry.expect("an entry").file_name())
        .collect();
    names.sort_unstable();
    assert_eq!(names, ["folder", "secret"]);
    assert_eq!(fs::read(&secret).expect("it is there"), SECRET);
}

/// One request.
fn step(u: &mut Unstructured, server: &Server) {
    let opcode = u32::from(byte(u)) % 54;
    let header = Header { len: 0, opcode, unique: 1, node: node(u), uid: 0, gid: 0 };
    let body = body(u, opcode);
    let (mut from, mut to) = (vec![7; usize::from(byte(u))], vec![0; DATA]);
    let data = [VolatileSlice::from(&mut from[..])];
    let room = [VolatileSlice::from(&mut to[..])];
    let reply = server.serve(&Request { header, body: &body, data: &data }, &room);
    if let Ok(Reply::Filled(len)) = reply {
        assert!(!to[..len].windows(SECRET.len()).any(|part| part == SECRET), "the secret is out");
    }
}

/// A number of an inode, or of a handle: they are given in their order.
fn node(u: &mut Unstructured) -> u64 {
    if one_in(u, 16) { number(u) } else { u64::from(byte(u) % 10) }
}

/// What follows the header.
fn body(u: &mut Unstructured, opcode: u32) -> Vec<u8> {
    let mut body = Vec::new();
    let (words, longs, names) = shape(opcode);
    for _ in 0..longs {
        let value = if one_in(u, 2) { node(u) } else { pick(u, &SIZES) };
        body.extend(value.to_le_bytes());
    }
    for _ in 0..words {
        let value = if one_in(u, 4) { number(u) as u32 } else { u32::from(byte(u)) << (byte(u) % 3 * 6) };
        body.extend(value.to_le_bytes());
    }
    for _ in 0..names {
        body.extend(pick(u, &NAMES));
    }
    if one_in(u, 32) {
        body.truncate(usize::from(byte(u)) % (body.len() + 1));
    }
    body
}

/// Roughly, of what a request is made: how many fields of 64 bits, then of 32 bits, then names.
fn shape(opcode: u32) -> (usize, usize, usize) {
    match opcode {
        opcode::LOOKUP | opcode::UNLINK | opcode::RMDIR => (0, 0, 1),
        opcode::SYMLINK => (0, 0, 2),
        opcode::MKNOD | opcode::CREATE => (4, 0, 1),
        opcode::MKDIR => (2, 0, 1),
        opcode::RENAME => (0, 1, 2),
        opcode::RENAME2 => (2, 1, 2),
        opcode::LINK => (0, 1, 1),
        opcode::SETATTR => (0, 11, 0),
        opcode::INIT => (16, 0, 0),
        _ => (6, 4, 0),
    }
}
