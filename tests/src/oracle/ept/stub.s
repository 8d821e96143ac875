# The host of the EPT machine: it takes the place of the BIOS in the last 64 KiB below 4 GiB, goes straight to
# long mode, reads the scenario from the first disk, runs a guest under the scenario's EPT once for each probe,
# and writes what came of it to that disk.
#
# The module that assembles this file defines the addresses in capitals (`as --defsym`) and describes the memory
# map. Sections are those of the Intel SDM, volume 3, in the editions whose chapter 23 introduces VMX.

# Model-specific registers (SDM volume 4).
.equ IA32_FEATURE_CONTROL,      0x03a
.equ IA32_VMX_BASIC,            0x480
.equ IA32_VMX_PINBASED_CTLS,    0x481
.equ IA32_VMX_PROCBASED_CTLS,   0x482
.equ IA32_VMX_EXIT_CTLS,        0x483
.equ IA32_VMX_ENTRY_CTLS,       0x484
.equ IA32_VMX_PROCBASED_CTLS2,  0x48b
.equ IA32_EFER,                 0xc0000080

# VMCS fields (appendix B).
.equ GUEST_CS_SEL,      0x0802
.equ GUEST_TR_SEL,      0x080e
.equ GUEST_PML_INDEX,   0x0812
.equ HOST_CS_SEL,       0x0c02
.equ HOST_TR_SEL,       0x0c0c
.equ PML_ADDRESS,       0x200e
.equ EPT_POINTER,       0x201a
.equ GUEST_PHYSICAL,    0x2400
.equ VMCS_LINK,         0x2800
.equ PIN_CONTROLS,      0x4000
.equ PROC_CONTROLS,     0x4002
.equ EXCEPTION_BITMAP,  0x4004
.equ EXIT_CONTROLS,     0x400c
.equ ENTRY_CONTROLS,    0x4012
.equ PROC2_CONTROLS,    0x401e
.equ INSTRUCTION_ERROR, 0x4400
.equ EXIT_REASON,       0x4402
.equ GUEST_CS_LIMIT,    0x4802
.equ GUEST_TR_LIMIT,    0x480e
.equ GUEST_ES_RIGHTS,   0x4814
.equ GUEST_CS_RIGHTS,   0x4816
.equ GUEST_SS_RIGHTS,   0x4818
.equ GUEST_DS_RIGHTS,   0x481a
.equ GUEST_FS_RIGHTS,   0x481c
.equ GUEST_GS_RIGHTS,   0x481e
.equ GUEST_LDTR_RIGHTS, 0x4820
.equ GUEST_TR_RIGHTS,   0x4822
.equ EXIT_QUALIFICATION, 0x6400
.equ GUEST_CR0,         0x6800
.equ GUEST_CR3,         0x6802
.equ GUEST_CR4,         0x6804
.equ GUEST_DR7,         0x681a
.equ GUEST_RIP,         0x681e
.equ GUEST_RFLAGS,      0x6820
.equ HOST_CR0,          0x6c00
.equ HOST_CR3,          0x6c02
.equ HOST_CR4,          0x6c04
.equ HOST_GDTR_BASE,    0x6c0c
.equ HOST_RSP,          0x6c14
.equ HOST_RIP,          0x6c16

# Execution, exit and entry controls (24.6 to 24.8).
.equ PROC_HLT_EXITING,  1 << 7
.equ PROC_SECONDARY,    1 << 31
.equ PROC2_EPT,         1 << 1
.equ PROC2_PML_SHIFT,   17
.equ EXIT_HOST_64BIT,   1 << 9
.equ ENTRY_GUEST_64BIT, 1 << 9

# Basic exit reasons (appendix C).
.equ EXIT_VMCALL,       18
.equ EXIT_EPT_VIOLATION, 48
.equ EXIT_EPT_MISCONFIG, 49
.equ EXIT_PML_FULL,     62

