# The host and the guest of the nested-paging oracle; npt.rs says what they are for and where things are.
#
# The assembler is given, as symbols: HEADER, PROBES, RESULTS, FRAMES, FRAMES_END (host-physical addresses),
# GUEST (the guest-physical address of section .guest) and DONE (what to leave in the header at the end).
# "APM" is the AMD64 Architecture Programmer's Manual, volume 2.

    .intel_syntax noprefix

    # The header: control words, number of probes, end mark.
    .set HEADER_N_CR3,  HEADER + 0
    .set HEADER_CR4,    HEADER + 8
    .set HEADER_NXE,    HEADER + 16
    .set HEADER_PROBES, HEADER + 32
    .set HEADER_DONE,   HEADER + 40

    .set CR0_PE,     1 << 0             # APM 3.1.1
    .set CR0_ET,     1 << 4
    .set CR0_PG,     1 << 31
    .set CR4_PAE,    1 << 5             # APM 3.1.3
    .set CR4_LA57,   1 << 12
    .set MSR_EFER,   0xC0000080         # APM 3.1.7
    .set EFER_LME,   1 << 8
    .set EFER_LMA,   1 << 10
    .set EFER_NXE,   1 << 11
    .set EFER_SVME,  1 << 12
    .set MSR_VM_HSAVE_PA, 0xC0010117    # APM 15.30.4

    .set PTE_TABLE,  0x003              # present, writable (APM 5.4.1)
    .set PTE_GIB,    0x0E3              # present, writable, accessed, dirty, large

    .set WINDOW,     1 << 30            # the guest's linear window on the GiB under test
    .set DEBUG_EXIT, 0xF4               # QEMU's isa-debug-exit

    # APM appendix B, "VMCB Layout".
    .set VMCB_EXITCODE,  0x070
    .set VMCB_EXITINFO1, 0x078
    .set VMCB_EXITINFO2, 0x080
    .set VMCB_N_CR3,     0x0B0
    .set VMCB_RIP,       0x578
    .set VMCB_RAX,       0x5F8

# The PVH boot protocol: note 18 of "Xen" holds the 32-bit entry point.
    .section .note.pvh, "a", @note
    .long   4, 8, 18
    .asciz  "Xen"
    .quad   start

    .text
    .globl  start
    .code32
# Into long mode, with the paging mode that the scenario wants for its nested tables: nested walks use the
# CR4 and EFER that the host has at VMRUN (APM 15.25.3).
start:
    cli
    cld
    mov     ebx, offset host_pml4
    mov     eax, dword ptr ds:[HEADER_CR4]
    test    eax, CR4_LA57
    jz      1f
    mov     ebx, offset host_pml5
1:  mov     cr3, ebx
    or      eax, CR4_PAE
    mov     cr4, eax
    mov     eax, EFER_SVME | EFER_LME
    cmp     dword ptr [HEADER_NXE], 0
    je      1f
    or      eax, EFER_NXE
1:  mov     ecx, MSR_EFER
    xor     edx, edx
    wrmsr
    mov     eax, CR0_PG | CR0_ET | CR0_PE
    mov     cr0, eax
    lgdt    [gdt_pointer]
    ljmp    8, offset long_mode

    .code64
long_mode:
    mov     ecx, MSR_VM_HSAVE_PA
    mov     eax, offset host_save
    xor     edx, edx
    wrmsr
    mov     rax, [HEADER_N_CR3]
    mov     [vmcb + VMCB_N_CR3], rax

    mov     edi, FRAMES
    mov     rax, [frame_code]
1:  mov     [rdi], rdi
    mov     [rdi + 8], rax
    mov     qword ptr [rdi + 16], 0
    add     rdi, 4096
    cmp     rdi, FRAMES_END
    jb      1b

# Nothing is kept in registers across VMRUN: what a guest does must not disturb the probes after it.
each_probe:
    mov     rcx, [probes_done]
    cmp     rcx, [HEADER_PROBES]
    je      finish
    mov     rsi, rcx
    shl     rsi, 4
    mov     rdi, [PROBES + rsi]         # guest-physical address
    mov     rdx, [PROBES + rsi + 8]     # 0: read, 1: write, 2: execute

    mov     rax, rdi
    and     rax, -(1 << 30)
    or      rax, PTE_GIB
    mov     [guest_pdpt + 8], rax       # turn the window to its GiB
    and     edi, (1 << 30) - 1
    lea     rbx, [rdi + WINDOW]         # guest's rbx: where to try
    inc     rcx                         # guest's rcx: what to write
    mov     rax, [guest_entries + 8 * rdx]
    mov     [vmcb + VMCB_RIP], rax
    mov     rax, [no_address]           # guest's rax: the zeros of a page that is no frame, run as code,
    mov     [vmcb + VMCB_RAX], rax      # are "add [rax], al", and must end at once
    mov     eax, offset vmcb
    vmrun   rax

    mov     rsi, [probes_done]
    inc     qword ptr [probes_done]
    shl     rsi, 5
    mov     rax, [vmcb + VMCB_EXITCODE]
    mov     [RESULTS + rsi], rax
    mov     rax, [vmcb + VMCB_EXITINFO1]
    mov     [RESULTS + rsi + 8], rax
    mov     rax, [vmcb + VMCB_EXITINFO2]
    mov     [RESULTS + rsi + 16], rax
    mov     rax, [vmcb + VMCB_RAX]
    mov     [RESULTS + rsi + 24], rax
    jmp     each_probe

finish:
    mov     rax, [done_mark]
    mov     [HEADER_DONE], rax
    mov     al, 0
    out     DEBUG_EXIT, al              # QEMU ends with status 1
1:  hlt
    jmp     1b

    .balign 8
done_mark:      .quad DONE
no_address:     .quad 1 << 63           # not canonical: #GP, which is intercepted
probes_done:    .quad 0
guest_entries:                          # linear addresses: GUEST within its GiB
    .quad   (GUEST & ((1 << 30) - 1)) + (guest_read - guest)
    .quad   (GUEST & ((1 << 30) - 1)) + (guest_write - guest)
    .quad   (GUEST & ((1 << 30) - 1)) + (guest_execute - guest)

# What stands at byte 8 of each frame. UD2 ends the block that QEMU translates.
frame_code:
    vmmcall
    ud2
    .balign 8, 0xCC

    .balign 8
gdt:
    .quad   0
    .quad   0x00209B0000000000          # 64-bit code
gdt_pointer:
    .word   . - gdt - 1
    .long   gdt

# The host sees the first 4 GiB where they are.
    .balign 4096
host_pml5:
    .quad   host_pml4 + PTE_TABLE
    .balign 4096
host_pml4:
    .quad   host_pdpt + PTE_TABLE
    .balign 4096
host_pdpt:
    .quad   (0 << 30) + PTE_GIB, (1 << 30) + PTE_GIB, (2 << 30) + PTE_GIB, (3 << 30) + PTE_GIB
    .balign 4096
host_save:
    .skip   4096

    .macro  segment attributes
    .word   0, \attributes              # selector, attributes (APM 15.5.1)
    .long   0xFFFFFFFF                  # limit
    .quad   0                           # base
    .endm

vmcb:
    .org    vmcb + 0x008; .long 0xFFFFFFFF              # intercept all exceptions,
    .org    vmcb + 0x00C; .long 1 << 31 | 1 << 24       # shutdown, HLT,
    .org    vmcb + 0x010; .long 1 << 1 | 1 << 0         # VMMCALL, VMRUN
    .org    vmcb + 0x058; .long 1                       # guest ASID
    .org    vmcb + 0x05C; .long 1                       # TLB_CONTROL: flush everything on VMRUN (APM 15.16.1)
    .org    vmcb + 0x090; .quad 1                       # NP_ENABLE
    .org    vmcb + 0x400; segment 0xC93                 # ES
    .org    vmcb + 0x410; segment 0xA9B                 # CS: 64-bit
    .org    vmcb + 0x420; segment 0xC93                 # SS
    .org    vmcb + 0x430; segment 0xC93                 # DS
    .org    vmcb + 0x4D0; .quad EFER_SVME | EFER_LMA | EFER_LME
    .org    vmcb + 0x548; .quad CR4_PAE
    .org    vmcb + 0x550; .quad GUEST + (guest_pml4 - guest)
    .org    vmcb + 0x558; .quad CR0_PG | CR0_ET | CR0_PE
    .org    vmcb + 0x560; .quad 0x400                   # DR7, DR6, RFLAGS as after reset
    .org    vmcb + 0x568; .quad 0xFFFF0FF0
    .org    vmcb + 0x570; .quad 2
    .org    vmcb + 0x668; .quad 0x0007040600070406      # G_PAT as after reset
    .org    vmcb + 4096

# The guest's own pages. Its page tables allow everything, and their accessed and dirty bits are set from the
# start: whatever is refused or marked, the nested tables refused or were marked.
    .section .guest, "aw"
guest:
guest_pml4:
    .quad   GUEST + (guest_pdpt - guest) + PTE_TABLE + 0x20
    .balign 4096
guest_pdpt:
    .quad   (GUEST & -(1 << 30)) + PTE_GIB              # linear 0: the GiB of these pages
    .quad   0                                           # linear 1 GiB: the window
    .balign 4096
guest_code:
guest_read:
    mov     rax, [rbx]
    vmmcall
guest_write:
    mov     [rbx + 16], rcx
    vmmcall
guest_execute:
    add     rbx, 8
    jmp     rbx
    .balign 4096
