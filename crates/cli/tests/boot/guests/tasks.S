# Hardware task switches: by calls, jumps, IRET and task gates, also for a double fault.

    guest tasks
    lgdt ts_gdtr - tasks_org
    lidt ts_idtr - tasks_org
    ljmp $8, $(1f - tasks_org)
1:  mov $0x10, %eax
    mov %eax, %ds
    mov %eax, %es
    mov %eax, %fs
    mov %eax, %gs
    mov %eax, %ss
    mov $0x18, %eax
    ltr %ax

    say ts, "tasks\n"
    mov $0x1111, %ebx
    lcall $0x20, $0                 # to the second task, nested
    mov %ebx, %eax
    report ts, "first, own EBX"
    mov %cr0, %eax
    and $8, %eax
    report ts, "first, CR0.TS"
    clts
    lcall $0x20, $0                 # it goes on behind its IRET
    movzbl ts_gdt + 0x20 + 5 - tasks_org, %eax
    report ts, "second, type"
    ljmp $0x28, $0                  # to the third task, not nested
    say ts, "first again\n"
    mov $7, %eax
    int $0x30                       # to the fourth task, through a task gate
    pushf
    pop %eax
    and $0x4000, %eax
    report ts, "first, NT"

    # A debug trap as a task begins (its T flag).
    movl $1, ts_fourth + 0x64 - tasks_org
    lcall $0x30, $0
    movl $0, ts_fourth + 0x64 - tasks_org

    # Busy tasks cannot be called, and what is no task cannot be loaded.
    lcall $0x18, $0
ts_after_busy:
    # The gates of undefined instructions and of gates that are not present are not present: a double fault, which has
    # a task of its own, with a stack of its own.
    mov $0x12345678, %esp
ts_fatal:
    ud2

# The second task, called.
ts_enter_second:
    say ts, "second, back link"
    movzwl ts_second - tasks_org, %eax
    call ts_number
    pushf
    pop %eax
    and $0x4000, %eax
    report ts, "second, NT"
    movzbl ts_gdt + 0x18 + 5 - tasks_org, %eax
    report ts, "first, type"
    mov $0x2222, %ebx
    iret
    mov %ebx, %eax
    report ts, "second again, EBX"
    iret

# The third task, jumped to.
ts_enter_third:
    movzbl ts_gdt + 0x18 + 5 - tasks_org, %eax
    report ts, "third, first's type"
    ljmp $0x18, $0

# The fourth task, which serves an interrupt.
ts_enter_fourth:
    movzwl ts_fourth - tasks_org, %eax
    report ts, "fourth, back link"
    mov ts_first + 0x28 - tasks_org, %eax
    report ts, "fourth, EAX of the first"
    iret
    say ts, "fourth again\n"
    iret

# The task of double faults.
ts_enter_last:
    mov (%esp), %eax
    report ts, "double fault, error"
    mov ts_first + 0x38 - tasks_org, %eax
    report ts, "ESP of the first"
    mov ts_first + 0x20 - tasks_org, %eax
    sub $(ts_fatal - tasks_org), %eax
    report ts, "its EIP, +"
    debug_exit 0x13

ts_trap:
    push %eax
    push %esi
    mov %dr6, %eax
    and $0xe00f, %eax
    report ts, "trap, DR6"
    xor %eax, %eax
    mov %eax, %dr6
    pop %esi
    pop %eax
    iret
ts_general:
    pop %eax
    report ts, "general protection"
    movl $(ts_after_busy - tasks_org), (%esp)
    iret

ts_number:
    push %eax
    say ts, " "
    pop %eax
    call ts_hex
    say ts, "\n"
    ret
    console ts, %esi

# A task-state segment: entry, stack, and the same data segments for all.
.macro task_state entry, stack
    .fill 8, 4, 0
    .long \entry - tasks_org, 2, 0, 0, 0, 0, \stack, 0, 0, 0
    .long 0x10, 8, 0x10, 0x10, 0x10, 0x10, 0, 0x680000
.endm
    .balign 8
ts_first:
    .fill 26, 4, 0
ts_second:
    task_state ts_enter_second, 0x181000
ts_third:
    task_state ts_enter_third, 0x182000
ts_fourth:
    task_state ts_enter_fourth, 0x183000
ts_last:
    task_state ts_enter_last, 0x184000

ts_gdt:
    .quad 0
    .quad 0x00cf9b000000ffff
    .quad 0x00cf93000000ffff
    segment tasks, ts_first, 0x67, 0x89     # 18
    segment tasks, ts_second, 0x67, 0x89    # 20
    segment tasks, ts_third, 0x67, 0x89     # 28
    segment tasks, ts_fourth, 0x67, 0x89    # 30
    segment tasks, ts_last, 0x67, 0x89      # 38
ts_gdt_end:
ts_gdtr:
    table tasks, ts_gdt, ts_gdt_end
ts_idt:
    .quad 0
    gate tasks, ts_trap
    .fill 4, 8, 0
    gate tasks, ts_fatal, 0x0e              # 6: not present
    .quad 0
    .quad 0x0000850000380000                # 8: a task gate
    .fill 2, 8, 0
    gate tasks, ts_fatal, 0x0e              # 11: not present
    .quad 0
    gate tasks, ts_general                  # 13
    .fill 34, 8, 0
    .quad 0x0000850000300000                # 30h: a task gate
ts_idt_end:
ts_idtr:
    table tasks, ts_idt, ts_idt_end
    end_guest tasks
