//! What the comparison with the host does not reach: memory, faults, the stack, branches, strings, other modes.

use ruse_arch::{
    Exception,
    flags::{cr0, rflags},
    state::reg::{RAX, RBP, RBX, RCX, RDI, RDX, RSI, RSP},
};

use super::super::testing::{CODE, DATA, Machine, STACK};

/// A page fault of a write or read by the supervisor of a page that is not there.
fn not_present(la: u64, write: bool) -> Result<(), Exception> {
    Err(Exception::pf(la, if write { 2 } else { 0 }))
}

#[test]
fn memory_operands_are_read_changed_and_written() {
    let mut m = Machine::long();
    m.write_u64(DATA + 8, 0xffff_ffff_ffff_fff0);
    m.cpu.gpr[RBX] = DATA;
    m.cpu.gpr[RAX] = 0x11;
    // add [rbx+8], rax; adc byte [rbx+8], 0xff; lock xadd [rbx+8], rax
    m.run(b"\x48\x01\x43\x08\x80\x53\x08\xff\xf0\x48\x0f\xc1\x43\x08").unwrap();
    assert_eq!(m.cpu.gpr[RAX], 0x01);
    assert_eq!(m.read_u64(DATA + 8), 0x12);
}

#[test]
fn a_change_over_a_page_end_checks_both_pages_first() {
    let mut m = Machine::long();
    m.unmap(DATA + 0x1000);
    m.cpu.gpr[RBX] = DATA + 0xffc;
    m.cpu.gpr[RAX] = u64::MAX;
    m.write(DATA + 0xffc, &[1, 2, 3, 4]);
    // xchg [rbx], rax
    assert_eq!(m.run(b"\x48\x87\x03"), not_present(DATA + 0x1000, true));
    assert_eq!(m.read(DATA + 0xffc), [1, 2, 3, 4]);
    assert_eq!((m.cpu.rip, m.cpu.gpr[RAX]), (CODE, u64::MAX));
    // ... and works where both are there, unaligned in a line and between lines too.
    for at in [DATA + 0x1fc, DATA + 0x201, DATA + 0x203, DATA + 0x2ffd] {
        m.cpu.gpr[RBX] = at;
        m.cpu.gpr[RAX] = 0x1122_3344_5566_7788;
        m.run(b"\x48\x87\x03").unwrap();
        assert_eq!(m.read_u64(at), 0x1122_3344_5566_7788);
    }
}

#[test]
fn locked_changes_are_whole_at_any_place_in_a_line() {
    let mut m = Machine::long();
    for at in 0..70 {
        m.cpu.gpr[RBX] = DATA + at;
        m.write(DATA, &[0; 96]);
        // lock inc word, dword, qword [rbx]
        m.run(b"\xf0\x66\xff\x03\xf0\xff\x03\xf0\x48\xff\x03").unwrap();
        assert_eq!(m.read_u64(DATA + at), 3);
    }
}

#[test]
fn wide_exchanges_compare_and_swap() {
    let mut m = Machine::long();
    m.cpu.gpr[RSI] = DATA;
    m.write_u64(DATA, 5);
    m.write_u64(DATA + 8, 6);
    (m.cpu.gpr[RAX], m.cpu.gpr[RDX]) = (5, 6);
    (m.cpu.gpr[RBX], m.cpu.gpr[RCX]) = (7, 8);
    // lock cmpxchg16b [rsi], twice
    m.run(b"\xf0\x48\x0f\xc7\x0e").unwrap();
    assert_eq!((m.read_u64(DATA), m.read_u64(DATA + 8)), (7, 8));
    assert_ne!(m.cpu.rflags & rflags::ZF, 0);
    m.run(b"\xf0\x48\x0f\xc7\x0e").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX], m.cpu.rflags & rflags::ZF), (7, 8, 0));
    m.cpu.gpr[RSI] = DATA + 8;
    assert_eq!(m.run(b"\x48\x0f\xc7\x0e"), Err(Exception::gp(0)));
    // cmpxchg8b [rsi]: EDX:EAX is 8:7, memory 0:8
    m.run(b"\x0f\xc7\x0e").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX]), (8, 0));
}

#[test]
fn a_register_bit_offset_reaches_beyond_the_operand() {
    let mut m = Machine::long();
    m.cpu.gpr[RBX] = DATA + 0x100;
    m.cpu.gpr[RAX] = (-65i64) as u64;
    // bts [rbx], rax; bt dword [rbx], eax; btc dword [rbx], 33
    m.run(b"\x48\x0f\xab\x03\x0f\xa3\x03\x0f\xba\x3b\x21").unwrap();
    assert_eq!(m.read_u64(DATA + 0x100 - 16), 1 << 63);
    assert_eq!(m.read_u64(DATA + 0x100), 2);
}

#[test]
fn division_faults_leave_everything() {
    let mut m = Machine::long();
    (m.cpu.gpr[RAX], m.cpu.gpr[RDX], m.cpu.gpr[RBX]) = (0, 1 << 63, u64::MAX);
    for code in [b"\x48\xf7\xfb", b"\x48\xf7\xf1"] {
        // idiv rbx; div rcx
        assert_eq!(m.run(code), Err(Exception::DE));
        assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RDX], m.cpu.rip), (0, 1 << 63, CODE));
    }
}

#[test]
fn pops_and_pushes_see_the_right_pointer() {
    let mut m = Machine::long();
    m.write_u64(STACK, 0xabcd);
    // pop [rsp]; push rsp; pop rax
    m.run(b"\x8f\x04\x24\x54\x58").unwrap();
    assert_eq!(m.read_u64(STACK + 8), 0xabcd);
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RSP]), (STACK + 8, STACK + 8));
    m.unmap(DATA);
    m.cpu.gpr[RBX] = DATA;
    assert_eq!(m.run(b"\x8f\x03"), not_present(DATA, true));
    assert_eq!(m.cpu.gpr[RSP], STACK + 8);
    // push word 0x1234; push -1
    m.run(b"\x66\x68\x34\x12\x6a\xff").unwrap();
    assert_eq!((m.read(STACK + 6), m.cpu.gpr[RSP]), ([0x34, 0x12], STACK - 2));
}

#[test]
fn frames_nest() {
    let mut m = Machine::long();
    m.cpu.gpr[RBP] = STACK + 0x100;
    m.write_u64(STACK + 0xf8, 0x77);
    // enter 0x20, 2
    m.run(b"\xc8\x20\x00\x02").unwrap();
    assert_eq!((m.cpu.gpr[RBP], m.cpu.gpr[RSP]), (STACK - 8, STACK - 0x38));
    let frame = [m.read_u64(STACK - 8), m.read_u64(STACK - 16), m.read_u64(STACK - 24)];
    assert_eq!(frame, [STACK + 0x100, 0x77, STACK - 8]);
    m.run(b"\xc9").unwrap();
    assert_eq!((m.cpu.gpr[RBP], m.cpu.gpr[RSP]), (STACK + 0x100, STACK));
}

#[test]
fn flags_are_popped_by_privilege() {
    let mut m = Machine::long();
    // push rax; popf; pushf; pop rbx
    m.cpu.gpr[RAX] = !rflags::TF;
    m.run(b"\x50\x9d\x9c\x5b").unwrap();
    assert_eq!(m.cpu.gpr[RBX], 0x24_7ed7);
    m.cpu.rflags = rflags::FIXED;
    m.cpu.seg[2].attr |= 3 << 5;
    m.cpu.update_mode();
    m.run(b"\x50\x9d\x9c\x5b").unwrap();
    assert_eq!(m.cpu.gpr[RBX], 0x24_4cd7);
}

#[test]
fn near_branches_check_their_target() {
    let mut m = Machine::long();
    m.cpu.gpr[RAX] = 0x8000_0000_0000;
    assert_eq!(m.run(b"\xff\xd0"), Err(Exception::gp(0)));
    assert_eq!((m.cpu.rip, m.cpu.gpr[RSP]), (CODE, STACK));
    m.write_u64(STACK, 0x8000_0000_0000);
    assert_eq!(m.run(b"\xc3"), Err(Exception::gp(0)));
    assert_eq!((m.cpu.rip, m.cpu.gpr[RSP]), (CODE, STACK));
    // call +2; int3; int3; ret 8 -- the operand-size prefix counts for nothing
    m.load(b"\x66\xe8\x02\x00\x00\x00\xcc\xcc\xc2\x08\x00");
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.read_u64(STACK - 8)), (CODE + 8, CODE + 6));
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[RSP]), (CODE + 6, STACK + 8));
}

