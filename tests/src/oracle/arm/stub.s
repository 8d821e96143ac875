// SPDX-License-Identifier: Apache-2.0 OR MIT
//
// The program inside the Arm machine; arm.rs says what for, draws the memory map, and gives the addresses
// to the assembler (--defsym). It runs at EL2 with its MMU off. x0 to x5 pass between it and the guest. All
// that must outlive a probe is in TPIDR_EL2, memory and constants, so that no guest can lose it.

        .arch   armv8.4-a

        .equ    HCR_VM, 1 << 0                  // stage 2 on
        .equ    HCR_DC, 1 << 12                 // stage 1 off, its memory Normal: stage 2 alone decides
        .equ    HCR_RW, 1 << 31                 // EL1 is AArch64
        .equ    SCTLR_EL1_OFF, 0x30d00800       // RES1 bits; no MMU, no alignment checks, no caches
        .equ    SPSR_EL1H, 0x3c5                // EL1 with its own stack pointer, interrupts masked

        .equ    SYS_OPEN, 0x01                  // Semihosting for AArch32 and AArch64, operation numbers
        .equ    SYS_CLOSE, 0x02
        .equ    SYS_WRITE, 0x05
        .equ    SYS_EXIT, 0x18
        .equ    OPEN_WB, 5                      // fopen's "wb"
        .equ    APPLICATION_EXIT, 0x20026

        // The blob's header.
        .equ    H_VTTBR, 0
        .equ    H_VTCR, 8
        .equ    H_PROBES, 16                    // how many
        .equ    H_TABLES, 24                    // how many bytes

        .macro  semihost operation
        mov     w0, #\operation
        hlt     #0xf000
        .endm

        .text
        .global start
start:
        adr     x0, vectors
        msr     vbar_el2, x0

        // Each frame says where it is, and holds the code that leaves the guest.
        ldr     x0, =FRAMES
        ldr     x1, =FRAMES_END
        ldr     w2, leave
1:      str     x0, [x0]
        str     w2, [x0, #8]
        str     xzr, [x0, #16]
        add     x0, x0, #4096
        cmp     x0, x1
        b.lo    1b

        ldr     x9, =HEADER
        ldr     x0, [x9, #H_VTTBR]
        msr     vttbr_el2, x0
        ldr     x0, [x9, #H_VTCR]
        msr     vtcr_el2, x0
        ldr     x0, =(HCR_VM | HCR_DC | HCR_RW)
        msr     hcr_el2, x0
        ldr     x0, =SCTLR_EL1_OFF
        msr     sctlr_el1, x0
        ldr     x0, =(GUEST_GPA + GUEST_VECTORS)
        msr     vbar_el1, x0
        dsb     sy
        ic      iallu
        dsb     sy
        isb
        msr     tpidr_el2, xzr                  // probes done

next:
        mrs     x6, tpidr_el2
        ldr     x9, =HEADER
        ldr     x7, [x9, #H_PROBES]
        cmp     x6, x7
        b.eq    finish
        ldr     x9, =PROBES
        add     x9, x9, x6, lsl #4
        ldp     x0, x3, [x9]                    // the address; the access
        add     x1, x6, #1                      // the number to write
        mov     x2, #0                          // the value read
        ldr     x4, =GUEST_GPA
        add     x4, x4, x3, lsl #4              // each access has 16 bytes of code
        msr     elr_el2, x4
        mov     x4, #SPSR_EL1H
        msr     spsr_el2, x4
        tlbi    vmalls12e1                      // every probe walks anew
        dsb     sy
        isb
        eret

        // The guest left: what of this means something is for arm.rs to tell.
left:
        mrs     x6, tpidr_el2
        ldr     x9, =RECORDS
        add     x9, x9, x6, lsl #5
        mrs     x3, esr_el2
        mrs     x4, hpfar_el2
        mrs     x5, esr_el1
        stp     x3, x4, [x9]
        stp     x2, x5, [x9, #16]
        add     x6, x6, #1
        msr     tpidr_el2, x6
        b       next

finish:
        // Gather the frames' writers.
        ldr     x0, =FRAMES
        ldr     x1, =FRAMES_END
        ldr     x2, =WRITERS
1:      ldr     x3, [x0, #16]
        str     x3, [x2], #8
        add     x0, x0, #4096
        cmp     x0, x1
        b.lo    1b
        ldr     x23, =WRITERS
        sub     x22, x2, x23                    // their bytes

        adr     x1, open_block
        semihost SYS_OPEN
        cmn     x0, #1
        b.eq    broken
        mov     x19, x0                         // the file

        ldr     x9, =HEADER
        ldr     x20, =RECORDS
        ldr     x21, [x9, #H_PROBES]
        lsl     x21, x21, #5
        bl      put
        ldr     x20, =TABLES
        ldr     x21, [x9, #H_TABLES]
        bl      put
        mov     x20, x23
        mov     x21, x22
        bl      put

        adr     x1, block
        str     x19, [x1]
        semihost SYS_CLOSE
        mov     x2, #0
        b       exit

        // Writes x21 bytes from x20 on to the file x19.
put:
        adr     x1, block
        stp     x19, x20, [x1]
        str     x21, [x1, #16]
        semihost SYS_WRITE
        cbnz    x0, broken                      // so many bytes were not written
        ret

        // The stub itself trapped, or the file failed: end with status 1.
broken:
        mov     x2, #1
exit:
        adr     x1, block
        ldr     x0, =APPLICATION_EXIT
        stp     x0, x2, [x1]
        semihost SYS_EXIT
        b       .

leave:  hvc     #0
        .ltorg

        // "Exception vectors" (chapter D1): sixteen of 128 bytes; the ninth is synchronous, from AArch64 below.
        .balign 2048
vectors:
        .rept   8
        b       broken
        .balign 128
        .endr
        b       left
        .balign 128
        .rept   7
        b       broken
        .balign 128
        .endr

        // For semihosting: file name, mode, length of the name; and room for other arguments.
        .balign 8
open_block:
        .quad   answer, OPEN_WB, 6
block:  .quad   0, 0, 0
answer: .asciz  "answer"

        // The guest's page. x0: address, x1: number, x2: value read.
        .section .guest, "ax"
        .balign 4096
guest:
        ldr     x2, [x0]                        // Read
        hvc     #0
        .balign 16
        str     x1, [x0, #16]                   // Write
        hvc     #0
        .balign 16
        add     x3, x0, #8                      // Execute; the hvc is at the page
        br      x3

        // What the guest itself would have to handle is said with another number.
        .equ    GUEST_VECTORS, 2048
        .org    guest + GUEST_VECTORS
        .rept   16
        hvc     #1
        .balign 128
        .endr
