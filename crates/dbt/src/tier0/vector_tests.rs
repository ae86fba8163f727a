//! What the comparison with the host does not reach: availability, saved states, other modes.

use ruse_arch::{
    Exception,
    flags::{cr0, cr4},
    state::reg::{RAX, RBX, RCX, RDX, RSP},
};

use super::testing::{CODE, DATA, Machine};

const XORPS: &[u8] = b"\x0f\x57\xc0";
const VXORPS: &[u8] = b"\xc5\xf8\x57\xc0";
const PXOR_MM: &[u8] = b"\x0f\xef\xc0";
const FLD1: &[u8] = b"\xd9\xe8";
const FWAIT: &[u8] = b"\x9b";
const FXSAVE: &[u8] = b"\x0f\xae\x03";

/// A machine with bits of CR0 and CR4 set and cleared.
fn with(set0: u64, clear0: u64, clear4: u64) -> Machine {
    let mut m = Machine::long();
    m.cpu.paging.cr0 = m.cpu.paging.cr0 & !clear0 | set0;
    m.cpu.paging.cr4 &= !clear4;
    m.cpu.gpr[RBX] = DATA;
    m
}

#[test]
fn availability_follows_the_control_registers() {
    let (ud, nm) = (Err(Exception::UD), Err(Exception::NM));
    let ts = || with(cr0::TS, 0, 0);
    for code in [XORPS, VXORPS, PXOR_MM, FLD1, FWAIT, FXSAVE] {
        assert_eq!(ts().run(code), nm, "{code:x?}");
        assert_eq!(with(0, 0, 0).run(code), Ok(()), "{code:x?}");
    }
    assert_eq!(with(cr0::TS, cr0::MP, 0).run(FWAIT), Ok(()));
    let em = || with(cr0::EM | cr0::TS, 0, 0);
    assert_eq!(em().run(XORPS), ud);
    assert_eq!(em().run(PXOR_MM), ud);
    assert_eq!(em().run(FLD1), nm);
    assert_eq!(em().run(VXORPS), nm);
    assert_eq!(with(0, 0, cr4::OSFXSR).run(XORPS), ud);
    assert_eq!(with(0, 0, cr4::OSFXSR).run(PXOR_MM), Ok(()));
    assert_eq!(with(0, 0, cr4::OSXSAVE).run(VXORPS), ud);
    let mut m = Machine::long();
    m.cpu.xcr0 = 3;
    assert_eq!(m.run(VXORPS), ud);
}

#[test]
fn a_pending_x87_error_comes_with_the_next_waiting_instruction() {
    let mut m = Machine::long();
    m.write(DATA, &0x37bu16.to_le_bytes());
    m.cpu.gpr[RBX] = DATA;
    // fninit; fldcw [rbx]; fld1; fldz; fdivp: division by zero is not masked.
    assert_eq!(m.run(b"\xdb\xe3\xd9\x2b\xd9\xe8\xd9\xee\xde\xf9"), Ok(()));
    // fnstsw ax does not wait.
    assert_eq!(m.run(b"\xdf\xe0"), Ok(()));
    assert_eq!(m.cpu.gpr[RAX] & 0x8084, 0x8084);
    for code in [FWAIT, FLD1, PXOR_MM] {
        assert_eq!(m.run(code), Err(Exception::MF));
        assert_eq!(m.cpu.rip, CODE);
    }
    // SSE goes on; fnclex ends it.
    assert_eq!(m.run(XORPS), Ok(()));
    assert_eq!(m.run(FWAIT), Err(Exception::MF));
    assert_eq!(m.run(b"\xdb\xe2\x9b"), Ok(()));
}

#[test]
fn without_ne_an_error_raises_the_line_and_goes_on() {
    let mut m = with(0, cr0::NE, 0);
    m.cpu.fpu.set_fcw(0x37b);
    m.cpu.fpu.set_fsw(0x8084);
    assert_eq!(m.run(FLD1), Ok(()));
    assert_eq!(m.cpu.fpu.fsw() & 0xb8ff, 0xb884);
    assert_eq!(m.cpu.fpu.fxsave[40..42], [0xff, 0x3f]);
    assert_eq!(m.run(PXOR_MM), Ok(()));
    assert_eq!(m.cpu.fpu.fsw(), 0x8084);
    // fldcw, which waits too; a summary without an exception means nothing.
    m.cpu.gpr[RBX] = DATA;
    assert_eq!(m.run(b"\xd9\x2b"), Ok(()));
    m.cpu.fpu.set_fcw(0x37f);
    m.cpu.fpu.set_fsw(0x8080);
    assert_eq!(m.run(PXOR_MM), Ok(()));
    assert_eq!(m.run(FWAIT), Ok(()));
}