#[test]
fn loops_count_in_the_address_size() {
    let mut m = Machine::long();
    m.cpu.gpr[RCX] = 0xffff_ffff_0000_0003;
    // inc eax; loop ecx -5
    m.run(b"\xff\xc0\x67\xe2\xfb").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RCX]), (3, 0));
    let mut m = Machine::real();
    m.cpu.gpr[RCX] = 0xabcd_0002;
    // inc ax; loop -3
    m.run(b"\x40\xe2\xfd").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.gpr[RCX]), (2, 0xabcd_0000));
}

#[test]
fn repeated_moves_stop_at_a_fault_and_go_on() {
    let mut m = Machine::long();
    m.unmap(DATA + 0x1000);
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA + 0x4000, DATA + 0xfe1, 0x10);
    let source: [u8; 0x80] = std::array::from_fn(|i| i as u8);
    m.write(DATA + 0x4000, &source);
    // rep movsq: three elements fit, the fourth crosses the end of the page
    assert_eq!(m.run(b"\xf3\x48\xa5"), not_present(DATA + 0x1000, true));
    assert_eq!((m.cpu.gpr[RCX], m.cpu.gpr[RSI], m.cpu.gpr[RDI]), (0xd, DATA + 0x4018, DATA + 0xff9));
    assert_eq!(m.read::<0x1f>(DATA + 0xfe1)[..0x1a], [&source[..0x18], &[0, 0]].concat());
    m.write_u64(super::super::testing::PAGE_TABLE + ((DATA + 0x1000) >> 12) * 8, (DATA + 0x1000) | 7);
    m.run(b"\xf3\x48\xa5").unwrap();
    assert_eq!(m.read::<0x80>(DATA + 0xfe1), source);
    assert_eq!(m.cpu.gpr[RCX], 0);
}

#[test]
fn overlapping_moves_repeat_what_they_wrote() {
    let mut m = Machine::long();
    m.write(DATA, b"ab");
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA, DATA + 2, 6);
    m.run(b"\xf3\xa4").unwrap();
    assert_eq!(&m.read(DATA), b"abababab");
    // Backwards, by words.
    m.write(DATA, b"01234567");
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA + 4, DATA + 6, 3);
    m.run(b"\xfd\xf3\x66\xa5").unwrap();
    assert_eq!(&m.read(DATA), b"01012345");
}

#[test]
fn repeated_moves_do_what_single_ones_do() {
    const AREA: usize = 0x6000;
    let start: [u8; AREA] = std::array::from_fn(|i| (i * 7 + i / 256) as u8);
    let moves: [(&[u8], usize); 2] = [(b"\xf3\xa4", 1), (b"\xf3\x48\xa5", 8)];
    for distance in [-0x1000, -100, -24, -8, -3, -1, 1, 3, 8, 24, 100, 0x1000] {
        for ((code, size), back) in moves.into_iter().flat_map(|m| [(m, false), (m, true)]) {
            let (from, count) = (0x3005_usize, 700);
            let to = from.wrapping_add_signed(distance);
            let mut expected = start.to_vec();
            for n in 0..count {
                let at = |offset: usize| if back { offset - n * size } else { offset + n * size };
                expected.copy_within(at(from)..at(from) + size, at(to));
            }
            let mut m = Machine::long();
            m.write(DATA, &start);
            let addresses = [from, to].map(|offset| DATA + offset as u64);
            [m.cpu.gpr[RSI], m.cpu.gpr[RDI]] = addresses;
            m.cpu.gpr[RCX] = count as u64;
            m.cpu.rflags |= if back { rflags::DF } else { 0 };
            m.run(code).unwrap();
            assert!(m.read::<AREA>(DATA)[..] == expected, "{distance} by {size}, backwards: {back}");
            let moved = (count * size) as u64;
            let moved = if back { moved.wrapping_neg() } else { moved };
            assert_eq!([m.cpu.gpr[RSI], m.cpu.gpr[RDI]], addresses.map(|at| at.wrapping_add(moved)));
        }
    }
}