.equ INVEPT_ALL,        2               # 30.3, INVEPT: type 2 is global
.equ PML_LAST,          511             # 28.3.6: the log fills from its last entry down

.equ CR0_64BIT,         0x80000021      # PG, NE (VMX wants it: appendix A.7), PE
.equ CR4_64BIT,         0x2020          # VMXE, PAE
.equ CODE64,            0x08            # selectors in `gdt`
.equ TASK,              0x10

# Guest page-table entries, accessed and dirty from the start: no walk ever has to set the bits (4.8).
.equ PAGE_TABLE,        0x23            # A, RW, P
.equ PAGE_1G,           0xe3            # PS, D, A, RW, P
.equ GIB,               0x40000000

# The guest's linear addresses: the GiB that holds the probed page, and the GiB that holds the guest's code.
.equ WINDOW,            0
.equ CODE_WINDOW,       GIB

# Access codes and record kinds, as the module has them.
.equ EXECUTE,           2
.equ KIND_DONE,         0
.equ KIND_VIOLATION,    1
.equ KIND_MISCONFIGURATION, 2
.equ KIND_OTHER,        3
.equ RECORD_BYTES,      24

.equ HEADER_EPTP,       HEADER
.equ HEADER_PML,        HEADER + 8
.equ HEADER_PROBES,     HEADER + 32
.equ HEADER_TABLES,     HEADER + 40
.equ HEADER_LOG,        HEADER + 48
.equ HEADER_END_MARK,   HEADER + 56

.macro vmset field, value               # VMCS field := register
        mov     $\field, %edx
        vmwrite \value, %rdx
.endm

.macro vmget field, into                # register := VMCS field
        mov     $\field, %edx
        vmread  %rdx, \into
.endm

.text
rom:

# --- From reset to long mode -----------------------------------------------------------------------------------
.code16
real_mode:
        cli
        lgdtl   %cs:(gdt_pointer - rom)
        mov     $CR4_64BIT, %eax
        mov     %eax, %cr4
        mov     $host_pml4, %eax
        mov     %eax, %cr3
        mov     $IA32_EFER, %ecx
        rdmsr
        or      $0x100, %eax            # LME
        wrmsr
        mov     $CR0_64BIT, %eax
        mov     %eax, %cr0
        ljmpl   $CODE64, $long_mode

.code64
long_mode:
        mov     $STACK_TOP, %esp
        call    read_scenario
        call    fill_frames
        call    fill_guest_pages
        call    vmx_on
        call    vmcs_fill
        call    run_probes
        call    write_answer
shut_down:                              # Bochs ends on this word at this port
        lea     shutdown_word(%rip), %rsi
        mov     $0x8900, %edx
        mov     $8, %ecx
        rep outsb
1:      hlt
        jmp     1b

# Prints the text at RSI, which ends with 0, on the emulator's console, and ends.
fail:
        lodsb
        test    %al, %al
        jz      shut_down
        out     %al, $0xe9
        jmp     fail

# --- Disk ------------------------------------------------------------------------------------------------------
# It begins with the header, the probes and the tables. Behind them comes the answer: the records, the tables, the
# frames' writers, the log. All of these begin with a new sector. R8 is the next sector throughout.
.equ SECTOR_SHIFT,      9
.equ ATA_DATA,          0x1f0           # the first channel's ports, and ATA's PIO commands
.equ ATA_COUNT,         0x1f2
.equ ATA_LBA_LOW,       0x1f3
.equ ATA_LBA_MIDDLE,    0x1f4
.equ ATA_LBA_HIGH,      0x1f5
.equ ATA_DEVICE,        0x1f6
.equ ATA_COMMAND,       0x1f7           # written; read, it is the status
.equ READ_SECTORS,      0x20
.equ WRITE_SECTORS,     0x30
.equ STATUS_BUSY,       0x80
.equ STATUS_DRQ,        0x08
.equ STATUS_ERROR,      0x01