#[test]
fn simd_errors_change_nothing_but_the_flags() {
    let mut m = Machine::long();
    m.cpu.gpr[RBX] = DATA;
    m.write(DATA, &0x1d80u32.to_le_bytes());
    // ldmxcsr [rbx]; xorps xmm0, xmm0; movss xmm1, [rbx + 16]
    m.write(DATA + 16, &1.0f32.to_le_bytes());
    m.run(b"\x0f\xae\x13\x0f\x57\xc0\xf3\x0f\x10\x4b\x10").unwrap();
    // divss xmm1, xmm0
    assert_eq!(m.run(b"\xf3\x0f\x5e\xc8"), Err(Exception::XM));
    assert_eq!(m.cpu.fpu.mxcsr(), 0x1d84);
    assert_eq!(m.cpu.fpu.ymm(1)[..4], 1.0f32.to_le_bytes());
    m.cpu.paging.cr4 &= !cr4::OSXMMEXCPT;
    assert_eq!(m.run(b"\xf3\x0f\x5e\xc8"), Err(Exception::UD));
    // Reserved bits of MXCSR.
    m.write(DATA, &0x1_0000u32.to_le_bytes());
    assert_eq!(m.run(b"\x0f\xae\x13"), Err(Exception::gp(0)));
}

#[test]
fn the_lane_serves_other_modes() {
    let mut m = Machine::flat32();
    m.cpu.gpr[RBX] = DATA;
    m.cpu.gpr[RSP] = 0x1234_5678;
    m.write(DATA + 8, &7u64.to_le_bytes());
    // movd xmm1, esp; movq xmm2, [ebx + 8]; paddd xmm1, xmm2; movd esp, xmm1; movd [ebx], xmm1
    m.run(b"\x66\x0f\x6e\xcc\xf3\x0f\x7e\x53\x08\x66\x0f\xfe\xca\x66\x0f\x7e\xcc\x66\x0f\x7e\x0b").unwrap();
    assert_eq!(m.cpu.gpr[RSP], 0x1234_567f);
    assert_eq!(m.read(DATA), 0x1234_567fu32.to_le_bytes());
    let mut m = Machine::real();
    m.cpu.paging.cr4 |= cr4::OSFXSR | cr4::OSXSAVE;
    m.cpu.xcr0 = 7;
    m.write(DATA + 6, &2.5f64.to_le_bytes());
    m.cpu.gpr[RBX] = 2;
    // fninit; fld qword [bx + 4]; fadd st0, st0; fstp dword [bx]
    m.run(b"\xdb\xe3\xdd\x47\x04\xdc\xc0\xd9\x1f").unwrap();
    assert_eq!(m.read(DATA + 2), 5.0f32.to_le_bytes());
    // An operand over the end of the segment; VEX in real mode.
    m.cpu.gpr[RBX] = 0xfffe;
    assert_eq!(m.run(b"\xd9\x07"), Err(Exception::gp(0)));
    assert_eq!(m.run(VXORPS), Err(Exception::UD));
}

#[test]
fn the_x87_pointers_are_those_of_the_guest() {
    let mut m = Machine::long();
    m.cpu.gpr[RBX] = DATA;
    // fninit; fld qword [rbx + 8]; fnstenv [rbx + 64]
    m.run(b"\xdb\xe3\xdd\x43\x08\xd9\x73\x40").unwrap();
    let word = |at: u64| u32::from_le_bytes(m.read(DATA + 64 + at));
    assert_eq!([word(0), word(4), word(8)], [0xffff_037f, 0xffff_3800, 0xffff_7fff]);
    assert_eq!([word(12), word(16), word(20)], [CODE as u32 + 2, 0x543 << 16, DATA as u32 + 8]);
    assert_eq!(m.cpu.fpu.fcw(), 0x37f);
}

#[test]
fn fnsave_and_frstor_keep_the_registers() {
    for prefix in [&b""[..], b"\x66"] {
        let mut m = Machine::long();
        m.cpu.gpr[RBX] = DATA;
        // fninit; fldpi; fld1
        m.run(b"\xdb\xe3\xd9\xeb\xd9\xe8").unwrap();
        let before = m.cpu.fpu.fxsave;
        // fnsave [rbx]; fninit; fldz; frstor [rbx]
        let code = [prefix, b"\xdd\x33\xdb\xe3\xd9\xee", prefix, b"\xdd\x23"].concat();
        m.run(&code).unwrap();
        assert_eq!(m.cpu.fpu.fxsave[..5], before[..5]);
        assert_eq!(m.cpu.fpu.fxsave[32..160], before[32..160]);
    }
}