#[test]
fn long_repeats_return_in_between() {
    let mut m = Machine::long();
    (m.cpu.gpr[RDI], m.cpu.gpr[RCX], m.cpu.gpr[RAX]) = (0x40_0000, 0x3_0000, 0x5a);
    m.load(b"\xf3\xaa");
    let mut steps = 0;
    while m.cpu.rip == CODE {
        m.step().unwrap();
        steps += 1;
    }
    assert_eq!((steps, m.cpu.gpr[RCX], m.cpu.gpr[RDI]), (3, 0, 0x43_0000));
    assert_eq!(m.read(0x42_ffff), [0x5a, 0]);
}

#[test]
fn long_repeats_over_a_device_return_soon() {
    let mut m = Machine::long();
    // Behind the end of RAM.
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (0x200_0000, 0x201_0000, 0x1_0000);
    m.load(b"\xf3\xa4");
    m.step().unwrap();
    assert_eq!((m.cpu.rip, m.cpu.gpr[RCX], m.cpu.gpr[RDI]), (CODE, 0xf000, 0x201_1000));
}

#[test]
fn a_data_breakpoint_stops_a_repeat_after_the_element() {
    let mut m = Machine::long();
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA, DATA + 0x100, 0x20);
    m.cpu.dr[0] = DATA + 0x105;
    m.cpu.dr7 = 0x1_0401; // a byte, written
    m.load(b"\xf3\xa4");
    let met = loop {
        if let Err(met) = m.step() {
            break met;
        }
    };
    assert_eq!(met, Exception::db(1));
    assert_eq!((m.cpu.rip, m.cpu.gpr[RCX]), (CODE, 0x1a));
}

#[test]
fn searches_stop_by_flag_and_count() {
    let mut m = Machine::long();
    m.write(DATA, b"hello\0");
    (m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA, u64::MAX);
    // repne scasb
    m.run(b"\xf2\xae").unwrap();
    assert_eq!((m.cpu.gpr[RDI], m.cpu.gpr[RCX]), (DATA + 6, u64::MAX - 6));
    m.write(DATA + 0x100, b"help");
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (DATA, DATA + 0x100, 4);
    // repe cmpsb
    m.run(b"\xf3\xa6").unwrap();
    assert_eq!((m.cpu.gpr[RCX], m.cpu.rflags & (rflags::ZF | rflags::CF)), (0, rflags::CF));
    // A count of zero leaves the flags.
    m.cpu.rflags |= rflags::ZF;
    m.run(b"\xf3\xa6").unwrap();
    assert_ne!(m.cpu.rflags & rflags::ZF, 0);
}

#[test]
fn string_addresses_wrap_at_their_size() {
    let mut m = Machine::real();
    m.write(DATA + 0xffff, b"x");
    m.write(DATA, b"y");
    (m.cpu.gpr[RSI], m.cpu.gpr[RDI], m.cpu.gpr[RCX]) = (0x1_ffff, 0x10, 2);
    m.run(b"\xf3\xa4").unwrap();
    assert_eq!((&m.read(DATA + 0x10), m.cpu.gpr[RSI]), (b"xy", 0x1_0001));
    // A word there leaves the segment.
    m.cpu.gpr[RSI] = 0xffff;
    assert_eq!(m.run(b"\xad"), Err(Exception::gp(0)));
    let mut m = Machine::long();
    (m.cpu.gpr[RSI], m.cpu.gpr[RCX]) = (0xf_0000_0000 | DATA, 0xf_0000_0001);
    // rep lodsb with 32-bit addresses
    m.run(b"\xf3\x67\xac").unwrap();
    assert_eq!((m.cpu.gpr[RSI], m.cpu.gpr[RCX]), (DATA + 1, 0));
}

#[test]
fn fetches_fault_where_the_instruction_needs_bytes() {
    let mut m = Machine::long();
    m.unmap(CODE + 0x1000);
    m.write(CODE + 0xffe, b"\x90\x90");
    m.cpu.rip = CODE + 0xffe;
    m.step().unwrap();
    m.step().unwrap();
    assert_eq!(m.step(), Err(Exception::pf(CODE + 0x1000, 0x10)));
    m.write(CODE + 0xfff, b"\x05");
    m.cpu.rip = CODE + 0xfff;
    assert_eq!(m.step(), Err(Exception::pf(CODE + 0x1000, 0x10)));
    assert_eq!(m.cpu.rip, CODE + 0xfff);
}

