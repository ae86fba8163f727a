//! Processes: trees of them that share pages until one writes, pipes between them, and programs that are executed.

use std::env;
use std::io::{PipeReader, PipeWriter, Read, Write, pipe};
use std::os::unix::process::CommandExt;
use std::process::{Command, ExitCode, Stdio};

use ruse_random::Random;

use crate::digest::Digest;
use crate::memory::{Mapping, PAGE, RW};
use crate::process;

/// The word by which this program is told that it is one that a stress program executes.
pub const EXECUTED: &str = "executed";
/// Pages that a tree of processes shares.
const PAGES: u64 = 48;
/// Generations of a tree.
const DEPTH: u32 = 3;

/// What a program that is executed does: it reads a number, and gives another.
pub fn executed(value: &str) -> ExitCode {
    let mut read = [0; 8];
    std::io::stdin().read_exact(&mut read).expect("eight bytes");
    let answer = reply(value.parse().expect("a number"), u64::from_le_bytes(read));
    std::io::stdout().write_all(&answer.to_le_bytes()).expect("somebody who reads");
    ExitCode::from(answer as u8)
}

fn reply(value: u64, read: u64) -> u64 {
    Random::new(value ^ read.rotate_left(7)).word()
}

/// A tree, a ring and some programs.
pub fn run(random: &mut Random) -> u64 {
    let mut sum = Digest::default();
    let memory = Mapping::new(PAGES as usize * PAGE, RW);
    let mut values = vec![0; PAGES as usize];
    sum.add(tree(&memory, &mut values, DEPTH, random));
    sum.add(ring(random));
    for _ in 0..2 {
        sum.add(execute(random));
    }
    sum.value()
}

/// Writes to some pages, forks, writes to others in each of the processes, and checks all of them.
fn tree(memory: &Mapping, values: &mut [u64], depth: u32, random: &mut Random) -> u64 {
    let word = |page: usize| memory.start().wrapping_add(page * PAGE + page * 8).cast::<u64>();
    let change = |values: &mut [u64], random: &mut Random| {
        for _ in 0..random.below(PAGES) {
            let page = random.below(PAGES) as usize;
            values[page] = random.word();
            // SAFETY: within the mapping, which only this process writes.
            unsafe { word(page).write_volatile(values[page]) };
        }
    };
    let same = |values: &[u64]| {
        for (page, value) in values.iter().enumerate() {
            // SAFETY: as above.
            assert_eq!(unsafe { word(page).read_volatile() }, *value, "page {page} of generation {depth}");
        }
    };
    change(values, random);
    let mut sum = Digest::default();
    if depth > 0 {
        let children: Vec<_> = (0..2)
            .map(|_| {
                let (mut reader, mut writer) = pipe().expect("a pipe");
                let mut own = Random::new(random.word());
                let child = process::fork(|| {
                    let sum = tree(memory, values, depth - 1, &mut own);
                    put(&mut writer, sum);
                });
                change(values, random);
                same(values);
                (child, take(&mut reader))
            })
            .collect();
        for (child, found) in children {
            process::wait(child).expect("a child that finds nothing wrong");
            sum.add(found);
        }
    }
    same(values);
    values.iter().for_each(|value| sum.add(*value));
    sum.value()
}

/// Processes that hand a number on, round and round.
fn ring(random: &mut Random) -> u64 {
    let count = 2 + random.below(2);
    let (turns, mut number) = (20 + random.below(60), random.word());
    let (mut reader, first) = pipe().expect("a pipe");
    let mut children = Vec::new();
    for n in 1..count {
        let (next, mut writer) = pipe().expect("a pipe");
        children.push(process::fork(|| {
            for _ in 0..turns {
                let got = take(&mut reader);
                put(&mut writer, reply(n, got));
            }
        }));
        reader = next;
    }
    let mut first = first;
    for _ in 0..turns {
        let expected = (1..count).fold(number, |number, n| reply(n, number));
        put(&mut first, number);
        number = take(&mut reader);
        assert_eq!(number, expected, "a number that went round {count} processes");
    }
    for child in children {
        process::wait(child).expect("a process of the ring");
    }
    number
}

fn put(to: &mut PipeWriter, value: u64) {
    to.write_all(&value.to_le_bytes()).expect("somebody who reads");
}

fn take(from: &mut PipeReader) -> u64 {
    let mut bytes = [0; 8];
    from.read_exact(&mut bytes).expect("somebody who writes");
    u64::from_le_bytes(bytes)
}

/// Executes this program as another one: by `vfork` and `execve`, or by a fork first.
fn execute(random: &mut Random) -> u64 {
    let (value, sent, fork_first) = (random.word(), random.word(), random.chance(50));
    let path = env::args().next().expect("the path of this program");
    let mut command = Command::new(path);
    command.args([EXECUTED, &value.to_string()]).stdin(Stdio::piped()).stdout(Stdio::piped());
    if fork_first {
        // SAFETY: it does nothing; that there is something to do makes the library fork.
        unsafe { command.pre_exec(|| Ok(())) };
    }
    let mut child = command.spawn().expect("a program that can be executed");
    child.stdin.take().expect("a pipe").write_all(&sent.to_le_bytes()).expect("somebody who reads");
    let ended = child.wait_with_output().expect("a child");
    let answer = reply(value, sent);
    assert_eq!(ended.stdout, answer.to_le_bytes(), "the answer of an executed program");
    assert_eq!(ended.status.code(), Some(i32::from(answer as u8)), "its exit status");
    answer
}