/// A machine with something in all components, and RBX at the data; all components asked for.
fn full() -> Machine {
    let mut m = Machine::long();
    m.cpu.gpr[RBX] = DATA;
    (m.cpu.gpr[RAX], m.cpu.gpr[RDX]) = (7, 0);
    m.cpu.fpu.init_x87();
    m.run(FLD1).unwrap();
    for i in 0..16 {
        m.cpu.fpu.set_ymm(i, &[i as u8 + 1; 32]);
    }
    m.cpu.fpu.set_mxcsr(0x1fa0);
    m
}

#[test]
fn xsave_and_xrstor_bring_everything_back() {
    // xsave64, xsaveopt64, xsavec64 [rbx]
    for save in [&b"\x48\x0f\xae\x23"[..], b"\x48\x0f\xae\x33", b"\x48\x0f\xc7\x23"] {
        let mut m = full();
        if save[2] == 0xc7 {
            let leaf = m.cpu.cpuid.0.iter_mut().find(|e| e.leaf == 0xd && e.subleaf == Some(1)).unwrap();
            leaf.regs[0] = 7;
        }
        let before = m.cpu.fpu.save();
        m.run(save).unwrap();
        assert_eq!(m.read_u64(DATA + 512), 7);
        assert_eq!(m.read_u64(DATA + 520), if save[2] == 0xc7 { 7 | 1 << 63 } else { 0 });
        m.cpu.fpu.load(&ruse_arch::FpuState::default());
        // xrstor64 [rbx]
        m.run(b"\x48\x0f\xae\x2b").unwrap();
        assert_eq!(m.cpu.fpu.save(), before);
        // Components that are not in the header get their initial state; MXCSR is taken.
        m.write_u64(DATA + 512, 0);
        m.run(b"\x48\x0f\xae\x2b").unwrap();
        let mxcsr = if save[2] == 0xc7 { 0x1f80 } else { 0x1fa0 };
        assert_eq!(m.cpu.fpu.save(), ruse_arch::FpuState { fcw: 0x37f, mxcsr, ..Default::default() });
    }
}

#[test]
fn xsave_writes_only_what_is_asked_for() {
    let mut m = full();
    m.cpu.gpr[RAX] = 4;
    m.write_u64(DATA + 512, 3);
    m.run(b"\x48\x0f\xae\x23").unwrap();
    assert_eq!(m.read_u64(DATA + 512), 7);
    assert_eq!(m.read::<24>(DATA), [0; 24]);
    assert_eq!(m.read::<16>(DATA + 160), [0; 16]);
    assert_eq!(u32::from_le_bytes(m.read(DATA + 24)), 0x1fa0);
    assert_eq!(m.read::<16>(DATA + 576 + 32), [3; 16]);
}

#[test]
fn bad_areas_fault_before_anything_changes() {
    let fault = Err(Exception::gp(0));
    let xrstor = b"\x48\x0f\xae\x2b";
    let check = |at: u64, value: u64| {
        let mut m = full();
        m.write_u64(DATA + at, value);
        let before = m.cpu.fpu.save();
        assert_eq!(m.run(xrstor), fault, "{at} {value:x}");
        assert_eq!(m.cpu.fpu.save(), before);
    };
    check(512, 8);
    check(520, 1);
    check(528, 1);
    check(520, 1 << 63 | 8);
    check(24, 1 << 16);
    let mut m = full();
    m.cpu.gpr[RBX] += 32;
    assert_eq!(m.run(xrstor), fault);
    assert_eq!(m.run(b"\x48\x0f\xae\x23"), fault);
    m.cpu.gpr[RBX] -= 24;
    assert_eq!(m.run(FXSAVE), fault);
    // The second page is not there.
    m.unmap(DATA + 0x1000);
    m.cpu.gpr[RBX] = DATA + 0x1000 - 576;
    assert_eq!(m.run(b"\x48\x0f\xae\x23"), Err(Exception::pf(DATA + 0x1000, 2)));
    assert_eq!(m.read_u64(DATA + 0x1000 - 576), 0);
}

