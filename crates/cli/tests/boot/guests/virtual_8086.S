# Virtual-8086 mode under a small monitor in ring 0: instructions that depend on IOPL, interrupts that the monitor
# reflects into the 8086's own vector table, and ports by the map in the task state. Ends by ACPI.

    guest virtual_8086
    .set v86_low, v86_16 - LOW
    mov $(v86_16 - virtual_8086_org), %esi
    mov $LOW, %edi
    mov $(v86_end - v86_16), %ecx
    rep movsb
    lgdt v86_gdtr - virtual_8086_org
    lidt v86_idtr - virtual_8086_org
    ljmp $8, $(1f - virtual_8086_org)
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %ss
    mov $0x18, %eax
    ltr %ax
    movl $(v86_service - v86_low), 4 * 0x21
    say v86, "virtual-8086 mode\n"

    # As IRET finds them: ES, DS, FS, GS behind the stack; VM and IOPL are in the flags.
.macro enter_8086 iopl, ip
    push $0
    push $0
    push $0
    push $0
    push $0
    push $0x7000
    push $(0x20002 | \iopl << 12)
    push $0
    push $(\ip - v86_low)
    iret
.endm
    enter_8086 0, v86_16

# The 8086 has executed HLT. The second time it gets IOPL 3.
v86_back:
    mov $STACK, %esp
    btsl $0, v86_rounds - virtual_8086_org
    jc 1f
    mov v86_trapped - virtual_8086_org, %eax
    report v86, "trapped"
    enter_8086 3, v86_again
1:  mov v86_trapped - virtual_8086_org, %eax
    report v86, "trapped"
    mov $0x604, %edx                # PM1 control: soft-off
    mov $0x3400, %eax
    out %ax, (%dx)
2:  hlt
    jmp 2b

# General protection, here only from the 8086: error code, EIP, CS, EFLAGS, ESP, SS, ES, DS, FS, GS.
v86_monitor:
    pusha
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    incl v86_trapped - virtual_8086_org
    movzwl 40(%esp), %ebx
    shl $4, %ebx
    movzwl 36(%esp), %eax
    add %eax, %ebx                  # EBX: linear address of the instruction
    movzwl 52(%esp), %ecx
    shl $4, %ecx
    movzwl 48(%esp), %eax
    add %eax, %ecx                  # ECX: and of the stack
    mov v86_flags - virtual_8086_org, %edx
    movzbl (%ebx), %eax
    cmp $0xfa, %al
    je v86_cli
    cmp $0xfb, %al
    je v86_sti
    cmp $0x9c, %al
    je v86_pushf
    cmp $0x9d, %al
    je v86_popf
    cmp $0xcd, %al
    je v86_int
    cmp $0xcf, %al
    je v86_iret
    cmp $0xe4, %al
    je v86_in
    cmp $0xf4, %al
    je v86_back
    report v86, "what is"
    debug_exit 0

# The 8086's own interrupt flag is kept in v86_flags.
v86_cli:
    and $~0x200, %edx
    jmp v86_one_byte
v86_sti:
    or $0x200, %edx
v86_one_byte:
    mov %edx, v86_flags - virtual_8086_org
    incw 36(%esp)
v86_resume:
    popa
    add $4, %esp
    iret
v86_pushf:
    mov 44(%esp), %eax
    and $~0x200, %eax
    or %edx, %eax
    sub $2, %ecx
    mov %ax, (%ecx)
    subw $2, 48(%esp)
    jmp v86_one_byte
v86_popf:
    movzwl (%ecx), %eax
    addw $2, 48(%esp)
    mov %eax, %edx
    and $0x200, %edx
    and $0xcd5, %eax
    or $0x20202, %eax               # VM, and interrupts that are the monitor's own
    mov %eax, 44(%esp)
    jmp v86_one_byte
v86_int:
    mov 44(%esp), %eax
    and $~0x200, %eax
    or %edx, %eax
    mov %ax, -2(%ecx)
    mov 40(%esp), %eax
    mov %ax, -4(%ecx)
    mov 36(%esp), %eax
    add $2, %eax
    mov %ax, -6(%ecx)
    subw $6, 48(%esp)
    movzbl 1(%ebx), %eax
    movzwl 2(,%eax,4), %ebx
    movzwl (,%eax,4), %eax
    mov %eax, 36(%esp)
    mov %ebx, 40(%esp)
    jmp v86_resume
v86_iret:
    movzwl (%ecx), %eax
    dec %eax                        # one_byte counts one on
    mov %eax, 36(%esp)
    movzwl 2(%ecx), %eax
    mov %eax, 40(%esp)
    addw $4, 48(%esp)
    add $4, %ecx
    jmp v86_popf
v86_in:
    movb $0xaa, 28(%esp)            # AL
    incw 36(%esp)
    jmp v86_one_byte

# INT 21h of an 8086 with IOPL 3 comes straight here. The segment registers have been cleared.
v86_gate:
    push %eax
    mov %ds, %ebx
    mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %ebx, %eax
    report v86, "gate, DS"
    mov 12(%esp), %eax
    and $0x23000, %eax
    report v86, "gate, VM and IOPL"
    pop %eax
    iret

    console v86, %esi
v86_trapped:
    .long 0
v86_flags:
    .long 0
v86_rounds:
    .long 0
    .balign 8
v86_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    segment virtual_8086, v86_tss, v86_tss_end - v86_tss - 1, 0x89
v86_gdt_end:
v86_gdtr:
    table virtual_8086, v86_gdt, v86_gdt_end
v86_tss:
    .long 0, STACK, 0x10
    .fill 22, 4, 0
    .word 0, 0x68
    .fill 0x7f, 1, 0xff             # ports up to 3F7h are refused
    .fill 0x02, 1, 0x00             # 3F8h to 407h are not
v86_tss_end:
v86_idt:
    .fill 13, 8, 0
    gate virtual_8086, v86_monitor
    .fill 19, 8, 0
    gate virtual_8086, v86_gate, 0xee
v86_idt_end:
v86_idtr:
    table virtual_8086, v86_idt, v86_idt_end

    .code16
v86_16:
    say v86_8086, "hello from the 8086\n"
    sti
    pushf
    pop %ax
    movzwl %ax, %eax
    and $0x200, %eax
    report v86_8086, "IF"
    cli
    pushf
    pop %ax
    movzwl %ax, %eax
    and $0x200, %eax
    report v86_8086, "IF"
    mov $0x1234, %eax
    clc
    int $0x21
    setc %bl
    report v86_8086, "INT 21h"
    movzbl %bl, %eax
    report v86_8086, "carry"
    xor %eax, %eax
    in $0x21, %al
    report v86_8086, "port 21h"
    hlt

v86_again:
    say v86_8086, "with IOPL 3\n"
    pushf
    pop %ax
    movzwl %ax, %eax
    report v86_8086, "flags"
    cli
    sti
    cli
    int $0x21
    smsw %ax
    movzwl %ax, %eax
    and $1, %eax
    report v86_8086, "CR0.PE"
    hlt

v86_service:
    push %bp
    mov %sp, %bp
    not %ax
    orw $1, 6(%bp)
    pop %bp
    iret
    console v86_8086, %si
v86_end:
    .code32
    end_guest virtual_8086
