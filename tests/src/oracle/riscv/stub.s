# The program that asks the machine: it fills the frames, switches the table on, tries each probe, and
# writes what became of them to the file `answer`. It runs in M-mode; riscv.rs has the memory map and says
# why things are done so. The assembler's command line gives HEADER, PROBES, TABLES, WRITERS, FRAMES and
# FRAMES_BYTES.

        # Semihosting calls are known by uncompressed instructions.
        .option norvc

        # Bytes of the header. HGATP and MENVCFG are replaced by what the registers then hold.
        .equ    HGATP, 0
        .equ    MENVCFG, 8
        .equ    PROBE_COUNT, 32
        .equ    TABLES_BYTES, 40
        .equ    FINISHED, 48
        .equ    FINISHED_MARK, 0x7972726566     # "ferry"

        # A probe's record: the page's address, and what to do there. Its outcome takes its place: the
        # trap's cause or DONE, and the reported guest-physical address or the value read.
        .equ    RECORD_SHIFT, 4
        .equ    RECORD, 1 << RECORD_SHIFT
        .equ    READ, 0
        .equ    WRITE, 1                        # and 2 to run
        .equ    DONE, -1

        .equ    PAGE, 4096
        .equ    OWN_ADDRESS, 0                  # bytes of a frame
        .equ    CODE, 8
        .equ    WRITER, 16

        .equ    MENVCFG_ADUE, 1 << 61
        .equ    HSTATUS_SPVP, 1 << 8            # HLV and HSV act as VS-mode, not as VU-mode
        .equ    MSTATUS_MPP, 3 << 11
        .equ    MSTATUS_TO_VS, 1 << 39 | 1 << 11 # MPV and MPP = S: MRET goes to VS-mode
        .equ    PMP_ALL, 0x1f                   # NAPOT, X, W, R
        .equ    ECALL_FROM_VS, 10

        .equ    SYS_OPEN, 0x01
        .equ    SYS_WRITE0, 0x04
        .equ    SYS_WRITE, 0x05
        .equ    SYS_EXIT, 0x18
        .equ    OPEN_WB, 5
        .equ    APPLICATION_EXIT, 0x20026

        .section .text
        .globl  _start
_start: la      t0, trapped_here
        csrw    mtvec, t0

        # Without a PMP entry nothing is allowed to S-mode and below. The table shall be the only guard.
        li      t0, -1
        csrw    pmpaddr0, t0
        li      t0, PMP_ALL
        csrw    pmpcfg0, t0

        li      t0, FRAMES
        li      t1, FRAMES + FRAMES_BYTES
        lwu     t2, guest_code
        li      t3, PAGE
1:      sd      t0, OWN_ADDRESS(t0)
        sd      t2, CODE(t0)
        sd      zero, WRITER(t0)
        add     t0, t0, t3
        bltu    t0, t1, 1b
        fence.i

        li      s0, HEADER
        ld      t0, MENVCFG(s0)
        li      t1, MENVCFG_ADUE
        csrc    menvcfg, t1
        beqz    t0, 1f
        csrs    menvcfg, t1
1:      csrr    t0, menvcfg
        sd      t0, MENVCFG(s0)
        ld      t0, HGATP(s0)
        csrw    hgatp, t0
        csrr    t0, hgatp
        sd      t0, HGATP(s0)
        csrw    vsatp, zero                     # bare: the guest's addresses are guest-physical
        li      t0, HSTATUS_SPVP
        csrw    hstatus, t0

        la      t0, trapped
        csrw    mtvec, t0
        li      s0, PROBES

        # s0, kept in mscratch: the probe's record. No other register outlives a probe, so a guest that
        # runs through something else than CODE spoils nothing.