read_scenario:
        xor     %r8d, %r8d
        mov     $HEADER, %edi
        mov     $1 << SECTOR_SHIFT, %ebx
        call    read_disk
        mov     $PROBES, %edi
        mov     HEADER_PROBES, %rbx
        shl     $4, %rbx                # 16 bytes each
        call    read_disk
        mov     $TABLES, %edi
        mov     HEADER_TABLES, %rbx

# Reads so many bytes (RBX), rounded up to sectors, to memory (RDI).
read_disk:
        add     $(1 << SECTOR_SHIFT) - 1, %rbx
        shr     $SECTOR_SHIFT, %rbx
1:      jz      2f
        mov     $READ_SECTORS, %ebp
        call    disk_command
        rep insw
        dec     %rbx
        jmp     1b
2:      ret

write_answer:
        mov     $RECORDS, %esi
        mov     %r13, %rbx
        sub     %rsi, %rbx
        call    write_disk
        mov     $TABLES, %esi
        mov     HEADER_TABLES, %rbx
        call    write_disk
        call    collect_writers
        mov     $WRITERS, %esi
        mov     $FRAMES_BYTES / 4096 * 8, %ebx
        call    write_disk
        mov     $LOG, %esi
        mov     %r14, %rbx
        sub     %rsi, %rbx
        mov     %rbx, HEADER_LOG
        call    write_disk
        mov     end_mark(%rip), %rax    # the header goes last: where its mark is, all is
        mov     %rax, HEADER_END_MARK
        xor     %r8d, %r8d
        mov     $HEADER, %esi
        mov     $1 << SECTOR_SHIFT, %ebx
        call    write_disk
        jmp     disk_ready

collect_writers:
        mov     $FRAMES + 16, %esi
        mov     $WRITERS, %edi
1:      mov     (%rsi), %rax
        stosq
        add     $4096, %rsi
        cmp     $FRAMES + FRAMES_BYTES, %rsi
        jb      1b
        ret

# Writes so many bytes (RBX), rounded up to sectors, from memory (RSI).
write_disk:
        add     $(1 << SECTOR_SHIFT) - 1, %rbx
        shr     $SECTOR_SHIFT, %rbx
1:      jz      2f
        mov     $WRITE_SECTORS, %ebp
        call    disk_command
        rep outsw
        dec     %rbx
        jmp     1b
2:      ret

# Starts a command (EBP) on one sector, and gives INS or OUTS their registers when its data may come.
disk_command:
        call    disk_ready
        mov     $ATA_COUNT, %edx
        mov     $1, %eax
        out     %al, %dx
        mov     $ATA_LBA_LOW, %edx
        mov     %r8d, %eax
        out     %al, %dx
        mov     $ATA_LBA_MIDDLE, %edx
        shr     $8, %eax
        out     %al, %dx
        mov     $ATA_LBA_HIGH, %edx
        shr     $8, %eax
        out     %al, %dx
        mov     $ATA_DEVICE, %edx
        mov     $0xe0, %eax             # LBA; the disk ends long before sector 1 << 24
        out     %al, %dx
        mov     $ATA_COMMAND, %edx
        mov     %ebp, %eax
        out     %al, %dx
        inc     %r8
1:      call    disk_ready
        test    $STATUS_DRQ, %al
        jz      1b
        mov     $ATA_DATA, %edx
        mov     $(1 << SECTOR_SHIFT) / 2, %ecx
        ret

# Waits until the disk is not busy. AL: its status.
disk_ready:
        mov     $ATA_COMMAND, %edx
1:      in      %dx, %al
        test    $STATUS_BUSY, %al
        jnz     1b
        test    $STATUS_ERROR, %al
        jnz     2f
        ret
2:      lea     disk_failed(%rip), %rsi
        jmp     fail

# --- Memory ----------------------------------------------------------------------------------------------------
fill_frames:
        mov     $FRAMES, %edi
