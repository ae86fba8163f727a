# What a multiboot kernel is given: registers, command line, memory map, modules (specification 3.2 and 3.3).

    guest multiboot
    mov %ebx, %ebp
    report mb, "EAX"
    say mb, "command line: "
    mov 16(%ebp), %esi
    call mb_print
    mov 8(%ebp), %eax
    report mb, "KiB from 1 MiB on"
    # Entries of the map: size of the rest, base, length, type.
    mov 48(%ebp), %edi
    mov 44(%ebp), %ebx
    add %edi, %ebx
1:  mov 4(%edi), %eax
    report mb, "base"
    mov 12(%edi), %eax
    report mb, "  length"
    mov 20(%edi), %eax
    report mb, "  type"
    add (%edi), %edi
    add $4, %edi
    cmp %ebx, %edi
    jb 1b
    # Entries of the list of modules: begin, end, text.
    mov 20(%ebp), %ebx
    mov 24(%ebp), %edi
1:  say mb, "module "
    mov 8(%edi), %esi
    call mb_print
    mov 4(%edi), %eax
    sub (%edi), %eax
    report mb, "  bytes"
    mov (%edi), %eax
    mov (%eax), %eax
    report mb, "  first"
    add $16, %edi
    dec %ebx
    jnz 1b
    debug_exit 0x14

mb_print:
    lodsb
    test %al, %al
    jz 1f
    call mb_put
    jmp mb_print
1:  mov $'\n', %al
    call mb_put
    ret
    console mb, %esi
    end_guest multiboot
