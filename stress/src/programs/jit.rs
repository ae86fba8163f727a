//! A compiler at run time: functions are written, called, patched, thrown away and written again.

use ruse_random::Random;

use crate::digest::Digest;
use crate::fault;
use crate::memory::{File, Mapping, NONE, PAGE, R, RW, RWX, RX, check};

/// Bytes for a function.
const SLOT: usize = 256;
/// Pages for functions.
const PAGES: usize = 6;
const SLOTS: usize = PAGES * PAGE / SLOT;
/// Most operations of a function.
const MOST: u64 = 9;
/// Writes, calls and other things that a program does.
const STEPS: u32 = 4000;
/// Most functions that call each other in a row.
const DEPTH: usize = 8;

/// How the compiler gets at its code.
enum Views {
    /// By one mapping with all rights.
    One(Mapping),
    /// By two mappings of a file: to write, and to execute.
    Two(File, Mapping, Mapping),
    /// By one mapping that is writable or executable.
    Either(Mapping),
}

impl Views {
    fn new(random: &mut Random) -> Views {
        let len = PAGES * PAGE;
        match random.below(3) {
            0 => Views::One(Mapping::new(len, RWX)),
            1 => {
                let file = File::new(len);
                let (write, execute) = (Mapping::of(&file, RW), Mapping::of(&file, RX));
                Views::Two(file, write, execute)
            }
            _ => Views::Either(Mapping::new(len, RX)),
        }
    }

    /// Where code is executed.
    fn code(&self) -> *mut u8 {
        match self {
            Views::One(all) | Views::Either(all) => all.start(),
            Views::Two(_, _, execute) => execute.start(),
        }
    }

    fn write(&self, offset: usize, bytes: &[u8]) {
        let to = match self {
            Views::One(all) | Views::Either(all) => all.start(),
            Views::Two(_, write, _) => write.start(),
        };
        let page = offset / PAGE * PAGE;
        if let Views::Either(all) = self {
            all.protect(page, PAGE, RW);
        }
        // SAFETY: callers stay within a slot, and nothing executes meanwhile.
        unsafe { to.add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        if let Views::Either(all) = self {
            all.protect(page, PAGE, RX);
        }
    }

    /// Throws a page's code away: the page is another one afterwards, with zeros, or with those of another page.
    /// Returns the page of which it has the content now.
    fn replace(&self, page: usize, random: &mut Random) -> Option<usize> {
        let at = self.code().wrapping_add(page * PAGE);
        match self {
            Views::One(_) | Views::Either(_) => {
                // SAFETY: the page belongs to the mapping, which has no functions there any more.
                check(unsafe { libc::madvise(at.cast(), PAGE, libc::MADV_DONTNEED) }, "madvise");
                None
            }
            Views::Two(file, ..) => {
                let from = random.below(PAGES as u64) as usize;
                file.map_page(from, at as usize, RX);
                Some(from)
            }
        }
    }
}

/// What a function does with its number.
#[derive(Clone, Copy)]
enum Op {
    Add(i32),
    Xor(i32),
    Multiply(i32),
    Rotate(u8),
    Swap,
    /// Adds the argument, doubled.
    Again,
    /// Adds a constant, which it has put into the code just before.
    Patched {
        first: i32,
        then: i32,
    },
}

impl Op {
    fn new(random: &mut Random, writable: bool) -> Op {
        let value = random.word() as i32;
        match random.below(if writable { 7 } else { 6 }) {
            0 => Op::Add(value),
            1 => Op::Xor(value),
            2 => Op::Multiply(value | 1),
            3 => Op::Rotate(value as u8 & 63),
            4 => Op::Swap,
            5 => Op::Again,
            _ => Op::Patched { first: value, then: random.word() as i32 },
        }
    }

    fn encode(self, code: &mut Vec<u8>) {
        match self {
            Op::Add(value) => constant(code, &[0x48, 0x05], value),
            Op::Xor(value) => constant(code, &[0x48, 0x35], value),
            Op::Multiply(value) => constant(code, &[0x48, 0x69, 0xc0], value),
            Op::Rotate(count) => code.extend([0x48, 0xc1, 0xc0, count]),
            Op::Swap => code.extend([0x48, 0x0f, 0xc8]),
            Op::Again => code.extend([0x48, 0x8d, 0x04, 0x78]),
            Op::Patched { first, then } => {
                // MOV DWORD PTR [RIP + 2], then; ADD RAX, first
                constant(code, &[0xc7, 0x05], 2);
                code.extend(then.to_le_bytes());
                constant(code, &[0x48, 0x05], first);
            }
        }
    }

    fn apply(self, number: u64, argument: u64) -> u64 {
        let wide = |value: i32| i64::from(value) as u64;
        match self {
            Op::Add(value) | Op::Patched { then: value, .. } => number.wrapping_add(wide(value)),
            Op::Xor(value) => number ^ wide(value),
            Op::Multiply(value) => number.wrapping_mul(wide(value)),
            Op::Rotate(count) => number.rotate_left(count.into()),
            Op::Swap => number.swap_bytes(),
            Op::Again => number.wrapping_add(argument.wrapping_mul(2)),
        }
    }
}

fn constant(code: &mut Vec<u8>, opcode: &[u8], value: i32) {
    code.extend(opcode);
    code.extend(value.to_le_bytes());
}

/// A function as the compiler knows it.
#[derive(Clone)]
struct Function {
    ops: Vec<Op>,
    /// The slot of the function that gets the number next, by a call or a jump.
    next: Option<(usize, bool)>,
}

impl Function {
    fn new(random: &mut Random, writable: bool, next: Option<(usize, bool)>) -> Function {
        let ops = (0..1 + random.below(MOST)).map(|_| Op::new(random, writable)).collect();
        Function { ops, next }
    }

    /// The code, and where each operation begins in it.
    fn encode(&self, slot: usize) -> (Vec<u8>, Vec<usize>) {
        let mut code = vec![0x48, 0x89, 0xf8]; // MOV RAX, RDI
        let mut starts = Vec::new();
        for op in &self.ops {
            starts.push(code.len());
            op.encode(&mut code);
        }
        if let Some((to, by_call)) = self.next {
            code.extend([0x48, 0x89, 0xc7]); // MOV RDI, RAX
            let end = slot * SLOT + code.len() + 5;
            constant(&mut code, &[if by_call { 0xe8 } else { 0xe9 }], (to * SLOT) as i32 - end as i32);
        }
        code.push(0xc3); // RET
        assert!(code.len() <= SLOT);
        (code, starts)
    }
}

/// The compiler with its memory.
struct Compiler {
    views: Views,
    functions: Vec<Option<Function>>,
}

impl Compiler {
    fn writable(&self) -> bool {
        matches!(self.views, Views::One(_))
    }

    /// How many functions come after one; `None` if it is not there, or they do not end.
    fn depth(&self, slot: usize) -> Option<usize> {
        let mut at = slot;
        for depth in 0..DEPTH {
            match self.functions[at].as_ref()?.next {
                Some((next, _)) => at = next,
                None => return Some(depth),
            }
        }
        None
    }

    fn compile(&mut self, slot: usize, random: &mut Random) {
        self.functions[slot] = None;
        let other = random.below(SLOTS as u64) as usize;
        let next = self.depth(other).filter(|_| random.chance(60)).map(|_| (other, random.chance(50)));
        let function = Function::new(random, self.writable(), next);
        self.views.write(slot * SLOT, &function.encode(slot).0);
        self.functions[slot] = Some(function);
    }

    /// Changes one operation where it is.
    fn patch(&mut self, slot: usize, random: &mut Random) {
        let Some(function) = &mut self.functions[slot] else { return };
        let (n, value) = (random.below(function.ops.len() as u64) as usize, random.word() as i32);
        match &mut function.ops[n] {
            Op::Add(old) | Op::Xor(old) | Op::Multiply(old) | Op::Patched { then: old, .. } => *old = value,
            Op::Rotate(old) => *old = value as u8 & 63,
            Op::Swap | Op::Again => return,
        }
        let (code, starts) = function.encode(slot);
        let end = starts.get(n + 1).copied().unwrap_or(code.len());
        self.views.write(slot * SLOT + starts[n], &code[starts[n]..end]);
    }

    /// Calls a function; its result has to be the compiler's.
    fn call(&self, slot: usize, mut argument: u64) -> Option<u64> {
        self.depth(slot)?;
        let address = self.views.code() as u64 + (slot * SLOT) as u64;
        // SAFETY: there is a function in this slot, and those that it calls are there as well.
        let found = unsafe { fault::call(argument, address) };
        let mut at = Some(slot);
        while let Some(function) = at.and_then(|slot| self.functions[slot].as_ref()) {
            argument = function.ops.iter().fold(argument, |number, op| op.apply(number, argument));
            at = function.next.map(|(next, _)| next);
        }
        assert_eq!(found, fault::Access { value: argument, fault: 0 }, "function {slot}");
        Some(argument)
    }

    /// Makes a page data for a while: it cannot be executed then, and holds what is written there.
    fn use_as_data(&mut self, page: usize, random: &mut Random) -> u64 {
        let Views::Either(all) = &self.views else { return 0 };
        self.functions[page * PAGE / SLOT..][..PAGE / SLOT].fill(None);
        all.protect(page * PAGE, PAGE, RW);
        let address = all.start() as u64 + (page * PAGE) as u64;
        let at = address + random.below(511) * 8;
        let value = random.word();
        // SAFETY: the page is this program's; faults are caught.
        unsafe {
            fault::write(at, value);
            assert_eq!(fault::read(at).value, value, "data where code was");
            let refused = fault::Access { value: address, fault: 2 };
            assert_eq!(fault::call(0, address), refused, "data that is called");
            all.protect(page * PAGE, PAGE, random.pick(&[NONE, R]));
            assert_eq!(fault::call(0, address), refused, "what may not be executed");
        }
        all.protect(page * PAGE, PAGE, RX);
        value
    }

    /// Replaces a page by another one. What functions are there is known from where its content came.
    fn replace(&mut self, page: usize, random: &mut Random) {
        let slots = page * PAGE / SLOT..(page + 1) * PAGE / SLOT;
        match self.views.replace(page, random) {
            // Written through the other mapping, the code at this place is no longer that of its own page.
            Some(from) if from != page => {
                let moved: Vec<_> = self.functions[from * PAGE / SLOT..][..PAGE / SLOT].to_vec();
                for (slot, function) in slots.clone().zip(moved) {
                    // A relative call leads elsewhere from here.
                    let here = function.filter(|function| function.next.is_none());
                    self.functions[slot] = here;
                }
                for slot in slots {
                    self.call(slot, random.word());
                }
                self.views_back(page);
            }
            _ => self.functions[slots].fill(None),
        }
    }

    /// Puts a page of the file back to its place; its functions are forgotten.
    fn views_back(&mut self, page: usize) {
        if let Views::Two(file, _, execute) = &self.views {
            file.map_page(page, execute.start() as usize + page * PAGE, RX);
        }
        self.functions[page * PAGE / SLOT..][..PAGE / SLOT].fill(None);
    }
}

/// Compiles, patches and calls.
pub fn run(random: &mut Random) -> u64 {
    fault::catch();
    let mut compiler = Compiler { views: Views::new(random), functions: vec![None; SLOTS] };
    let mut sum = Digest::default();
    for _ in 0..STEPS {
        let slot = random.below(SLOTS as u64) as usize;
        match random.below(40) {
            0..6 => compiler.compile(slot, random),
            6..12 => compiler.patch(slot, random),
            12 => sum.add(compiler.use_as_data(slot * SLOT / PAGE, random)),
            13 => compiler.replace(slot * SLOT / PAGE, random),
            kind => {
                // Some get hot.
                let times = if kind == 39 { 200 } else { 3 };
                for _ in 0..times {
                    sum.add(compiler.call(slot, random.word()).unwrap_or(0));
                }
            }
        }
    }
    sum.value()
}
