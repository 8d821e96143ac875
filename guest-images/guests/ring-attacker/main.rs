//! `ring-attacker`: a virtio driver that violates the specification on purpose and checks the reaction of the devices.
//!
//! After each attack, every other device must complete an operation, and then the attacked device must complete one after
//! a reset. The module `attacks` lists the attacks and their expected outcomes. The documentation of the library describes
//! how to run the program.

#![no_std]
#![no_main]

mod attack;
mod attacks;
#[path = "../runtime/console.rs"]
mod console;
#[allow(dead_code)]
#[path = "../runtime/cpu.rs"]
mod cpu;
mod device;
mod dma;
#[allow(dead_code)]
#[path = "../../src/interface.rs"]
mod interface;
#[allow(dead_code)]
#[path = "../../src/memory.rs"]
mod memory;
mod mmio;
mod operation;
mod queue;
mod spec;
#[path = "../runtime/start_info.rs"]
mod start_info;
#[path = "../runtime/trap.rs"]
mod trap;

use core::arch::global_asm;
use core::fmt::{self, Display};
use core::panic::PanicInfo;

use attack::{Attack, Case, Outcome, is_untouched};
use device::{Device, Result, Trouble};
use interface::{
    CMDLINE_MOST, EXIT_BAD_REQUEST, EXIT_CRASH, EXIT_NOT_REFUSED, EXIT_SUCCESS, PAGE_SIZE,
};
use spec::Kind;
use start_info::StartInfo;

/// Prefix of the lines on the serial port.
const NAME: &str = "ring-attacker";
/// Word of the command line that makes the guest wait for a `q` when it is done.
const HOLD: &str = "hold";
/// Number of timeouts after which no more attacks are made.
const SILENT_MOST: u32 = 3;
/// Queues that are attacked. `None` stands for the device as a whole.
const QUEUES: [Option<usize>; 4] = [None, Some(0), Some(1), Some(2)];

global_asm!(include_str!("../runtime/boot.s"), options(att_syntax));

unsafe extern "C" {
    /// First byte after the image.
    static image_end: u8;
}

type Devices = [Option<Device>; dma::SLOTS];

/// Entry point of every vCPU, in ring 3. `index` is 0 on the boot vCPU, which does all the work.
#[unsafe(no_mangle)]
extern "C" fn guest_main(index: u32, start_info: u32) -> ! {
    while index > 0 {
        core::hint::spin_loop();
    }
    trap::install();
    let mut buffer = [0; CMDLINE_MOST];
    let info = StartInfo::at(start_info).unwrap_or_else(|t| refuse(t));
    let line = info.command_line(&mut buffer).unwrap_or_else(|t| refuse(t));
    let memory = info
        .memory((&raw const image_end).addr() as u64)
        .unwrap_or_else(|t| refuse(t));
    let first = memory.as_slice()[0];
    let mut run = Run::new((first.first + first.pages) * PAGE_SIZE);
    run.all();
    console::print(&run);
    while line.split(' ').any(|word| word == HOLD) && cpu::serial_receive() != Some(b'q') {}
    cpu::exit(run.exit_status())
}

/// The run of all attacks, and its counts.
struct Run {
    devices: Devices,
    /// End of RAM.
    memory_end: u64,
    attacks: u32,
    unexpected: u32,
    /// Number of timeouts. Each takes about ten seconds.
    silent: u32,
}

impl Run {
    fn new(memory_end: u64) -> Self {
        let devices: Devices = core::array::from_fn(Device::find);
        if devices.iter().flatten().next().is_none() {
            refuse("no virtio device at 0xd0000000 and above: give --disk, --rng, …");
        }
        Self {
            devices,
            memory_end,
            attacks: 0,
            unexpected: 0,
            silent: 0,
        }
    }

    /// Checks that all devices work, then makes all attacks.
    fn all(&mut self) {
        for device in self.devices.iter_mut().flatten() {
            let works = device.start(None).and_then(|()| device.operate());
            if let Err(trouble) = works {
                refuse(Unusable(device.kind, trouble));
            }
        }
        for attack in attacks::ALL.into_iter().flatten() {
            for slot in 0..dma::SLOTS {
                for queue in QUEUES {
                    let target = self.devices[slot].as_ref();
                    if target.is_some_and(|device| attack.on.hit(device, queue))
                        && self.silent < SILENT_MOST
                    {
                        self.one(attack, slot, queue);
                    }
                }
            }
        }
    }