#[test]
fn fxsave_and_fxrstor_bring_the_low_halves_back() {
    let mut m = full();
    let before = m.cpu.fpu.save();
    m.run(b"\x48\x0f\xae\x03").unwrap();
    m.cpu.fpu.init_x87();
    m.cpu.fpu.set_mxcsr(0x1f80);
    m.cpu.fpu.fxsave[160..416].fill(0);
    m.run(b"\x48\x0f\xae\x0b").unwrap();
    assert_eq!(m.cpu.fpu.save(), before);
}

#[test]
fn masked_moves_touch_only_what_the_mask_says() {
    let mut m = Machine::long();
    m.unmap(DATA + 0x1000);
    m.cpu.gpr[RBX] = DATA + 0xff8;
    let mut mask = [0; 32];
    mask[7] = 0x80;
    m.cpu.fpu.set_ymm(1, &mask);
    m.cpu.fpu.set_ymm(2, &[9; 32]);
    // vpmaskmovd [rbx], ymm1, ymm2
    m.run(b"\xc4\xe2\x75\x8e\x13").unwrap();
    assert_eq!(m.read(DATA + 0xff8), [0, 0, 0, 0, 9, 9, 9, 9]);
    // vpmaskmovd ymm3, ymm1, [rbx]
    m.run(b"\xc4\xe2\x75\x8c\x1b").unwrap();
    assert_eq!(m.cpu.fpu.ymm(3)[..12], [0, 0, 0, 0, 9, 9, 9, 9, 0, 0, 0, 0]);
    mask[11] = 0x80;
    m.cpu.fpu.set_ymm(1, &mask);
    assert_eq!(m.run(b"\xc4\xe2\x75\x8e\x13"), Err(Exception::pf(DATA + 0x1000, 2)));
}

#[test]
fn a_gather_goes_on_after_a_fault() {
    let mut m = Machine::long();
    m.cpu.gpr[RBX] = DATA + 0xff8;
    m.write_u64(DATA + 0xff8, 0x2222_2222_1111_1111);
    m.write_u64(DATA + 0x1000, 0x4444_4444_3333_3333);
    m.unmap(DATA + 0x1000);
    m.cpu.fpu.set_ymm(1, &[0xff; 32]);
    let index: Vec<u8> = [0u32, 1, 2, 3, 0, 0, 0, 0].into_iter().flat_map(u32::to_le_bytes).collect();
    m.cpu.fpu.set_ymm(2, &index.try_into().unwrap());
    // vpgatherdd xmm0, [rbx + xmm2 * 4], xmm1
    let code = b"\xc4\xe2\x71\x90\x04\x93";
    assert_eq!(m.run(code), Err(Exception::pf(DATA + 0x1000, 0)));
    assert_eq!(m.cpu.fpu.ymm(0)[..8], [0x11, 0x11, 0x11, 0x11, 0x22, 0x22, 0x22, 0x22]);
    assert_eq!(m.cpu.fpu.ymm(1)[..12], [0, 0, 0, 0, 0, 0, 0, 0, 255, 255, 255, 255]);
    m.cpu.gpr[RBX] = DATA + 0xff0;
    m.run(code).unwrap();
    assert_eq!(m.cpu.fpu.ymm(0)[8..16], m.read::<8>(DATA + 0xff8));
    assert_eq!(m.cpu.fpu.ymm(1), [0; 32]);
}

#[test]
fn vzeroupper_knows_the_registers_of_the_mode() {
    let mut m = Machine::flat32();
    (0..16).for_each(|i| m.cpu.fpu.set_ymm(i, &[0xaa; 32]));
    m.run(b"\xc5\xf8\x77").unwrap();
    assert_eq!(m.cpu.fpu.ymm(7)[15..17], [0xaa, 0]);
    assert_eq!(m.cpu.fpu.ymm(8), [0xaa; 32]);
}

#[test]
fn registers_that_live_in_the_host_are_taken_out_first() {
    let mut m = Machine::long();
    m.cpu.fpu.init_x87();
    m.cpu.x87_resident = 1;
    // SAFETY: FNINIT and FLD1 leave one register full, which the test takes out before any other x87 use.
    unsafe { std::arch::asm!("fninit", "fld1", out("st(0)") _, options(nomem, nostack)) };
    super::vector::spill_x87(&mut m.cpu);
    assert_eq!(m.cpu.x87_resident, 0);
    assert_eq!(m.cpu.fpu.fxsave[4], 0x80);
    assert_eq!(m.cpu.fpu.fxsave[32..42], [0, 0, 0, 0, 0, 0, 0, 0x80, 0xff, 0x3f]);
    assert_eq!(m.cpu.gpr[RCX], 0);
}