1:      mov     %rdi, (%rdi)
        mov     frame_code(%rip), %rax
        mov     %rax, 8(%rdi)
        movq    $0, 16(%rdi)
        add     $4096, %rdi
        cmp     $FRAMES + FRAMES_BYTES, %rdi
        jb      1b
        ret

fill_guest_pages:
        mov     $GUEST_PDPT_GPA + PAGE_TABLE, %rax
        mov     %rax, GUEST_PML4
        mov     $GUEST_CODE_GPA, %rax
        and     $-GIB, %rax
        or      $PAGE_1G, %rax
        mov     %rax, GUEST_PDPT + 8 * (CODE_WINDOW / GIB)
        lea     guest_code(%rip), %rsi
        mov     $GUEST_CODE, %edi
        mov     $guest_code_end - guest_code, %ecx
        rep movsb
        ret

# --- VMX -------------------------------------------------------------------------------------------------------
vmx_on:
        mov     $IA32_FEATURE_CONTROL, %ecx
        rdmsr
        or      $5, %eax                # VMXON outside SMX, and the lock that makes it hold (23.7)
        wrmsr
        mov     $IA32_VMX_BASIC, %ecx
        rdmsr                           # EAX: the revision that both regions begin with (24.2)
        mov     %eax, VMXON_REGION
        mov     %eax, VMCS_REGION
        vmxon   vmxon_pointer(%rip)
        jbe     1f                      # CF or ZF: VMfail (30.2)
        vmclear vmcs_pointer(%rip)
        jbe     1f
        vmptrld vmcs_pointer(%rip)
        jbe     1f
        ret
1:      lea     vmxon_failed(%rip), %rsi
        jmp     fail

vmcs_fill:
        lea     vmcs_controls(%rip), %rsi
1:      lodsq                           # field, the MSR with its default, the bits wanted beyond that
        mov     %rax, %rbx
        lodsq
        mov     %eax, %ecx
        rdmsr                           # EAX: the bits that must be 1 (appendix A.2)
        or      (%rsi), %eax
        add     $8, %rsi
        vmwrite %rax, %rbx
        lea     vmcs_controls_end(%rip), %rax
        cmp     %rax, %rsi
        jb      1b

        mov     HEADER_PML, %rax        # the one control that the scenario chooses
        shl     $PROC2_PML_SHIFT, %rax
        vmget   PROC2_CONTROLS, %rcx
        or      %rcx, %rax
        vmset   PROC2_CONTROLS, %rax
        mov     HEADER_EPTP, %rax
        vmset   EPT_POINTER, %rax

        lea     vmcs_fields(%rip), %rsi
2:      lodsq                           # field, value
        vmwrite (%rsi), %rax
        jbe     3f
        add     $8, %rsi
        lea     vmcs_fields_end(%rip), %rax
        cmp     %rax, %rsi
        jb      2b
        ret
3:      lea     vmwrite_failed(%rip), %rsi
        jmp     fail

# --- Probes ----------------------------------------------------------------------------------------------------
# R12: the probe; R13: its record; R14: end of the log so far; R15: the probe's number.
run_probes:
        mov     $PROBES, %r12d
        mov     $RECORDS, %r13d
        mov     $LOG, %r14d
        mov     $1, %r15d
1:      cmp     HEADER_PROBES, %r15
        ja      drain_pml
        call    probe
        add     $16, %r12
        add     $RECORD_BYTES, %r13
        inc     %r15
        jmp     1b

probe:
        mov     (%r12), %rax            # the window shows the GiB of the probed page ...
        and     $-GIB, %rax
        or      $PAGE_1G, %rax
        mov     %rax, GUEST_PDPT + 8 * (WINDOW / GIB)
        mov     (%r12), %rbx
        and     $GIB - 1, %ebx          # ... and RBX is the page in it
        mov     8(%r12), %rax
        lea     8(%rbx), %rcx           # execute: start in the page itself
        cmp     $EXECUTE, %rax
        je      1f
        shl     $GUEST_CODE_SHIFT, %rax # read, write: start at the instruction
        lea     GUEST_CODE_LINEAR(%rax), %rcx
