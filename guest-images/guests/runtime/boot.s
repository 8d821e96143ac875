# From the monitor's start state to ring 3, for every vCPU.
#
# Entered in the PVH start state: 32-bit protected mode, paging off, flat segments, interrupts off,
# EBX = address of hvm_start_info (Xen, public/arch-x86/hvm/start_info.h). The boot vCPU enters at
# `pvh_entry`; any other at `direct_start`, with its index, from 1 on, in EAX.
#
# On a host that emulates ring 0, each instruction here costs half a microsecond, and an instruction
# that the emulator does not support ends the guest. Therefore the image contains all tables ready to
# use, no vCPU waits for another, and only plain instructions are used.

    .set CPUS_MOST, 16
    .set STACK_SHIFT, 14            # ring 3 stack of each vCPU: 16 KiB
    .set TRAP_STACK, 256            # ring 0 stack of each vCPU in bytes: one frame

    .section .note.ferry, "a", @note
    .balign 4
    .long 4, 8, 18                  # XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h)
    .asciz "Xen"
    .quad pvh_entry
    .long 6, 4, 1                   # direct start, see the crate's documentation
    .asciz "Ferry"
    .balign 4
    .long direct_start

# Identity map of the first 4 GiB with 2 MiB pages, accessible to ring 3 (Intel SDM vol. 3A, 4.5).
# The accessed and dirty bits are set in advance, so that page walks do not write to these tables.
# The linker script places this section at 1 MiB. The address must be known at assembly time, because
# the descriptors below contain it in pieces.

    .set TABLES, 0x100000
    .set TABLE_ENTRY, 0x27          # accessed, user, writable, present
    .set LEAF_ENTRY, 0xe7           # the same, plus dirty and page size

    .section .tables, "aw"
    .globl page_directory_pointers
level4:
    .quad TABLES + 0x1000 + TABLE_ENTRY
    .fill 511, 8, 0
page_directory_pointers:
    .set number, 0
    .rept 4
    .quad TABLES + 0x2000 + number * 0x1000 + TABLE_ENTRY
    .set number, number + 1
    .endr
    .fill 508, 8, 0
    .set number, 0
    .rept 2048
    .quad number * 0x200000 + LEAF_ENTRY
    .set number, number + 1
    .endr

# Descriptors (Intel SDM vol. 3A, 3.4.5 and 8.2.3). Each vCPU needs its own task-state segment, because
# `ltr` marks it busy and because it contains the ring 0 stack. None has an I/O bitmap, see
# `port_access`.

    .set SYSTEM, TABLES + 0x6000
    .set KERNEL_CODE, 0x08
    .set KERNEL_DATA, 0x10
    .set USER_CODE, 0x18 + 3
    .set USER_DATA, 0x20 + 3
    .set FIRST_TASK, 0x28
    .set TASK_SIZE, 104

system:
descriptors:
    .quad 0
    .quad 0x00af9b000000ffff        # KERNEL_CODE: 64 bits, execute and read, accessed
    .quad 0x00cf93000000ffff        # KERNEL_DATA: read and write, accessed
    .quad 0x00affb000000ffff        # USER_CODE
    .quad 0x00cff3000000ffff        # USER_DATA
    .set number, 0
    .rept CPUS_MOST
    .set base, SYSTEM + (tasks - system) + number * TASK_SIZE
    .word TASK_SIZE - 1, base & 0xffff
    .byte (base >> 16) & 0xff, 0x89, 0, base >> 24
    .quad 0
    .set number, number + 1
    .endr
descriptors_end:

tasks:
    .set number, 0
    .rept CPUS_MOST
    .long 0
    .quad trap_stacks + (number + 1) * TRAP_STACK   # RSP0
    .fill 90, 1, 0
    .word TASK_SIZE             # I/O map base beyond the limit: no bitmap
    .set number, number + 1
    .endr

    .balign 2
descriptors_pointer:
    .word descriptors_end - descriptors - 1
    .quad descriptors
    .balign 2
gates_pointer:
    .word 32 * 16 - 1
    .quad exception_gates

    .section .boot, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    xorl %eax, %eax
direct_start:
    cmpl $CPUS_MOST, %eax
    jae park
    movl %eax, %edi                 # first argument of guest_main
    movl %ebx, %esi                 # second argument
    lgdt descriptors_pointer
    movl %cr4, %eax
    orl $0x620, %eax                # PAE, OSFXSR, OSXMMEXCPT: ring 3 uses SSE
    movl %eax, %cr4
    movl $level4, %eax
    movl %eax, %cr3
    movl $0xc0000080, %ecx          # IA32_EFER
    rdmsr
    orl $0x100, %eax                # LME
    wrmsr
    movl $0x80000033, %eax          # PG, NE, ET, MP, PE
    movl %eax, %cr0
    ljmp $KERNEL_CODE, $long_mode
park:
    pause
    jmp park

    .code64
long_mode:
    lidt gates_pointer
    movl %edi, %eax
    shll $4, %eax
    addl $FIRST_TASK, %eax
    ltr %ax
    movl $KERNEL_DATA, %eax
    movl %eax, %ss
    movl $USER_DATA, %eax
    movl %eax, %ds
    movl %eax, %es
    leal 1(%rdi), %eax
    shll $STACK_SHIFT, %eax
    addl $stacks, %eax
    movl %eax, %esp                 # the ring 3 stack, also used for iretq
    pushq $USER_DATA
    pushq %rax
    pushq $2                        # RFLAGS: interrupts off
    pushq $USER_CODE
    pushq $user_mode
    iretq
user_mode:
    call guest_main
    ud2

# Port access for ring 3: `int3` with the port in DX, the byte in AL, and CL = 0 to read or 1 to
# write; see cpu.rs. The alternatives do not work on every host:
# - IOPL: an emulated `iretq` drops it.
# - I/O bitmap: QEMU's emulation refuses the bitmap of a task-state segment that is marked busy. KVM
#   restores it in that state, so that under KVM inside QEMU a migration revokes the access.
# - `int n`: a host that emulates ring 0 may raise an undefined-instruction exception.

    .globl port_access
port_access:
    testb %cl, %cl
    jnz 1f
    inb %dx, %al
    iretq
1:  outb %al, %dx
    iretq

# An exception continues in ring 3 as a call of
# report_exception(vector, error code, instruction, address); see trap.rs.

    .globl exception_stubs
    .balign 16
exception_stubs:
    .set vector, 0
    .rept 32
    .balign 16
    # For these vectors the processor pushes an error code (Intel SDM vol. 3A, table 6-1; AMD APM vol. 2, table 8-1).
    .if !(vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21 || vector == 29 || vector == 30)
    pushq $0
    .endif
    pushq $vector
    jmp exception
    .set vector, vector + 1
    .endr

exception:
    popq %rdi
    popq %rsi
    movq (%rsp), %rdx
    movq %cr2, %rcx
    movq $report_exception, (%rsp)
    movq $USER_CODE, 8(%rsp)
    movq 24(%rsp), %rax
    andq $-16, %rax
    subq $264, %rax                 # below the red zone, aligned as after a call
    movq %rax, 24(%rsp)
    movq $USER_DATA, 32(%rsp)
    iretq

    .section .bss, "aw", @nobits
    .globl exception_gates
    .balign 4096
exception_gates:
    .skip 32 * 16
    .balign 16
trap_stacks:
    .skip CPUS_MOST * TRAP_STACK
    .balign 4096
stacks:
    .skip CPUS_MOST << STACK_SHIFT
