//! The ELF file that a bzImage carries, compressed, behind its 16-bit part (Documentation/arch/x86/boot.rst).

/// What LZ4's legacy frames begin with, each block preceded by its size (LZ4 Frame Format, "Legacy frame").
const LZ4_LEGACY: &[u8] = b"\x02\x21\x4c\x18";

/// The ELF file, if the bzImage is compressed by LZ4, as Debian's are. Else says so.
pub fn extract(bzimage: &[u8]) -> Option<Vec<u8>> {
    let sectors = usize::from(bzimage[0x1f1]) + 1;
    let (offset, length) = (word(bzimage, 0x248) as usize, word(bzimage, 0x24c) as usize);
    // The kernel's build puts the size of the contents behind them.
    let (payload, size) = bzimage[sectors * 512 + offset..][..length].split_at(length - 4);
    let Some(mut blocks) = payload.strip_prefix(LZ4_LEGACY) else {
        println!("skipped, the kernel is not compressed by LZ4: {:02x?}", &payload[..4]);
        return None;
    };
    let mut elf = Vec::with_capacity(word(size, 0) as usize);
    while !blocks.is_empty() {
        let (block, rest) = blocks[4..].split_at(word(blocks, 0) as usize);
        decompress(block, &mut elf);
        blocks = rest;
    }
    assert_eq!(elf.len(), word(size, 0) as usize);
    Some(elf)
}

fn word(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap())
}

/// Appends the contents of an LZ4 block: runs of literals, each but the last followed by a copy of earlier bytes.
fn decompress(mut block: &[u8], out: &mut Vec<u8>) {
    let start = out.len();
    loop {
        let token = take(&mut block, 1)[0];
        let literals = length(token >> 4, &mut block);
        out.extend(take(&mut block, literals));
        if block.is_empty() {
            return;
        }
        let distance = usize::from(u16::from_le_bytes(take(&mut block, 2).try_into().unwrap()));
        let count = length(token & 15, &mut block) + 4;
        let from = out.len() - distance;
        assert!(distance > 0 && from >= start, "a copy from before the block");
        for at in from..from + count {
            out.push(out[at]);
        }
    }
}

fn take<'a>(block: &mut &'a [u8], count: usize) -> &'a [u8] {
    let (taken, rest) = block.split_at(count);
    *block = rest;
    taken
}

/// A length of four bits, which more bytes add to if it is 15, up to one that is not 255.
fn length(nibble: u8, block: &mut &[u8]) -> usize {
    let mut length = usize::from(nibble);
    let mut more = nibble == 15;
    while more {
        let byte = take(block, 1)[0];
        length += usize::from(byte);
        more = byte == 255;
    }
    length
}
