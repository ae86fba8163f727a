//! Instructions that access memory element by element, each with its own fault: masked moves and gathers.

use iced_x86::{Mnemonic, Register};
use ruse_arch::{Exception, paging::Access, state::reg};

use super::{
    Insn,
    operand::{address_size, mask, segment_index},
};
use crate::cpu::{Cpu, Who};

/// Executes a masked move or gather; `false` if the instruction is none.
pub(super) fn execute(cpu: &mut Cpu, insn: &Insn, touches_x87: bool) -> Result<bool, Exception> {
    match insn.i.mnemonic() {
        Mnemonic::Maskmovq | Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu => {
            store_bytes(cpu, insn, touches_x87)
        }
        Mnemonic::Vmaskmovps | Mnemonic::Vpmaskmovd => move_elements(cpu, insn, 4),
        Mnemonic::Vmaskmovpd | Mnemonic::Vpmaskmovq => move_elements(cpu, insn, 8),
        Mnemonic::Vgatherdps | Mnemonic::Vpgatherdd => gather(cpu, insn, 4, 4),
        Mnemonic::Vgatherdpd | Mnemonic::Vpgatherdq => gather(cpu, insn, 8, 4),
        Mnemonic::Vgatherqps | Mnemonic::Vpgatherqd => gather(cpu, insn, 4, 8),
        Mnemonic::Vgatherqpd | Mnemonic::Vpgatherqq => gather(cpu, insn, 8, 8),
        _ => return Ok(false),
    }?;
    Ok(true)
}

/// Number of a vector register.
fn index(r: Register) -> usize {
    let first = if r.is_ymm() { Register::YMM0 } else { Register::XMM0 };
    (r as usize).wrapping_sub(first as usize) % 16
}

fn is_set(mask: &[u8; 32], element: usize, size: usize) -> bool {
    mask[(element + 1) * size - 1] >> 7 != 0
}

/// MASKMOVDQU and MASKMOVQ: the bytes whose mask bytes are negative go to DS:rDI.
fn store_bytes(cpu: &mut Cpu, insn: &Insn, mmx: bool) -> Result<(), Exception> {
    let (source, chosen) = (insn.i.op1_register(), insn.i.op2_register());
    let read = |cpu: &Cpu, r: Register| match mmx {
        true => {
            let mut value = [0; 32];
            let st = (r as usize - Register::MM0 as usize + 8 - cpu.fpu.top()) % 8;
            value[..8].copy_from_slice(&cpu.fpu.fxsave[32 + 16 * st..][..8]);
            value
        }
        false => cpu.fpu.ymm(index(r)),
    };
    let (source, chosen) = (read(cpu, source), read(cpu, chosen));
    let len = if mmx { 8 } else { 16 };
    let bytes = mask(address_size(&insn.i));
    let segment = segment_index(insn.i.memory_segment());
    let mut places = [None; 16];
    for (i, place) in places.iter_mut().enumerate().take(len) {
        if is_set(&chosen, i, 1) {
            let offset = cpu.gpr[reg::RDI].wrapping_add(i as u64) & bytes;
            let la = cpu.linear(segment, offset, 1, Access::Write)?;
            cpu.probe_linear(la, 1, Access::Write, Who::Current)?;
            *place = Some(la);
        }
    }
    for (la, byte) in places.into_iter().zip(source) {
        if let Some(la) = la {
            cpu.write_linear(la, &[byte], Who::Current)?;
        }
    }
    if mmx {
        cpu.fpu.enter_mmx();
    }
    Ok(())
}