1:      vmset   GUEST_RIP, %rcx

        # VM entries and exits drop linear and combined mappings, for there is no VPID; what may be kept of
        # guest-physical ones goes by INVEPT (28.4.3).
        mov     $INVEPT_ALL, %eax
        invept  zeros(%rip), %rax
        xor     %eax, %eax
        mov     %r15, %rcx

# RAX, RBX and RCX are for the guest; what the host still needs is saved from whatever the guest runs.
.equ SAVED_BYTES,       5 * 8
enter_guest:
        push    %r8
        push    %r12
        push    %r13
        push    %r14
        push    %r15
        vmresume                        # comes back only if the VMCS was not launched yet,
        vmlaunch                        # or else if the entry's controls are refused
        add     $SAVED_BYTES, %rsp
        vmget   INSTRUCTION_ERROR, %rsi
        bts     $32, %rsi
        jmp     other

guest_exit:                             # HOST_RIP; HOST_RSP is as it was after the pushes
        pop     %r15
        pop     %r14
        pop     %r13
        pop     %r12
        pop     %r8
        vmget   EXIT_REASON, %rsi
        cmp     $EXIT_PML_FULL, %esi
        je      pml_full
        cmp     $EXIT_VMCALL, %esi
        je      done
        cmp     $EXIT_EPT_VIOLATION, %esi
        je      violation
        cmp     $EXIT_EPT_MISCONFIG, %esi
        je      misconfiguration
other:
        mov     $KIND_OTHER, %eax
        xor     %edi, %edi
        jmp     record
done:
        mov     %rax, %rdi              # 0, unless the guest read
        xor     %esi, %esi
        mov     $KIND_DONE, %eax
        jmp     record
violation:
        mov     $KIND_VIOLATION, %eax
        vmget   GUEST_PHYSICAL, %rdi
        vmget   EXIT_QUALIFICATION, %rsi
        jmp     record
misconfiguration:
        mov     $KIND_MISCONFIGURATION, %eax
        vmget   GUEST_PHYSICAL, %rdi
        xor     %esi, %esi
record:
        mov     %rax, (%r13)
        mov     %rdi, 8(%r13)
        mov     %rsi, 16(%r13)
        ret

# The access was not done yet (28.3.6): make room, and let the guest try it again with its registers as they are.
pml_full:
        push    %rax
        push    %rbx
        push    %rcx
        call    drain_pml
        pop     %rcx
        pop     %rbx
        pop     %rax
        jmp     enter_guest

# Moves the entries from the last one down to the index, which names the next free one, to the log.
drain_pml:
        vmget   GUEST_PML_INDEX, %rax
        movswl  %ax, %eax               # a full log has gone from 0 to 0xffff
        mov     $PML_LAST, %ecx
1:      cmp     %eax, %ecx
        jle     2f
        mov     PML_PAGE(,%rcx,8), %rbx
        mov     %rbx, (%r14)
        add     $8, %r14
        dec     %ecx
        jmp     1b
2:      mov     $PML_LAST, %eax
        vmset   GUEST_PML_INDEX, %rax
        ret

# --- The guest -------------------------------------------------------------------------------------------------
# RBX: the page, as the window shows it; RCX: the probe's number. One slot of 1 << GUEST_CODE_SHIFT bytes for each
# access but execute.
.equ GUEST_CODE_SHIFT,  4
.equ GUEST_CODE_LINEAR, CODE_WINDOW + (GUEST_CODE_GPA & (GIB - 1))
.balign 16
guest_code:
        mov     (%rbx), %rax
        vmcall
.balign 1 << GUEST_CODE_SHIFT
        mov     %rcx, 16(%rbx)
        vmcall
guest_code_end:

# --- Constants -------------------------------------------------------------------------------------------------
.balign 16
frame_code:
        vmcall
