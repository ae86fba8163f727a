# What the guests have in common. Each is a multiboot kernel without a format that is loaded at 1 MiB and entered in
# flat 32-bit protected mode without paging (Multiboot Specification 0.6.96, 3.1 and 3.2). An image has less than
# 64 KiB, so that the low halves of its addresses are offsets in it.

.set IMAGE, 0x100000            # where images are loaded
.set STACK, 0x180000            # where stacks begin
.set LOW, 0x8000                # where 16-bit code is copied to

# Begins the guest NAME, and defines NAME_org, which is subtracted from a label to give its address.
.macro guest name
    .balign 16
    .globl guest_\name
    .hidden guest_\name
guest_\name:
    .set \name\()_org, guest_\name - IMAGE
    .long 0x1badb002, 0x10000, -(0x1badb002 + 0x10000)
    .long IMAGE, IMAGE, 0, 0, IMAGE + 0x20
    mov $STACK, %esp
.endm

.macro end_guest name
    .globl guest_\name\()_end
    .hidden guest_\name\()_end
guest_\name\()_end:
.endm

# Routines on COM1 in the code size of where they are: P_text prints the text behind its call, P_hex prints EAX.
# IP is %si or %esi, whichever holds a return address.
.macro console p, ip
\p\()_put:
    push %edx
    push %eax
    mov $0x3fd, %dx
1:  in (%dx), %al
    test $0x20, %al
    jz 1b
    pop %eax
    mov $0x3f8, %dx
    out %al, (%dx)
    pop %edx
    ret
\p\()_text:
    pop \ip
    push %eax
1:  lodsb
    test %al, %al
    jz 2f
    call \p\()_put
    jmp 1b
2:  pop %eax
    push \ip
    ret
\p\()_hex:
    push %ecx
    mov $8, %ecx
1:  rol $4, %eax
    push %eax
    and $15, %al
    add $'0', %al
    cmp $'9' + 1, %al
    jb 2f
    add $'a' - '9' - 1, %al
2:  call \p\()_put
    pop %eax
    loop 1b
    pop %ecx
    ret
.endm

# Prints a text. ESI is lost.
.macro say p, text:vararg
    call \p\()_text
    .asciz \text
.endm

# Prints a text, EAX and the end of the line.
.macro report p, text
    say \p, "\text "
    call \p\()_hex
    say \p, "\n"
.endm

# Ends the machine with the exit code V << 1 | 1.
.macro debug_exit v
    mov $\v, %al
    out %al, $0xf4
1:  hlt
    jmp 1b
.endm

# An interrupt gate of 32 bits (KIND 8Eh, or EEh for ring 3) to a label of the guest NAME, at selector 8.
.macro gate name, label, kind=0x8e
    .word \label - guest_\name, 8, \kind << 8, IMAGE >> 16
.endm

# A descriptor of a segment with its base in the image of NAME.
.macro segment name, label, limit, kind
    .word \limit, \label - guest_\name, IMAGE >> 16 | \kind << 8, 0
.endm

# The operand of LGDT or LIDT for the table of the guest NAME between two labels.
.macro table name, label, end
    .word \end - \label - 1
    .long \label - \name\()_org
.endm