    /// Makes one attack and prints its result.
    fn one(&mut self, attack: &Attack, slot: usize, queue: Option<usize>) {
        let Some(device) = self.devices[slot].as_mut() else {
            return;
        };
        let kind = device.kind;
        let mut case = Case::new(device, queue, self.memory_end);
        let mut outcome = (attack.run)(&mut case);
        let watched = case.watched();
        let others = self.others(slot);
        if !is_untouched(&watched) {
            outcome = Err(Trouble::Wrong("it writes to memory that is the driver's"));
        }
        let again = self.devices[slot].as_mut().map_or(Ok(()), |device| {
            device.start(None).and_then(|()| device.operate())
        });
        let line = Line {
            attack,
            kind,
            queue,
            outcome,
            others,
            again,
        };
        self.attacks += 1;
        self.unexpected += u32::from(!line.is_as_expected());
        self.silent += u32::from(line.is_silent());
        console::print(line);
    }

    /// Makes all devices except one complete an operation. Returns their number.
    fn others(&mut self, but: usize) -> core::result::Result<usize, (Kind, Trouble)> {
        let mut count = 0;
        for (slot, device) in self.devices.iter_mut().enumerate() {
            let Some(device) = device.as_mut().filter(|_| slot != but) else {
                continue;
            };
            let worked = device.operate().and_then(|()| device.runs());
            worked.map_err(|trouble| (device.kind, trouble))?;
            count += 1;
        }
        Ok(count)
    }

    fn exit_status(&self) -> u8 {
        if self.unexpected == 0 {
            EXIT_SUCCESS
        } else {
            EXIT_NOT_REFUSED
        }
    }
}

/// Writes the summary line.
impl Display for Run {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "{NAME}: attacks={}", self.attacks)?;
        write!(out, " unexpected={} operations=", self.unexpected)?;
        for (index, device) in self.devices.iter().flatten().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            write!(out, "{comma}{}:{}", device.kind.name(), device.operations)?;
        }
        if self.silent == SILENT_MOST {
            out.write_str(" ended early: too often a device did not answer")?;
        }
        Ok(())
    }
}

/// Result of one attack.
struct Line<'a> {
    attack: &'a Attack,
    kind: Kind,
    queue: Option<usize>,
    outcome: Result<Outcome>,
    others: core::result::Result<usize, (Kind, Trouble)>,
    again: Result,
}

impl Line<'_> {
    fn is_as_expected(&self) -> bool {
        let expected = matches!(&self.outcome, Ok(outcome) if *outcome == self.attack.expected);
        expected && self.others.is_ok() && self.again.is_ok()
    }

    fn is_silent(&self) -> bool {
        let others = self.others.as_ref().err().map(|(_, trouble)| trouble);
        [
            self.outcome.as_ref().err(),
            others,
            self.again.as_ref().err(),
        ]
        .into_iter()
        .flatten()
        .any(|trouble| matches!(trouble, Trouble::Silent(_)))
    }
}

impl Display for Line<'_> {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            out,
            "attack {} device={}",
            self.attack.name,
            self.kind.name()
        )?;
        if let Some(queue) = self.queue {
            write!(out, " queue={}", self.kind.queues()[queue])?;
        }
        match &self.outcome {
            Ok(outcome) => write!(out, " outcome={outcome}")?,
            Err(trouble) => write!(out, " outcome={trouble}")?,
        }
        match &self.others {
            Ok(count) => write!(out, " others={count}")?,
            Err((kind, trouble)) => write!(out, " others={}:{trouble}", kind.name())?,
        }
        match &self.again {
            Ok(()) => out.write_str(" again=yes")?,
            Err(trouble) => write!(out, " again={trouble}")?,
        }
        if self.is_as_expected() {
            Ok(())
        } else {
            write!(out, " UNEXPECTED, expected {}", self.attack.expected)
        }
    }
}

impl Display for Trouble {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Silent(what) => write!(out, "\"silent: {what}\""),
            Self::Wrong(what) => write!(out, "\"wrong: {what}\""),
        }
    }
}

/// A device that does not work even before the first attack.
struct Unusable(Kind, Trouble);

impl Display for Unusable {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(kind, trouble) = self;
        write!(out, "{} does not work here: {trouble}", kind.name())
    }
}

/// Prints the reason why the program cannot run and ends the guest.
fn refuse(reason: impl Display) -> ! {
    console::print_and_exit(
        format_args!("{NAME}: cannot start: {reason}"),
        EXIT_BAD_REQUEST,
    )
}

#[panic_handler]
fn panic(info: &PanicInfo<'_>) -> ! {
    console::crash(format_args!("{NAME}: PANIC {info}"), EXIT_CRASH)
}

/// The prebuilt `core` refers to this function in unwind tables, which the linker script discards.
#[unsafe(no_mangle)]
extern "C" fn rust_eh_personality() {}