try:    li      t0, HEADER
        ld      t0, PROBE_COUNT(t0)
        slli    t0, t0, RECORD_SHIFT
        li      t1, PROBES
        add     t0, t0, t1
        bgeu    s0, t0, finish
        csrw    mscratch, s0
        ld      a0, 0(s0)
        ld      a1, 8(s0)
        hfence.gvma
        li      t0, READ
        beq     a1, t0, read
        li      t0, WRITE
        beq     a1, t0, write

        # To run; `trapped` goes on.
        li      t0, MSTATUS_MPP
        csrc    mstatus, t0
        li      t0, MSTATUS_TO_VS
        csrs    mstatus, t0
        addi    a0, a0, CODE
        csrw    mepc, a0
        mret

read:   hlv.d   a1, (a0)
        li      t0, DONE
        j       record

write:  sub     t0, s0, t1                      # t1 is still PROBES
        srli    t0, t0, RECORD_SHIFT
        addi    t0, t0, 1
        addi    a0, a0, WRITER
        hsv.d   t0, (a0)
        li      a1, 0
        li      t0, DONE
        j       record

        .balign 4
trapped:
        csrr    s0, mscratch
        csrr    t0, mcause
        csrr    a1, mtval2
        slli    a1, a1, 2
        # The call is no fault, if it came from where the guest was sent.
        li      t1, ECALL_FROM_VS
        bne     t0, t1, record
        ld      t1, 0(s0)
        addi    t1, t1, CODE
        csrr    t2, mepc
        bne     t1, t2, record
        li      a1, 0
        li      t0, DONE

record: sd      t0, 0(s0)
        sd      a1, 8(s0)
        addi    s0, s0, RECORD
        j       try

finish: la      t0, trapped_here
        csrw    mtvec, t0

        li      t0, FRAMES
        li      t1, FRAMES + FRAMES_BYTES
        li      t2, WRITERS
        li      t3, PAGE
1:      ld      t4, WRITER(t0)
        sd      t4, 0(t2)
        add     t0, t0, t3
        addi    t2, t2, 8
        bltu    t0, t1, 1b

        li      s0, HEADER
        li      t0, FINISHED_MARK
        sd      t0, FINISHED(s0)
        la      a1, open_block
        li      a0, SYS_OPEN
        jal     semihost
        bltz    a0, not_written
        mv      s1, a0

        li      a0, HEADER                      # to the last probe's outcome
        ld      a1, PROBE_COUNT(s0)
        slli    a1, a1, RECORD_SHIFT
        li      t0, PROBES - HEADER
        add     a1, a1, t0
        jal     put
        li      a0, TABLES
        ld      a1, TABLES_BYTES(s0)
        jal     put
        li      a0, WRITERS
        li      a1, FRAMES_BYTES / PAGE * 8
        jal     put
        li      t0, 0
        j       exit

not_written:
        la      a1, not_written_text
        j       fail
        .balign 4
trapped_here:
        la      a1, trapped_here_text
fail:   li      a0, SYS_WRITE0
        jal     semihost
        li      t0, 1
exit:   la      a1, exit_block
        sd      t0, 8(a1)
        li      a0, SYS_EXIT
        jal     semihost
        j       .

        # Writes a1 bytes from a0 to file s1.
put:    mv      s2, ra
        la      t0, write_block
        sd      s1, 0(t0)
        sd      a0, 8(t0)
        sd      a1, 16(t0)
        mv      a1, t0
        li      a0, SYS_WRITE
        jal     semihost
        bnez    a0, not_written                 # the number of bytes left
        jr      s2

        # Call a0 with the block a1. The three instructions must be in one page.
        .balign 16
semihost:
        slli    x0, x0, 0x1f
        ebreak
        srai    x0, x0, 7
        ret

        .balign 8
guest_code:
        ecall
        .balign 8
open_block:
        .dword  file_name, OPEN_WB, file_name_end - file_name
write_block:
        .dword  0, 0, 0
exit_block:
        .dword  APPLICATION_EXIT, 0
file_name:
        .ascii  "answer"
file_name_end:
        .byte   0
not_written_text:
        .asciz  "stub: cannot write the answer\n"
trapped_here_text:
        .asciz  "stub: a trap where none belongs\n"
