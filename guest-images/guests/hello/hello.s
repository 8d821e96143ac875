# The program `hello`. Entered in the PVH start state: 32-bit protected mode, paging off, flat
# segments, interrupts off, EBX = address of hvm_start_info (Xen, public/arch-x86/hvm/start_info.h).
#
# Register use: EBX = start info, EDX = serial port, ESI/ECX = text to print.

    .set SERIAL, 0x3f8
    .set DEBUG_EXIT, 0xf4
    .set START_INFO_MAGIC, 0x336ec578
    .set CMDLINE_PADDR, 24          # offsets in hvm_start_info
    .set VERSION, 4
    .set MEMMAP_PADDR, 40
    .set MEMMAP_ENTRIES, 48
    .set MEMMAP_MOST, 128           # maximum number of entries that are read
    .set CMDLINE_MOST, 2047         # maximum length that is read
    .set RAM, 1                     # XEN_HVM_MEMMAP_TYPE_RAM
    .set PATIENCE, 256              # units of 2^24 ticks of the time-stamp counter: 1 to 2 s

    .section .note.ferry, "a", @note
    .balign 4
    .long 4, 8, 18                  # XEN_ELFNOTE_PHYS32_ENTRY (Xen, public/elfnote.h)
    .asciz "Xen"
    .quad pvh_entry
    .long 6, 4, 1                   # direct start, see the crate's documentation
    .asciz "Ferry"
    .balign 4
    .long direct_start

    .section .boot, "ax"
    .code32
    .globl pvh_entry
pvh_entry:
    movl $SERIAL, %edx
    movl $greeting, %esi
    movl $greeting_length, %ecx
    cld
    rep outsb
    movl $stack_top, %esp
    cmpl $START_INFO_MAGIC, (%ebx)
    jne no_start_info
    call find_command_line
    call wait_for_cpus
    movl arrived, %eax
    call print_number
    movl $memory, %esi
    movl $memory_length, %ecx
    rep outsb
    call count_memory
    call print_number
    movl $cmdline, %esi
    movl $cmdline_length, %ecx
    rep outsb
    call print_command_line
    movl $end_of_line, %esi
    movl $end_of_line_length, %ecx
    rep outsb
    xorl %eax, %eax
debug_exit:
    outb %al, $DEBUG_EXIT
park:
    pause
    jmp park

no_start_info:
    movl $complaint, %esi
    movl $complaint_length, %ecx
    rep outsb
    movb $2, %al
    jmp debug_exit

# Entry of the other vCPUs, which only increment the counter.
direct_start:
    lock incl arrived
    jmp park

# Returns EDI = address of the command line, EBP = its length; the length is 0 if there is none below
# 4 GiB.
find_command_line:
    xorl %ebp, %ebp
    movl CMDLINE_PADDR(%ebx), %edi
    testl %edi, %edi
    jz 2f
    cmpl $0, CMDLINE_PADDR+4(%ebx)
    jne 2f
1:  cmpb $0, (%edi,%ebp)
    je 2f
    incl %ebp
    cmpl $CMDLINE_MOST, %ebp
    jb 1b
2:  ret

# Waits, with a time limit, until the number of vCPUs that `cpus=` on the command line gives has
# started.
wait_for_cpus:
    xorl %ecx, %ecx
1:  leal 5(%ecx), %eax
    cmpl %ebp, %eax
    jae 4f
    cmpl $0x73757063, (%edi,%ecx)   # "cpus"
    jne 2f
    cmpb $'=', 4(%edi,%ecx)
    je 3f
2:  incl %ecx
    jmp 1b
3:  call read_number
    movl %eax, %ecx
    call read_time
    movl %eax, %esi
5:  cmpl %ecx, arrived
    jae 4f
    pause
    call read_time
    subl %esi, %eax
    cmpl $PATIENCE, %eax
    jb 5b
4:  movl $SERIAL, %edx
    ret

# Returns EAX = time-stamp counter in units of 2^24 ticks.
read_time:
    rdtsc
    shrdl $24, %edx, %eax
    ret

# Returns EAX = number at offset EAX of the command line, at most three digits.
read_number:
    leal (%edi,%eax), %esi
    xorl %eax, %eax
    movl $3, %ecx
1:  movzbl (%esi), %edx
    subl $'0', %edx
    cmpl $9, %edx
    ja 2f
    imull $10, %eax, %eax
    addl %edx, %eax
    incl %esi
    decl %ecx
    jnz 1b
2:  movl $SERIAL, %edx
    ret

# Returns EAX = MiB of RAM in the memory map, or 0 if there is no map (version 0) or it is above 4 GiB.
count_memory:
    xorl %eax, %eax
    cmpl $1, VERSION(%ebx)
    jb 3f
    movl MEMMAP_PADDR(%ebx), %esi
    testl %esi, %esi
    jz 3f
    cmpl $0, MEMMAP_PADDR+4(%ebx)
    jne 3f
    movl MEMMAP_ENTRIES(%ebx), %ecx
    cmpl $MEMMAP_MOST, %ecx
    jbe 1f
    movl $MEMMAP_MOST, %ecx
1:  testl %ecx, %ecx
    jz 3f
    decl %ecx
    cmpl $RAM, 16(%esi)
    jne 2f
    movl 8(%esi), %edx              # size, in pages: (high:low) >> 12
    shrl $12, %edx
    addl %edx, %eax
    movl 12(%esi), %edx
    shll $20, %edx
    addl %edx, %eax
2:  addl $24, %esi
    jmp 1b
3:  shrl $8, %eax
    movl $SERIAL, %edx
    ret

# Prints EAX in decimal.
print_number:
    movl $10, %ecx
    movl $digits_end, %esi
1:  xorl %edx, %edx
    divl %ecx
    addb $'0', %dl
    decl %esi
    movb %dl, (%esi)
    testl %eax, %eax
    jnz 1b
    movl $digits_end, %ecx
    subl %esi, %ecx
    movl $SERIAL, %edx
    rep outsb
    ret

# Prints the command line. Bytes that are not printable ASCII become `?`, so that the output stays one
# line.
print_command_line:
    movl %edi, %esi
1:  testl %ebp, %ebp
    jz 3f
    decl %ebp
    lodsb
    movb %al, %cl
    subb $0x20, %cl
    cmpb $0x5f, %cl
    jb 2f
    movb $'?', %al
2:  outb %al, %dx
    jmp 1b
3:  ret

    .set greeting_length, memory - greeting
    .set memory_length, cmdline - memory
    .set cmdline_length, end_of_line - cmdline
    .set end_of_line_length, complaint - end_of_line
    .set complaint_length, strings_end - complaint
greeting:
    .ascii "hello from ferry guest: cpus="
memory:
    .ascii " memory="
cmdline:
    .ascii " MiB cmdline=\""
end_of_line:
    .ascii "\"\n"
complaint:
    .ascii "? no PVH start info\n"
strings_end:

    .section .data, "aw"
    .balign 4
arrived:
    .long 1
digits:
    .fill 12
digits_end:
    .balign 16
    .fill 64
stack_top:
    .code64
