# Guests that end badly, or not at all.

    # A fault without an interrupt table.
    guest triple_fault
    lidt tf_idtr - triple_fault_org
    mov $0xdeadbeef, %eax
    ud2
tf_idtr:
    .word 0
    .long 0
    end_guest triple_fault

    # What is typed comes back.
    guest echo
    say echo, "ready\n"
1:  mov $0x3fd, %dx
    in (%dx), %al
    test $1, %al
    jz 1b
    mov $0x3f8, %dx
    in (%dx), %al
    call echo_put
    jmp 1b
    console echo, %esi
    end_guest echo
