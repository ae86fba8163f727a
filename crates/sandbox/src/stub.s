// See stub.rs. R14: the orders; EBX: number of the last order; R15D: 1 in the thread of user code.

.globl ruse_stub_start, ruse_stub_trap, ruse_stub_stop, ruse_stub_return, ruse_stub_end
.hidden ruse_stub_start, ruse_stub_trap, ruse_stub_stop, ruse_stub_return, ruse_stub_end

ruse_stub_start:
    // Maps what is shared from standard output, the file of it.
    lea r14, [rip + ruse_stub_start + {code_size}]
    mov rdi, r14
    mov esi, {orders_size}
    mov edx, {read}
    mov r10d, {shared_fixed}
    mov r8d, 1
    xor r9d, r9d
    mov eax, {mmap}
    syscall
    test rax, rax
    js 9f

    // Ends with the monitor, which must not have ended yet.
    mov edi, {set_death_signal}
    mov esi, {kill}
    mov eax, {prctl}
    syscall
    mov eax, {getppid}
    syscall
    cmp eax, [r14 + {parent}]
    jne 9f
    xor ebx, ebx
    xor r15d, r15d

    // Waits for an order.
2:  mov eax, [r14 + {number}]
    cmp eax, ebx
    jne 3f
    lea rdi, [r14 + {number}]
    mov esi, {futex_wait}
    mov edx, ebx
    xor r10d, r10d
    mov eax, {futex}
    syscall
    jmp 2b

    // Carries it out. What fails ends the process.
3:  mov ebx, eax
    mov r12d, [r14 + {count}]
    lea r13, [r14 + {calls}]
4:  test r12d, r12d
    je 6f
    mov rdi, [r13 + {args}]
    mov rsi, [r13 + {args} + 8]
    mov rdx, [r13 + {args} + 16]
    mov r10, [r13 + {args} + 24]
    mov r8, [r13 + {args} + 32]
    mov r9, [r13 + {args} + 40]
    mov rax, [r13]
    syscall
    // The answer to a stop that is not there any more: it comes again, and the monitor answers.
    cmp qword ptr [r13], {ioctl}
    je 5f
    test rax, rax
    js 9f
    cmp qword ptr [r13], {clone}
    jne 5f
    // The calls behind a clone are the new thread's.
    test rax, rax
    jne 2b
    mov r15d, 1
5:  add r13, {call_size}
    dec r12d
    jmp 4b

    // The first thread says that it has done so, the new one traps.
6:  test r15d, r15d
    jne 7f
    lea rdi, [rip + ruse_stub_start + {code_size} + {orders_size} + {done}]
    mov [rdi], ebx
    mov esi, {futex_wake}
    mov edx, 1
    mov eax, {futex}
    syscall
    jmp 2b
7:  ud2

9:  mov edi, 1
    mov eax, {exit_group}
    syscall
    ud2

    // The signal handler. All signals are blocked in it.
ruse_stub_trap:
    mov rdi, rsp
    rdfsbase rsi
    rdgsbase rdx
    mov eax, {stop}
    syscall
    // User code may have jumped to the call: nothing here relies on registers.
ruse_stub_stop:
    mov rax, [rip + ruse_stub_start + {code_size} + {orders_size} + {fs_base}]
    wrfsbase rax
    mov rax, [rip + ruse_stub_start + {code_size} + {orders_size} + {gs_base}]
    wrgsbase rax
    mov rsp, [rip + ruse_stub_start + {code_size} + {orders_size} + {frame}]
    push qword ptr [rip + ruse_stub_start + {code_size} + {orders_size} + {flags}]
    popfq
    mov eax, {rt_sigreturn}
    syscall
ruse_stub_return:
    ud2
ruse_stub_end:
