# Three-level paging: pages that are not executable, reserved bits, large pages, and the four entries that CR3 loads.

    guest pae
    .set pae_roots, 0x200000        # page-directory-pointer table
    .set pae_low, 0x201000          # page directory of the first GiB
    .set pae_high, 0x202000         # page directory of the second GiB
    .set pae_pages, 0x203000        # page table of the first 2 MiB

    movw $(pae_general - guest_pae), pae_idt - pae_org + 8 * 13
    movw $(pae_page - guest_pae), pae_idt - pae_org + 8 * 14
    lgdt pae_gdtr - pae_org
    lidt pae_idtr - pae_org
    ljmp $8, $(1f - pae_org)
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss

    # The first 2 MiB by small pages, the next by a large one; at 1 GiB the first 2 MiB again, not executable.
    mov $pae_pages, %edi
    mov $3, %eax
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $8, %edi
    cmp $(pae_pages + 0x1000), %edi
    jb 1b
    movl $(pae_low | 1), pae_roots
    movl $(pae_high | 1), pae_roots + 8
    movl $(pae_pages | 3), pae_low
    movl $0x200083, pae_low + 8
    movl $0x83, pae_high
    movl $0x80000000, pae_high + 4
    # 170000 is not executable, 171000 has a bit beyond any physical address.
    movl $0x80000000, pae_pages + 8 * 0x170 + 4
    movl $0x00080000, pae_pages + 8 * 0x171 + 4
    movb $0xc3, 0x170000            # RET
    movb $0xc3, 0x172000

    mov $0xc0000080, %ecx
    rdmsr
    or $0x800, %eax                 # EFER.NXE
    wrmsr
    mov %cr4, %eax
    or $0x20, %eax                  # PAE
    mov %eax, %cr4
    mov $pae_roots, %eax
    mov %eax, %cr3
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0

.macro pae_faults insn:vararg
    movl $(1f - pae_org), pae_resume - pae_org
    \insn
1:
.endm
    say pae, "paging with 64-bit entries\n"
    mov 0x40100000, %eax
    report pae, "second GiB"
    mov $0x172000, %eax
    call *%eax
    mov $0x170000, %eax
    pae_faults call *%eax
    mov $0x40172000, %eax
    pae_faults call *%eax
    pae_faults mov 0x171000, %eax
    pae_faults mov 0x80000000, %eax

    # An entry that changes in memory counts from the next load of CR3 on.
    movl $0, pae_roots + 8
    invlpg 0x40100000
    mov 0x40100000, %eax
    report pae, "second GiB"
    mov %cr3, %eax
    mov %eax, %cr3
    pae_faults mov 0x40100000, %eax
    # A reserved bit in such an entry is refused as it is loaded.
    movl $3, pae_roots + 16
    pae_faults mov %eax, %cr3

    # The large page has been read and written, the small one at 171000 never.
    mov pae_low + 8, %eax
    report pae, "entry"
    mov pae_pages + 8 * 0x171, %eax
    report pae, "entry"
    mov pae_pages + 8 * 0x172, %eax
    report pae, "entry"
    debug_exit 0x12

pae_general:
    say pae, "  general protection "
    pop %eax
    call pae_hex
    say pae, "\n"
    jmp 1f
pae_page:
    say pae, "  page fault "
    pop %eax
    call pae_hex
    say pae, " "
    mov %cr2, %eax
    report pae, "at"
1:  mov pae_resume - pae_org, %eax
    mov %eax, (%esp)
    mov $pae_roots, %eax
    iret

    console pae, %esi
pae_resume:
    .long 0
    .balign 8
pae_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
pae_gdt_end:
pae_gdtr:
    table pae, pae_gdt, pae_gdt_end
pae_idt:
    .rept 15
    .word 0, 8, 0x8e00, IMAGE >> 16
    .endr
pae_idt_end:
pae_idtr:
    table pae, pae_idt, pae_idt_end
    end_guest pae
