# Real mode: interrupts through the vector table, the timer, faults, segment arithmetic and limits.

    guest real_mode
    .set rm_low, rm_16 - LOW
    mov $(rm_16 - real_mode_org), %esi
    mov $LOW, %edi
    mov $(rm_end - rm_16), %ecx
    rep movsb
    lgdt rm_gdtr - real_mode_org
    ljmp $8, $LOW

rm_gdtr:
    table real_mode, rm_gdt, rm_gdt_end
rm_gdt:
    .quad 0
    .quad 0x00009b000000ffff        # code, 16 bits
    .quad 0x000093000000ffff        # data, 64 KiB
    .quad 0x00cf93000000ffff        # data, 4 GiB
rm_gdt_end:

    .code16
rm_16:
    mov $0x18, %ax
    mov %ax, %fs                    # keeps its limit in real mode
    mov $0x10, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %gs
    mov %ax, %ss
    mov %cr0, %eax
    and $~1, %al
    mov %eax, %cr0
    ljmp $0, $(rm_real - rm_low)
rm_real:
    xor %ax, %ax
    mov %ax, %ds
    mov %ax, %es
    mov %ax, %ss
    mov $0x7000, %sp
    lidt rm_idtr - rm_low
    say rm "real mode\n"

    # Vectors 0 (division), 8 (timer), 13 (limit) and 33 (a service).
    movl $(rm_divide - rm_low), 4 * 0
    movl $(rm_timer - rm_low), 4 * 8
    movl $(rm_limit - rm_low), 4 * 13
    movl $(rm_service - rm_low), 4 * 33

    # 1000 interrupts a second from channel 0 of the 8254, on vector 8 of the 8259.
    mov $0x11, %al
    out %al, $0x20
    mov $8, %al
    out %al, $0x21
    mov $4, %al
    out %al, $0x21
    mov $1, %al
    out %al, $0x21
    mov $0xfe, %al
    out %al, $0x21
    mov $0x34, %al
    out %al, $0x43
    mov $(1193 & 0xff), %al
    out %al, $0x40
    mov $(1193 >> 8), %al
    out %al, $0x40
    sti
1:  hlt
    cmpb $10, rm_ticks - rm_low
    jb 1b
    cli
    movzbl rm_ticks - rm_low, %eax
    report rm, "ticks"

    # A division fault returns to the instruction itself; the handler steps over it.
    mov $-1, %ebx
    mov $7, %eax
    xor %cl, %cl
rm_division:
    div %cl
    mov %ebx, %eax
    report rm, "division fault at +"

    # A service gets registers and flags, and gives some back on the stack.
    mov $0x1200, %ax
    mov $0x0034, %dx
    clc
    int $33
    pushf
    pop %cx
    and $1, %cx
    shl $16, %ecx
    movzwl %ax, %eax
    or %ecx, %eax
    report rm, "service"

    # FFFF:0010 is 1 MiB: the image begins there.
    mov $0xffff, %ax
    mov %ax, %es
    mov %es:0x10, %eax
    report rm, "high memory"

    # A word at FFFFh crosses the limit, unless the segment kept a larger one from protected mode.
    mov $-1, %ebx
rm_beyond:
    mov %gs:0xffff, %ax
    mov %ebx, %eax
    report rm, "limit fault at +"
    mov $0x100000, %ebx
    mov %fs:(%ebx), %eax
    report rm, "unreal"

    debug_exit 0x10

rm_divide:
    push %bp
    mov %sp, %bp
    movzwl 2(%bp), %ebx
    sub $(rm_division - rm_low), %bx
    addw $2, 2(%bp)
    pop %bp
    iret
rm_timer:
    push %ax
    cmpb $10, %cs:rm_ticks - rm_low
    jae 1f
    incb %cs:rm_ticks - rm_low
1:  mov $0x20, %al
    out %al, $0x20
    pop %ax
    iret
rm_limit:
    push %bp
    mov %sp, %bp
    movzwl 2(%bp), %ebx
    sub $(rm_beyond - rm_low), %bx
    addw $4, 2(%bp)
    pop %bp
    iret
rm_service:
    push %bp
    mov %sp, %bp
    add %dx, %ax
    orw $1, 6(%bp)
    pop %bp
    iret

rm_ticks:
    .byte 0
rm_idtr:
    .word 0x3ff
    .long 0
    console rm, %si
rm_end:
    .code32
    end_guest real_mode