#[test]
fn bad_encodings_raise_what_they_should() {
    let mut m = Machine::long();
    let mut long = [0x66; 20];
    long[14] = 0x90;
    m.run(&long[..15]).unwrap();
    long[14..16].copy_from_slice(b"\x66\x90");
    assert_eq!(m.run(&long), Err(Exception::gp(0)));
    let undefined: [&[u8]; 6] = [
        b"\x0f\x0b",
        b"\x06",
        b"\xf0\x90",
        b"\xf0\x48\x01\xc0",
        b"\xf0\x48\x8b\x03",
        b"\x62\xf1\x7c\x48\x58\xc1",
    ];
    for code in undefined {
        assert_eq!(m.run(code), Err(Exception::UD), "{code:x?}");
    }
    // VEX in real mode.
    let mut m = Machine::real();
    assert_eq!(m.run(b"\xc4\xe2\x78\xf2\xc1"), Err(Exception::UD));
}

#[test]
fn changed_code_is_decoded_again() {
    let mut m = Machine::long();
    for (code, rax) in [(b"\xff\xc0\x90", 1), (b"\xff\xc8\x90", 0), (b"\xff\xc0\x90", 1)] {
        m.run(code).unwrap();
        assert_eq!(m.cpu.gpr[RAX], rax);
    }
}

#[test]
fn single_steps_trap_behind_the_instruction() {
    let mut m = Machine::long();
    m.cpu.rflags |= rflags::TF | rflags::RF;
    assert_eq!(m.run(b"\x90\x90"), Err(Exception::db(1 << 14)));
    assert_eq!((m.cpu.rip, m.cpu.rflags & rflags::RF), (CODE + 1, 0));
}

#[test]
fn segment_limits_count_outside_64_bit_mode() {
    let mut m = Machine::flat32();
    m.cpu.seg[3].limit = 0xffff;
    m.cpu.gpr[RBX] = 0xfffd;
    assert_eq!(m.run(b"\x8b\x03"), Err(Exception::gp(0)));
    m.cpu.gpr[RBX] = 0xfffc;
    m.run(b"\x8b\x03").unwrap();
    m.cpu.seg[2].limit = STACK as u32 - 4;
    assert_eq!(m.run(b"\x50"), Err(Exception::ss(0)));
    assert_eq!(m.cpu.paging.cr0 & cr0::PG, 0);
}

#[test]
fn decimal_corrections() {
    let mut m = Machine::flat32();
    m.cpu.gpr[RAX] = 0x79;
    // add al, 0x35; daa
    m.run(b"\x04\x35\x27").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.rflags & rflags::CF), (0x14, 1));
    m.cpu.gpr[RAX] = 0x35;
    // sub al, 0x47; das
    m.run(b"\x2c\x47\x2f").unwrap();
    assert_eq!((m.cpu.gpr[RAX], m.cpu.rflags & rflags::CF), (0x88, 1));
    m.cpu.gpr[RAX] = 0x0406;
    // aad; aam
    m.run(b"\xd5\x0a").unwrap();
    assert_eq!(m.cpu.gpr[RAX], 46);
    m.run(b"\xd4\x0a").unwrap();
    assert_eq!(m.cpu.gpr[RAX], 0x0406);
    assert_eq!(m.run(b"\xd4\x00"), Err(Exception::DE));
    // bound eax, [ebx]
    m.cpu.gpr[RBX] = DATA;
    m.cpu.gpr[RAX] = 0x501;
    m.write_u64(DATA, 0x0500_0000_0000);
    assert_eq!(m.run(b"\x62\x03"), Err(Exception::BR));
    m.cpu.gpr[RAX] = 0x500;
    m.run(b"\x62\x03").unwrap();
}

/// Prints millions of instructions per second; run with `--release`.
#[test]
#[ignore = "a measurement"]
fn speed() {
    let mut m = Machine::long();
    (m.cpu.gpr[RBX], m.cpu.gpr[RCX]) = (DATA, 2_000_000);
    let start = std::time::Instant::now();
    // add rax, [rbx]; mov [rbx+8], rax; xor edx, eax; lea rsi, [rax+rdx*4]; shr rsi, 3; dec rcx; jne
    m.run(b"\x48\x03\x03\x48\x89\x43\x08\x31\xc2\x48\x8d\x34\x90\x48\xc1\xee\x03\x48\xff\xc9\x75\xea")
        .unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{:.1} MIPS", 14.0 / seconds);
}
