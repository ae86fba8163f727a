# Protected mode with segments, rings and two-level paging. Most of what it does faults, and it prints each fault:
# vector, error code, CR2.

    guest protected_mode
    .set pm_directory, 0x200000     # page directory
    .set pm_pages, 0x201000         # page table of the first 4 MiB
    .set pm_user_stack, 0x190000

    # Entries of the interrupt table lead to stubs of 16 bytes each.
    mov $(pm_stubs - protected_mode_org), %eax
    mov $(pm_idt - protected_mode_org), %edi
    mov $32, %ecx
1:  mov %ax, (%edi)
    movl $0x8e000008, 2(%edi)       # interrupt gate, selector 8
    movw $(IMAGE >> 16), 6(%edi)
    add $16, %eax
    add $8, %edi
    loop 1b
    lgdt pm_gdtr - protected_mode_org
    lidt pm_idtr - protected_mode_org
    ljmp $8, $(1f - protected_mode_org)
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x48, %eax
    ltr %ax

# Does something that has to fault and goes on behind it.
.macro faults insn:vararg
    movl $(1f - protected_mode_org), pm_resume - protected_mode_org
    \insn
    call pm_missed
1:
.endm

    say pm, "segments\n"
    mov $0x18, %eax
    mov %eax, %fs                   # 4 KiB
    mov $0x20, %eax
    mov %eax, %gs                   # expands down: from 4 KiB on
    mov %fs:0xffc, %eax
    faults mov %fs:0xffd, %eax
    mov %gs:0x1000, %eax
    faults mov %gs:0xffc, %eax
    mov $0x28, %eax
    mov %eax, %fs                   # read-only
    mov %fs:0, %eax
    faults mov %eax, %fs:0
    mov $0x30, %eax
    faults mov %eax, %fs            # not present
    mov $0x58, %eax
    faults mov %eax, %fs            # beyond the table
    mov $0x18, %eax
    faults mov %eax, %ss            # read-only stack
    xor %eax, %eax
    mov %eax, %fs
    faults mov %fs:0, %eax          # null
    faults ud2
    movl $0, pm_quotient - protected_mode_org
    faults divl pm_quotient - protected_mode_org

    say pm, "pages\n"
    # The first 4 MiB are mapped to themselves for everybody, but some pages; 4 MiB is also at 0, as one large page.
    mov $pm_pages, %edi
    mov $7, %eax
1:  mov %eax, (%edi)
    add $0x1000, %eax
    add $4, %edi
    cmp $(pm_pages + 0x1000), %edi
    jb 1b
    movl $(pm_pages | 7), pm_directory
    movl $0x83, pm_directory + 4
    movl $0, pm_pages + 4 * 0x300           # 300000: not there
    movl $0x301006, pm_pages + 4 * 0x301    # 301000: comes when it is needed
    movl $0x302005, pm_pages + 4 * 0x302    # 302000: read-only
    movl $0x303003, pm_pages + 4 * 0x303    # 303000: not for users
    mov $pm_directory, %eax
    mov %eax, %cr3
    mov %cr4, %eax
    or $0x10, %eax                  # PSE
    mov %eax, %cr4
    mov %cr0, %eax
    or $0x80000000, %eax
    mov %eax, %cr0
    mov 0x500000, %eax
    report pm, "large page"
    faults mov 0x300004, %eax
    faults mov %eax, 0x300008
    movl $0x12345678, 0x301000      # the fault puts it in
    mov 0x301000, %eax
    report pm, "late page"
    movl $1, 0x302000               # WP is off
    mov %cr0, %eax
    or $0x10000, %eax
    mov %eax, %cr0
    faults movl $2, 0x302000
    # What the accesses left in the entries: accessed, dirty.
    mov pm_pages + 4 * 0x302, %eax
    report pm, "entry"
    mov pm_pages + 4 * 0x303, %eax
    report pm, "entry"
    mov pm_directory + 4, %eax
    report pm, "entry"

    say pm, "ring 3\n"
    mov $0x43, %eax
    mov %eax, %ds                   # IRET would clear selectors of ring 0
    mov %eax, %es
    push $0x43
    push $pm_user_stack
    push $2
    push $0x3b
    push $(pm_user - protected_mode_org)
    iret
pm_user:
    mov %cs, %eax
    push %eax
    lcall $0x53, $0
    faults hlt
    faults mov %cr0, %eax
    faults in $0x80, %al
    faults cli
    faults int $0x21
    faults mov 0x303000, %eax
    faults movl $1, 0x302000
    faults mov 0x300000, %eax
    mov $0x10, %eax
    faults mov %eax, %fs
    push $0x77
    lcall $0x53, $0
    int $0x80

# The call gate of ring 3, which brings one argument: print it and whence the call came.
pm_gate:
    mov 8(%esp), %eax
    report pm, "called with"
    mov 4(%esp), %eax
    report pm, "from"
    mov 16(%esp), %eax
    report pm, "whose SS is"
    lret $4

# Ring 3 has done.
pm_done:
    mov %esp, %eax
    report pm, "back with ESP"
    debug_exit 0x11

pm_missed:
    say pm, "no fault\n"
    ret

# Interrupt frames begin with vector and error code here.
pm_common:
    cmpl $14, (%esp)
    jne 1f
    mov %cr2, %eax
    cmp $0x301000, %eax
    je pm_late
1:  say pm, "  fault "
    mov (%esp), %eax
    call pm_hex
    say pm, " "
    mov 4(%esp), %eax
    call pm_hex
    cmpl $14, (%esp)
    jne 1f
    say pm, " "
    mov %cr2, %eax
    call pm_hex
1:  say pm, "\n"
    add $8, %esp
    mov pm_resume - protected_mode_org, %eax
    mov %eax, (%esp)
    iret
pm_late:
    orb $1, pm_pages + 4 * 0x301
    add $8, %esp
    iret

    console pm, %esi
pm_resume:
    .long 0
pm_quotient:
    .long 0

    .balign 16
pm_stubs:
    .set pm_vector, 0
    .rept 32
    .balign 16
    .ifeq (pm_vector - 8) * (pm_vector - 10) * (pm_vector - 11) * (pm_vector - 12) * (pm_vector - 13) * (pm_vector - 14) * (pm_vector - 17)
    .else
    push $0                         # these have no error code
    .endif
    push $pm_vector
    jmp pm_common
    .set pm_vector, pm_vector + 1
    .endr

    .balign 8
pm_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff        # 08 code
    .quad 0x00cf93000000ffff        # 10 data
    .quad 0x0040910000000fff        # 18 data, read-only, 4 KiB
    .quad 0x0040970000000fff        # 20 data that expands down, above 4 KiB
    .quad 0x00cf91000000ffff        # 28 data, read-only
    .quad 0x00cf13000000ffff        # 30 data, not present
    .quad 0x00cffb000000ffff        # 38 code of ring 3
    .quad 0x00cff3000000ffff        # 40 data of ring 3
    segment protected_mode, pm_tss, 0x67, 0x89              # 48
    .word pm_gate - guest_protected_mode, 8, 0xec01, IMAGE >> 16    # 50 call gate, one argument
pm_gdt_end:
pm_gdtr:
    table protected_mode, pm_gdt, pm_gdt_end

pm_tss:
    .long 0, STACK, 0x10
    .fill 22, 4, 0
    .word 0, 0x68                   # no map of ports
pm_idt:
    .fill 32, 8, 0
    .fill 96, 8, 0
    gate protected_mode, pm_done, 0xee
pm_idt_end:
pm_idtr:
    table protected_mode, pm_idt, pm_idt_end
    end_guest protected_mode
