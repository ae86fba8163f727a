# A guest of a few instructions that times exits by itself. Its entry is that of the PVH protocol: flat 32-bit protected
# mode without paging. All that it prints goes to COM1, a line each: FIRST at once, for each kind of exit its name and
# the ticks of the time-stamp counter that ROUNDS of them take, and END.

.set IMAGE, 0x100000            # where it is loaded
.set STACK, 0x110000            # within what the file asks for
.set COM1, 0x3f8
.set SCRATCH, COM1 + 7          # a register of the 16550 without any effect
.set IOAPIC, 0xfec00000         # the index; the data is at offset 10h
.set WARM_UP, 64
.set ROUNDS, 4096

# Does something so many times.
.macro times count, what:vararg
    mov $\count, %ecx
1:  push %ecx
    \what
    pop %ecx
    dec %ecx
    jnz 1b
.endm

# Prints what comes behind the call.
.macro say text
    call monitors_say
    .asciz "\text"
.endm

# Times ROUNDS of something and prints the ticks.
.macro measure name, what:vararg
    times WARM_UP, \what
    rdtsc
    push %edx
    push %eax
    times ROUNDS, \what
    rdtsc
    pop %ecx
    pop %ebx
    sub %ecx, %eax
    sbb %ebx, %edx
    say "\name "
    push %eax
    mov %edx, %eax
    call monitors_hex
    pop %eax
    call monitors_hex
    say "\n"
.endm

.macro port_out
    mov $SCRATCH, %dx
    out %al, (%dx)
.endm
.macro port_in
    mov $SCRATCH, %dx
    in (%dx), %al
.endm
.macro memory_read
    mov IOAPIC + 0x10, %eax
.endm
.macro kernel_only
    xor %eax, %eax
    cpuid
.endm

    .globl monitors_guest
    .hidden monitors_guest
monitors_guest:
    mov $COM1, %dx
    mov $'F', %al
    out %al, (%dx)
    # Some monitors give segments that end below the I/O APIC.
    lgdt IMAGE + monitors_gdtr - monitors_guest
    mov $8, %ax
    mov %ax, %ds
    mov %ax, %ss
    mov $STACK, %esp
    say "IRST\n"
    movl $1, IOAPIC             # the version register
    measure "port-out", port_out
    measure "port-in", port_in
    measure "memory-read", memory_read
    measure "cpuid", kernel_only
    say "END\n"
    cli
2:  hlt
    jmp 2b

# Nothing, and all of memory as data.
monitors_gdt:
    .quad 0, 0x00cf93000000ffff
monitors_gdtr:
    .word 15
    .long IMAGE + monitors_gdt - monitors_guest

# Prints AL.
monitors_put:
    push %edx
    push %eax
    mov $COM1 + 5, %dx
1:  in (%dx), %al
    test $0x20, %al             # the transmitter's register is empty
    jz 1b
    pop %eax
    mov $COM1, %dx
    out %al, (%dx)
    pop %edx
    ret

# Prints the text behind its call.
monitors_say:
    pop %esi
    push %eax
1:  lodsb
    test %al, %al
    jz 2f
    call monitors_put
    jmp 1b
2:  pop %eax
    jmp *%esi

# Prints EAX.
monitors_hex:
    mov $8, %ecx
1:  rol $4, %eax
    push %eax
    and $15, %al
    add $'0', %al
    cmp $'9' + 1, %al
    jb 2f
    add $'a' - '9' - 1, %al
2:  call monitors_put
    pop %eax
    loop 1b
    ret

    .globl monitors_guest_end
    .hidden monitors_guest_end
monitors_guest_end:
