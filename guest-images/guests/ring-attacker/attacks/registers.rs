//! Invalid accesses to registers and to the configuration space (4.2.2).

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Device, Result, ensure};
use crate::mmio::{read8, read16, read32, read64, write8, write16, write32, write64};
use crate::spec::{DEVICE_BYTES, Kind, register};

const fn attack(name: &'static str, run: fn(&mut Case<'_>) -> Result<Outcome>) -> Attack {
    Attack {
        name,
        on: Targets::EveryDevice,
        expected: Outcome::Ignored,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 11] = [
    attack("registers-read-in-odd-widths", |case| {
        running(case, |device| {
            (0..register::CONFIG).try_for_each(|offset| {
                let at = device.base + offset;
                let fits = |bytes: u64| offset + bytes <= register::CONFIG;
                let zeros = read8(at) == 0
                    && (!fits(2) || read16(at) == 0)
                    && (!fits(8) || read64(at) == 0)
                    && (!fits(4) || offset % 4 == 0 || read32(at) == 0);
                ensure(zeros, "a register read in an odd width")
            })
        })
    }),
    attack("registers-written-in-odd-widths", |case| {
        running(case, |device| {
            for offset in 0..register::CONFIG {
                let at = device.base + offset;
                for ones in [0, u64::MAX] {
                    write8(at, ones as u8);
                    if offset + 2 <= register::CONFIG {
                        write16(at, ones as u16);
                    }
                    if offset + 4 <= register::CONFIG && offset % 4 != 0 {
                        write32(at, ones as u32);
                    }
                    if offset + 8 <= register::CONFIG {
                        write64(at, ones);
                    }
                }
            }
            Ok(())
        })
    }),
    attack("registers-that-are-not", |case| {
        running(case, |device| {
            for offset in [
                0x18, 0x1c, 0x28, 0x2c, 0x3c, 0x40, 0x54, 0x68, 0x74, 0x7c, 0xc0,
            ] {
                device.write(offset, u32::MAX);
                ensure(device.read(offset) == 0, "a register that is not")?;
            }
            Ok(())
        })
    }),
    attack("registers-to-read-written", |case| {
        running(case, |device| {
            for offset in [
                register::MAGIC_VALUE,
                register::VERSION,
                register::DEVICE_ID,
                register::VENDOR_ID,
                register::DEVICE_FEATURES,
                register::QUEUE_NUM_MAX,
                register::CONFIG_GENERATION,
            ] {
                let before = device.read(offset);
                device.write(offset, !before);
                ensure(device.read(offset) == before, "it can be written")?;
            }
            device.write(register::INTERRUPT_STATUS, u32::MAX);
            Ok(())
        })
    }),
    attack("registers-to-write-read", |case| {
        running(case, |device| {
            [
                register::DEVICE_FEATURES_SEL,
                register::DRIVER_FEATURES,
                register::DRIVER_FEATURES_SEL,
                register::QUEUE_SEL,
                register::QUEUE_NUM,
                register::QUEUE_NOTIFY,
                register::INTERRUPT_ACK,
                register::QUEUE_ADDRESSES[0],
                register::QUEUE_ADDRESSES[1],
                register::QUEUE_ADDRESSES[2],
            ]
            .into_iter()
            .try_for_each(|offset| ensure(device.read(offset) == 0, "it can be read"))
        })
    }),
    attack("queue-that-is-not", |case| {
        running(case, |device| {
            for queue in [device.queue_count as u32, 0xffff, 0x1_0000, u32::MAX] {
                device.write(register::QUEUE_SEL, queue);
                device.write(register::QUEUE_NUM, 2);
                device.set_addresses([0x1000; 3]);
                device.write(register::QUEUE_READY, 1);
                let [most, ready] =
                    [register::QUEUE_NUM_MAX, register::QUEUE_READY].map(|at| device.read(at));
                ensure(most == 0 && ready == 0, "there is such a queue")?;
                device.write(register::QUEUE_READY, 0);
            }
            Ok(())
        })
    }),
    attack("notified-queue-that-is-not", |case| {
        running(case, |device| {
            for queue in [device.queue_count as u32, 0xffff, 0x1_0000, u32::MAX] {
                device.write(register::QUEUE_NOTIFY, queue);
            }
            // An existing queue, in invalid widths.
            write8(device.base + register::QUEUE_NOTIFY, 0);
            write16(device.base + register::QUEUE_NOTIFY, 0);
            write64(device.base + register::QUEUE_NOTIFY, 0);
            Ok(())
        })
    }),
    attack("interrupt-acknowledged-that-is-not", |case| {
        running(case, |device| {
            device.write(register::INTERRUPT_ACK, u32::MAX);
            device.write(register::INTERRUPT_ACK, 0);
            Ok(())
        })
    }),
    attack("config-written", |case| {
        running(case, |device| {
            let before = config(device);
            let last = DEVICE_BYTES - register::CONFIG - 8;
            for offset in (0..80).chain(last - 8..=last) {
                let at = device.base + register::CONFIG + offset;
                write8(at, 0xff);
                write16(at, 0xffff);
                write32(at, u32::MAX);
                write64(at, u64::MAX);
            }
            let mut after = config(device);
            if device.kind == Kind::Balloon {
                // The driver may write any value to `actual` (5.5.4).
                after[1] = before[1];
            }
            ensure(before == after, "it can be written")
        })
    }),
    attack("config-beyond-its-end", |case| {
        running(case, |device| {
            let last = DEVICE_BYTES - register::CONFIG - 8;
            (64..last).step_by(61).chain([last]).try_for_each(|offset| {
                let at = device.base + register::CONFIG + offset;
                let zeros = read8(at) == 0 && read16(at) == 0 && read32(at) == 0 && read64(at) == 0;
                ensure(zeros, "there is something behind its end")
            })
        })
    }),
    attack("accesses-across-the-page", |case| {
        running(case, |device| {
            // The next page may belong to another device. The access must change neither.
            for short in 1..8 {
                let at = device.base + DEVICE_BYTES - short;
                write64(at, u64::MAX);
                let _whatever = read64(at);
            }
            Ok(())
        })
    }),
];

/// Calls `what` with a running device, which must work as before.
fn running(case: &mut Case<'_>, what: fn(&Device) -> Result) -> Result<Outcome> {
    case.device.start(None)?;
    case.device.operate()?;
    what(case.device)?;
    case.lives_on()
}

fn config(device: &Device) -> [u32; 20] {
    core::array::from_fn(|index| device.config32(4 * index as u64))
}
