//! A client's requests, and what becomes of the folder.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;

use rustix::io::Errno;
use vm_memory::VolatileSlice;

use crate::abi::{Answer, Header, ROOT, init, opcode, set};
use crate::{Cache, Options, Reply, Request, Server};

const RDWR: u32 = 2;

/// A folder that is served, in another one.
struct Bench {
    around: tempfile::TempDir,
    server: Server,
}

impl Bench {
    fn new() -> Self {
        Self::with(Options::default())
    }

    fn with(options: Options) -> Self {
        let around = tempfile::tempdir().unwrap();
        fs::create_dir(around.path().join("folder")).unwrap();
        fs::write(around.path().join("secret"), "secret").unwrap();
        let server = Server::new(&around.path().join("folder"), options).unwrap();
        Self { around, server }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.around.path().join("folder").join(name)
    }

    fn ask_with(
        &self,
        opcode: u32,
        node: u64,
        body: Answer,
        data: &mut [u8],
        to: &mut [u8],
    ) -> Result<Reply, Errno> {
        let header = Header { len: 0, opcode, unique: 1, node, uid: 0, gid: 0 };
        let data = [VolatileSlice::from(data)];
        let request = Request { header, body: &body.into_bytes(), data: &data };
        self.server.serve(&request, &[VolatileSlice::from(to)])
    }

    fn ask(&self, opcode: u32, node: u64, body: Answer) -> Result<Vec<u8>, Errno> {
        self.ask_with(opcode, node, body, &mut [], &mut []).map(|reply| match reply {
            Reply::Bytes(bytes) => bytes,
            Reply::None => Vec::new(),
            Reply::Filled(_) => panic!("nothing is read"),
        })
    }

    fn lookup(&self, folder: u64, name: &str) -> Result<u64, Errno> {
        self.ask(opcode::LOOKUP, folder, text(&[name])).map(|entry| long(&entry, 0))
    }

    fn open(&self, node: u64, flags: u32) -> Result<u64, Errno> {
        self.ask(opcode::OPEN, node, Answer::default().word(flags).word(0)).map(|open| long(&open, 0))
    }

    fn create(&self, folder: u64, name: &str) -> Result<(u64, u64), Errno> {
        let body = Answer::default().word(RDWR).word(0o644).word(0).word(0).bytes(&zeroed(name));
        let made = self.ask(opcode::CREATE, folder, body)?;
        assert_eq!(made.len(), 128 + 16);
        Ok((long(&made, 0), long(&made, 128)))
    }

    fn write(&self, handle: u64, at: u64, bytes: &mut [u8]) -> Result<Reply, Errno> {
        let body = Answer::default().long(handle).long(at).word(bytes.len() as u32).bytes(&[0; 20]);
        self.ask_with(opcode::WRITE, ROOT, body, bytes, &mut [])
    }

    fn read(&self, handle: u64, at: u64, len: usize) -> Result<Vec<u8>, Errno> {
        let mut bytes = vec![0; len];
        let body = Answer::default().long(handle).long(at).word(len as u32).bytes(&[0; 20]);
        match self.ask_with(opcode::READ, ROOT, body, &mut [], &mut bytes)? {
            Reply::Filled(read) => bytes.truncate(read),
            other => panic!("{other:?}"),
        }
        Ok(bytes)
    }
}

fn zeroed(name: &str) -> Vec<u8> {
    [name.as_bytes(), &[0]].concat()
}

fn text(words: &[&str]) -> Answer {
    words.iter().fold(Answer::default(), |answer, word| answer.bytes(&zeroed(word)))
}