/// VMASKMOV and VPMASKMOV: elements whose mask is clear are zero in a load, not accessed in a store.
fn move_elements(cpu: &mut Cpu, insn: &Insn, size: usize) -> Result<(), Exception> {
    let i = &insn.i;
    let store = !i.op0_register().is_vector_register();
    let register = if store { i.op2_register() } else { i.op0_register() };
    let chosen = cpu.fpu.ymm(index(i.op1_register()));
    let count = register.size() / size;
    let access = if store { Access::Write } else { Access::Read };
    let segment = segment_index(i.memory_segment());
    let start = cpu.effective_address(insn);
    let bytes = mask(address_size(i));
    let mut places = [None; 8];
    for (n, place) in places.iter_mut().enumerate().take(count).filter(|p| is_set(&chosen, p.0, size)) {
        let offset = start.wrapping_add((n * size) as u64) & bytes;
        let la = cpu.linear(segment, offset, size, access)?;
        cpu.probe_linear(la, size, access, Who::Current)?;
        *place = Some(la);
    }
    let mut value = if store { cpu.fpu.ymm(index(register)) } else { [0; 32] };
    for (part, la) in value.chunks_exact_mut(size).zip(places) {
        match la {
            Some(la) if store => cpu.write_linear(la, part, Who::Current)?,
            Some(la) => cpu.read_linear(la, part, Who::Current)?,
            None => {}
        }
    }
    if !store {
        cpu.fpu.set_ymm(index(register), &value);
    }
    Ok(())
}

/// Gathers: an element that was read clears its mask, so that the instruction goes on after a fault (SDM volume 2,
/// VPGATHERDD).
fn gather(cpu: &mut Cpu, insn: &Insn, size: usize, index_size: usize) -> Result<(), Exception> {
    let i = &insn.i;
    let (target, indices, chosen) = (i.op0_register(), i.memory_index(), i.op2_register());
    let numbers = [index(target), index(indices), index(chosen)];
    if numbers[0] == numbers[1] || numbers[0] == numbers[2] || numbers[1] == numbers[2] {
        return Err(Exception::UD);
    }
    let count = (target.size() / size).min(indices.size() / index_size);
    let offsets = cpu.fpu.ymm(numbers[1]);
    let mut value = cpu.fpu.ymm(numbers[0]);
    let mut mask_left = cpu.fpu.ymm(numbers[2]);
    let (mut result, mut loaded) = (Ok(()), false);
    for n in 0..count {
        if is_set(&mask_left, n, size) {
            let offset = element_offset(cpu, insn, &offsets, n, index_size);
            result = read_element(cpu, insn, offset, &mut value[n * size..(n + 1) * size]);
            if result.is_err() {
                break;
            }
            loaded = true;
        }
        mask_left[n * size..(n + 1) * size].fill(0);
    }
    let length = if target.is_ymm() || indices.is_ymm() { 32 } else { 16 };
    if result.is_ok() {
        value[count * size..].fill(0);
        mask_left.fill(0);
    } else {
        // As seen on Intel's CPUs: the mask is ones or zeroes over the vector's length; what lies behind the length is
        // zero once an element was loaded.
        if loaded {
            value[length..].fill(0);
        }
        for (n, part) in mask_left.chunks_exact_mut(size).enumerate() {
            let ones = part[size - 1] >> 7 != 0 && n * size < length;
            part.fill(if ones { 0xff } else { 0 });
        }
    }
    cpu.fpu.set_ymm(numbers[0], &value);
    cpu.fpu.set_ymm(numbers[2], &mask_left);
    result
}

/// Offset of an element of a gather within its segment.
fn element_offset(cpu: &Cpu, insn: &Insn, offsets: &[u8; 32], n: usize, index_size: usize) -> u64 {
    let i = &insn.i;
    let part = &offsets[n * index_size..(n + 1) * index_size];
    let mut wide = [if part[index_size - 1] >> 7 != 0 { 0xff } else { 0 }; 8];
    wide[..index_size].copy_from_slice(part);
    let scaled = u64::from_le_bytes(wide).wrapping_mul(u64::from(i.memory_index_scale()));
    let sum = cpu.reg(i.memory_base()).wrapping_add(scaled).wrapping_add(i.memory_displacement64());
    let size = match i.memory_base() {
        Register::None if cpu.mode.code64 && i.memory_displ_size() != 4 => 8,
        Register::None => i.memory_displ_size() as usize,
        base => base.size(),
    };
    sum & mask(size)
}

fn read_element(cpu: &mut Cpu, insn: &Insn, offset: u64, part: &mut [u8]) -> Result<(), Exception> {
    let segment = segment_index(insn.i.memory_segment());
    let la = cpu.linear(segment, offset, part.len(), Access::Read)?;
    cpu.read_linear(la, part, Who::Current)
}