.balign 8
zeros:  .quad   0, 0                    # INVEPT descriptor
vmxon_pointer: .quad VMXON_REGION
vmcs_pointer: .quad VMCS_REGION
end_mark: .ascii "EPT done"
shutdown_word: .ascii "Shutdown"
disk_failed: .asciz "EPT machine: the disk failed\n"
vmxon_failed: .asciz "EPT machine: VMXON, VMCLEAR or VMPTRLD failed\n"
vmwrite_failed: .asciz "EPT machine: VMWRITE failed\n"

.balign 8
gdt:    .quad   0
        .quad   0x00209b0000000000      # CODE64: 64-bit code, accessed
        .quad   0                       # TASK: only its selector is used, which must not be null (26.2.3)
gdt_pointer:
        .word   . - gdt - 1
        .long   gdt

.balign 8
vmcs_controls:
        .quad   PIN_CONTROLS,   IA32_VMX_PINBASED_CTLS,   0
        .quad   PROC_CONTROLS,  IA32_VMX_PROCBASED_CTLS,  PROC_HLT_EXITING | PROC_SECONDARY
        .quad   PROC2_CONTROLS, IA32_VMX_PROCBASED_CTLS2, PROC2_EPT
        .quad   EXIT_CONTROLS,  IA32_VMX_EXIT_CTLS,       EXIT_HOST_64BIT
        .quad   ENTRY_CONTROLS, IA32_VMX_ENTRY_CTLS,      ENTRY_GUEST_64BIT
vmcs_controls_end:

# Every field that is not here is 0, as is the region before VMCLEAR.
.equ UNUSABLE, 0x10000
vmcs_fields:
        .quad   EXCEPTION_BITMAP, 0xffffffff
        .quad   PML_ADDRESS, PML_PAGE
        .quad   GUEST_PML_INDEX, PML_LAST
        .quad   VMCS_LINK, -1
        .quad   HOST_CR0, CR0_64BIT
        .quad   HOST_CR3, host_pml4
        .quad   HOST_CR4, CR4_64BIT
        .quad   HOST_CS_SEL, CODE64
        .quad   HOST_TR_SEL, TASK
        .quad   HOST_GDTR_BASE, gdt
        .quad   HOST_RSP, STACK_TOP - 16 - SAVED_BYTES  # two return addresses: see enter_guest
        .quad   HOST_RIP, guest_exit
        .quad   GUEST_CR0, CR0_64BIT
        .quad   GUEST_CR3, GUEST_PML4_GPA
        .quad   GUEST_CR4, CR4_64BIT
        .quad   GUEST_RFLAGS, 2
        .quad   GUEST_DR7, 0x400
        .quad   GUEST_CS_SEL, CODE64
        .quad   GUEST_CS_LIMIT, 0xffffffff
        .quad   GUEST_CS_RIGHTS, 0xa09b         # 64-bit code, accessed
        .quad   GUEST_TR_SEL, TASK
        .quad   GUEST_TR_LIMIT, 0x67
        .quad   GUEST_TR_RIGHTS, 0x8b           # busy 64-bit TSS
        .quad   GUEST_ES_RIGHTS, UNUSABLE
        .quad   GUEST_SS_RIGHTS, UNUSABLE
        .quad   GUEST_DS_RIGHTS, UNUSABLE
        .quad   GUEST_FS_RIGHTS, UNUSABLE
        .quad   GUEST_GS_RIGHTS, UNUSABLE
        .quad   GUEST_LDTR_RIGHTS, UNUSABLE
vmcs_fields_end:

# The host sees the first 4 GiB as they are.
.balign 4096
host_pml4:
        .quad   host_pdpt + PAGE_TABLE
.balign 4096
host_pdpt:
        .quad   PAGE_1G, GIB + PAGE_1G, 2 * GIB + PAGE_1G, 3 * GIB + PAGE_1G
.balign 4096

.org 0xfff0
.code16
reset:  jmp     real_mode
.org 0x10000