fn long(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

#[test]
fn a_client_and_the_server_agree() {
    let bench = Bench::new();
    let hello = |major, minor| {
        let body = Answer::default().word(major).word(minor).word(0x2_0000).word(u32::MAX).bytes(&[0; 48]);
        bench.ask(opcode::INIT, 0, body)
    };
    let answer = hello(7, 38).unwrap();
    assert_eq!((answer.len(), word(&answer, 0), word(&answer, 4), word(&answer, 8)), (64, 7, 38, 0x2_0000));
    assert_eq!(word(&answer, 12) & (init::WRITEBACK_CACHE | init::MAX_PAGES), init::MAX_PAGES);
    assert_eq!((word(&answer, 20), word(&answer, 28)), (1 << 20, 256));
    assert_eq!(word(&hello(7, 99).unwrap(), 4), 38);
    assert_eq!(word(&hello(8, 0).unwrap(), 0), 7);
    assert_eq!(hello(7, 23), Err(Errno::PROTO));
    assert_eq!(bench.ask(opcode::INIT, 0, Answer::default()), Err(Errno::INVAL));
    assert_eq!(bench.ask(4711, 1, Answer::default()), Err(Errno::NOSYS));
}

#[test]
fn a_file_is_made_written_read_and_removed() {
    let bench = Bench::new();
    let (node, handle) = bench.create(ROOT, "file").unwrap();
    assert_eq!(
        bench.write(handle, 3, &mut b"abc".to_owned()),
        Ok(Reply::Bytes(vec![3, 0, 0, 0, 0, 0, 0, 0]))
    );
    assert_eq!(bench.read(handle, 1, 10).unwrap(), b"\0\0abc");
    assert_eq!(fs::read(bench.path("file")).unwrap(), b"\0\0\0abc");
    assert_eq!(bench.lookup(ROOT, "file"), Ok(node));
    let other = bench.open(node, 0).unwrap();
    assert_eq!(bench.write(other, 0, &mut [1]), Err(Errno::BADF), "it is open for reading");
    let attributes = bench.ask(opcode::GETATTR, node, Answer::default()).unwrap();
    assert_eq!((attributes.len(), long(&attributes, 24), word(&attributes, 16 + 60)), (104, 6, 0o100_644));
    bench.ask(opcode::UNLINK, ROOT, text(&["file"])).unwrap();
    assert_eq!(bench.read(other, 3, 3).unwrap(), b"abc", "what is open stays");
    assert_eq!(bench.lookup(ROOT, "file"), Err(Errno::NOENT));
    bench.ask(opcode::RELEASE, node, Answer::default().long(other).bytes(&[0; 16])).unwrap();
    assert_eq!(bench.read(other, 3, 3), Err(Errno::BADF));
    bench.ask(opcode::FORGET, node, Answer::default().long(2)).unwrap();
    assert_eq!(bench.ask(opcode::GETATTR, node, Answer::default()), Err(Errno::STALE));
}

#[test]
fn nothing_outside_is_reached() {
    let bench = Bench::new();
    symlink("../secret", bench.path("link")).unwrap();
    symlink("/", bench.path("root")).unwrap();
    for name in ["..", ".", "", "../secret", "link/../../secret", "/etc/passwd"] {
        assert_eq!(bench.lookup(ROOT, name), Err(Errno::INVAL), "{name}");
        assert_eq!(bench.create(ROOT, name).err(), Some(Errno::INVAL), "{name}");
        assert_eq!(bench.ask(opcode::UNLINK, ROOT, text(&[name])), Err(Errno::INVAL), "{name}");
    }
    let (link, root) = (bench.lookup(ROOT, "link").unwrap(), bench.lookup(ROOT, "root").unwrap());
    assert_eq!(bench.ask(opcode::READLINK, link, Answer::default()).unwrap(), b"../secret");
    assert_eq!(bench.open(link, 0), Err(Errno::NXIO));
    assert_eq!(bench.ask(opcode::OPENDIR, root, Answer::default()).err(), Some(Errno::NOTDIR));
    assert!(bench.lookup(root, "etc").is_err());
    assert_eq!(bench.create(ROOT, "link").err(), Some(Errno::NXIO));
    let size = Answer::default().word(set::SIZE).bytes(&[0; 84]);
    assert_eq!(bench.ask(opcode::SETATTR, link, size), Err(Errno::NXIO));
    let mode = Answer::default().word(set::MODE).bytes(&[0; 84]);
    assert_eq!(bench.ask(opcode::SETATTR, link, mode), Err(Errno::OPNOTSUPP));
    assert_eq!(fs::read(bench.around.path().join("secret")).unwrap(), b"secret");
    assert_eq!(fs::metadata(bench.around.path().join("secret")).unwrap().mode() & 0o444, 0o444);
}

#[test]
fn special_files_are_the_guests_own() {
    let bench = Bench::new();
    let node =
        |kind: u32, name: &str| Answer::default().word(kind | 0o600).bytes(&[0; 12]).bytes(&zeroed(name));
    for (kind, made) in [(0o010_000, true), (0o140_000, true), (0o020_000, false), (0o060_000, false)] {
        let name = format!("{kind:o}");
        let result = bench.ask(opcode::MKNOD, ROOT, node(kind, &name));
        assert_eq!(result.is_ok(), made, "{kind:o}: {result:?}");
        if made {
            assert_eq!(
                bench.open(bench.lookup(ROOT, &name).unwrap(), 0),
                Err(Errno::NXIO),
                "nobody waits for it"
            );
            assert_eq!(bench.create(ROOT, &name).err(), Some(Errno::NXIO));
        }
    }
    assert!(fs::metadata(bench.path("10000")).unwrap().file_type().is_fifo());
}

#[test]
fn a_folder_is_read_in_parts_by_names_and_with_numbers() {
    let bench = Bench::new();
    let names: Vec<_> = (0..500).map(|n| format!("a rather long name of a file {n}")).collect();
    names.iter().for_each(|name| fs::write(bench.path(name), "").unwrap());
    let handle = long(&bench.ask(opcode::OPENDIR, ROOT, Answer::default()).unwrap(), 0);
    for plus in [false, true] {
        let (mut found, mut position) = (Vec::new(), 0);
        loop {
            let body = Answer::default().long(handle).long(position).word(4096).bytes(&[0; 20]);
            let kind = if plus { opcode::READDIRPLUS } else { opcode::READDIR };
            let part = bench.ask(kind, ROOT, body).unwrap();
            assert!(part.len() <= 4096);
            let mut rest = &part[..];
            if rest.is_empty() {
                break;
            }
            while !rest.is_empty() {
                let known = plus.then(|| long(rest, 0));
                let entry = if plus { &rest[128..] } else { rest };
                let len = word(entry, 16) as usize;
                let name = std::str::from_utf8(&entry[24..24 + len]).unwrap().to_owned();
                position = long(entry, 8);
                if let Some(known) = known.filter(|_| !name.starts_with('.')) {
                    assert_eq!(bench.lookup(ROOT, &name), Ok(known));
                }
                found.push(name);
                rest = &entry[(24 + len).next_multiple_of(8)..];
            }
        }
        found.sort_unstable();
        let mut all: Vec<_> = names.iter().cloned().chain([".".into(), "..".into()]).collect();
        all.sort_unstable();
        assert_eq!(found, all);
    }
}

#[test]
fn names_are_moved_linked_and_swapped() {
    let bench = Bench::new();
    let body = Answer::default().word(0o750).word(0).bytes(&zeroed("sub"));
    let sub = long(&bench.ask(opcode::MKDIR, ROOT, body).unwrap(), 0);
    let (node, _) = bench.create(ROOT, "one").unwrap();
    let to = |flags: Option<u32>, names| {
        let head = Answer::default().long(sub);
        let head = if let Some(flags) = flags { head.word(flags).word(0) } else { head };
        head.bytes(&text(names).into_bytes())
    };
    bench.ask(opcode::RENAME, ROOT, to(None, &["one", "two"])).unwrap();
    assert_eq!((bench.lookup(sub, "two"), bench.lookup(ROOT, "one")), (Ok(node), Err(Errno::NOENT)));
    let link = Answer::default().long(node).bytes(&zeroed("three"));
    let linked = bench.ask(opcode::LINK, ROOT, link).unwrap();
    assert_eq!((long(&linked, 0), word(&linked, 40 + 64)), (node, 2));
    bench.create(ROOT, "four").unwrap();
    assert_eq!(bench.ask(opcode::RENAME2, ROOT, to(Some(1), &["four", "two"])), Err(Errno::EXIST));
    bench.ask(opcode::RENAME2, ROOT, to(Some(2), &["four", "two"])).unwrap();
    assert_eq!(bench.lookup(ROOT, "four"), Ok(node), "they are swapped");
    assert_eq!(bench.ask(opcode::RENAME2, ROOT, to(Some(4), &["four", "five"])), Err(Errno::INVAL));
    assert_eq!(bench.ask(opcode::RMDIR, ROOT, text(&["sub"])), Err(Errno::NOTEMPTY));
    bench.ask(opcode::UNLINK, sub, text(&["two"])).unwrap();
    bench.ask(opcode::RMDIR, ROOT, text(&["sub"])).unwrap();
    let symlink = bench.ask(opcode::SYMLINK, ROOT, text(&["five", "/any/where"])).unwrap();
    assert_eq!(fs::read_link(bench.path("five")).unwrap().to_str(), Some("/any/where"));
    assert_eq!(bench.ask(opcode::READLINK, long(&symlink, 0), Answer::default()).unwrap(), b"/any/where");
}

#[test]
fn attributes_are_set() {
    let bench = Bench::new();
    let (node, handle) = bench.create(ROOT, "file").unwrap();
    let valid = set::MODE | set::SIZE | set::ATIME | set::MTIME | set::HANDLE;
    let body =
        Answer::default().word(valid).word(0).long(handle).long(1000).long(0).long(11).long(22).long(0);
    let body = body.word(5).word(6).word(0).word(0o100_4711).word(0).word(0).word(0).word(0);
    let answer = bench.ask(opcode::SETATTR, node, body).unwrap();
    assert_eq!((long(&answer, 24), word(&answer, 76) & 0o7777), (1000, 0o4711));
    let metadata = fs::metadata(bench.path("file")).unwrap();
    assert_eq!(
        (metadata.atime(), metadata.atime_nsec(), metadata.mtime(), metadata.mtime_nsec()),
        (11, 5, 22, 6)
    );
    assert_eq!((metadata.len(), metadata.permissions().mode() & 0o7777), (1000, 0o4711));
    let now = Answer::default().word(set::MTIME | set::MTIME_NOW).bytes(&[0; 84]);
    bench.ask(opcode::SETATTR, node, now).unwrap();
    let later = fs::metadata(bench.path("file")).unwrap();
    assert!(later.mtime() > 1_000_000 && later.atime() == 11);
    for owner in [set::UID, set::GID] {
        let nobody = Answer::default().word(owner).bytes(&[0xff; 84]);
        assert_eq!(bench.ask(opcode::SETATTR, node, nobody), Err(Errno::INVAL));
    }
}

#[test]
fn what_is_served_to_be_read_is_not_changed() {
    let bench = Bench::with(Options { read_only: true, cache: Cache::Always });
    fs::write(bench.path("file"), "content").unwrap();
    let node = bench.lookup(ROOT, "file").unwrap();
    assert_eq!(bench.open(node, RDWR), Err(Errno::ROFS));
    let handle = bench.open(node, 0).unwrap();
    assert_eq!(bench.read(handle, 0, 100).unwrap(), b"content");
    assert_eq!(bench.write(handle, 0, &mut [1]), Err(Errno::ROFS));
    assert_eq!(bench.create(ROOT, "other").err(), Some(Errno::ROFS));
    for opcode in [opcode::UNLINK, opcode::RMDIR, opcode::MKDIR, opcode::RENAME, opcode::SETATTR] {
        assert_eq!(bench.ask(opcode, ROOT, text(&["file", "file", "file"])), Err(Errno::ROFS));
    }
}

#[test]
fn data_move_within_the_host() {
    let bench = Bench::new();
    let ((_, one), (_, other)) = (bench.create(ROOT, "one").unwrap(), bench.create(ROOT, "other").unwrap());
    bench.write(one, 0, &mut [7; 5000]).unwrap();
    let copy = Answer::default().long(one).long(1000).long(0).long(other).long(10).long(3000).long(0);
    assert_eq!(word(&bench.ask(opcode::COPY_FILE_RANGE, ROOT, copy).unwrap(), 0), 3000);
    assert_eq!(bench.read(other, 0, 5000).unwrap(), [&[0; 10][..], &[7; 3000]].concat());
    let allocate = Answer::default().long(other).long(0).long(8000).word(0).word(0);
    bench.ask(opcode::FALLOCATE, ROOT, allocate).unwrap();
    assert_eq!(fs::metadata(bench.path("other")).unwrap().len(), 8000);
    let hole = Answer::default().long(one).long(0).word(4).word(0);
    assert_eq!(long(&bench.ask(opcode::LSEEK, ROOT, hole).unwrap(), 0), 5000);
    let sync = |handle| Answer::default().long(handle).word(1).word(0);
    bench.ask(opcode::FSYNC, ROOT, sync(one)).unwrap();
    bench.ask(opcode::FSYNCDIR, ROOT, sync(0)).unwrap();
    bench.ask(opcode::SYNCFS, ROOT, Answer::default().long(0)).unwrap();
    assert_eq!(bench.ask(opcode::STATFS, ROOT, Answer::default()).unwrap().len(), 80);
}

#[test]
fn a_confined_thread_serves_but_reaches_nothing_else() {
    let bench = Bench::new();
    fs::write(bench.path("file"), "content").unwrap();
    std::thread::scope(|scope| {
        let serving = scope.spawn(|| {
            bench.server.confine();
            let (node, _) = bench.create(ROOT, "new").unwrap();
            let handle = bench.open(bench.lookup(ROOT, "file").unwrap(), RDWR).unwrap();
            assert_eq!(bench.read(handle, 0, 100).unwrap(), b"content");
            let mode = Answer::default().word(set::MODE).bytes(&[0; 64]).word(0o666).bytes(&[0; 16]);
            bench.ask(opcode::SETATTR, node, mode).unwrap();
            fs::read(bench.around.path().join("secret")).is_err()
        });
        if !serving.join().unwrap() {
            eprintln!("SKIPPED: this kernel has no Landlock");
        }
    });
    assert_eq!(fs::metadata(bench.path("new")).unwrap().mode() & 0o777, 0o666);
}

#[test]
fn a_folder_that_is_not_there_is_named() {
    let error = Server::new("/no/such/folder".as_ref(), Options::default()).unwrap_err();
    assert_eq!(error.to_string(), "cannot open '/no/such/folder': No such file or directory (os error 2)");
    let error = Server::new("/proc/self/stat".as_ref(), Options::default()).unwrap_err();
    assert!(error.to_string().contains("Not a directory"), "{error}");
}
