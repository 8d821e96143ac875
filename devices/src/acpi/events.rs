//! The Generic Event Device's register: which events wait for the guest.
//!
//! An event sets its bit and pulses the device's interrupt. The guest's handler (`_EVT` in the DSDT) reads the
//! register, which takes all bits, and notifies the device that each bit stands for. An event that comes
//! between the two pulses again: none is lost, and a handler that finds nothing does nothing.
//!
//! Specification: ACPI 6.5, section 5.6.9; the register is this project's own.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minicbor::{Decode, Encode};
use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, PortSpace, SavedState};

/// The register's first port.
pub const EVENTS_PORT: u16 = 0x604;
/// It is 4 bytes wide.
pub const EVENTS_PORTS: u16 = 4;
/// The interrupt line of the Generic Event Device: where a PC has its ACPI interrupt. Edge, active high.
pub const GENERIC_EVENTS_INTERRUPT: u32 = 9;

/// What a guest can be told by the Generic Event Device. The discriminant is the event's bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GenericEvent {
    /// Somebody pressed the power button.
    PowerButton = 1,
    /// The guest was cloned or put back in time: its generation ID is another.
    GenerationChanged = 1 << 1,
}

const ALL: u32 = GenericEvent::PowerButton as u32 | GenericEvent::GenerationChanged as u32;

/// Why events could not be restored or raised.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// Bits that stand for no event.
    #[error("generic event state: pending is {0:#x}, only the bits {ALL:#x} are events")]
    State(u32),
    /// The interrupt could not be raised.
    #[error("generic event interrupt: {0}")]
    Interrupt(#[source] io::Error),
}

/// The state of the register.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct EventsSnapshot {
    /// The bits of the events that the guest has not taken yet.
    #[n(0)]
    pub pending: u32,
}

impl SavedState for EventsSnapshot {
    const VERSION: u16 = 1;
}

/// The register of the Generic Event Device. Clones are the same register.
#[derive(Clone)]
pub struct GenericEvents {
    pending: Arc<Mutex<u32>>,
    interrupt: Arc<EventFd>,
}

impl GenericEvents {
    /// A register without events, that pulses `interrupt`.
    #[must_use]
    pub fn new(interrupt: EventFd) -> Self {
        Self {
            pending: Arc::default(),
            interrupt: Arc::new(interrupt),
        }
    }

    /// The register as it was saved. Events that wait pulse the interrupt again: the pulse may have been on its
    /// way when the guest was stopped.
    ///
    /// # Errors
    /// A state that it cannot have been in; the interrupt cannot be raised.
    pub fn restore(saved: EventsSnapshot, interrupt: EventFd) -> Result<Self, EventsError> {
        if saved.pending & !ALL != 0 {
            return Err(EventsError::State(saved.pending));
        }
        let events = Self::new(interrupt);
        *events.lock() = saved.pending;
        if saved.pending != 0 {
            events.pulse()?;
        }
        Ok(events)
    }

    /// Its state.
    #[must_use]
    pub fn save(&self) -> EventsSnapshot {
        EventsSnapshot {
            pending: *self.lock(),
        }
    }

    /// Tells the guest of `event`. Told twice before the guest looks, it is one event.
    ///
    /// # Errors
    /// The interrupt cannot be raised; the event waits for the next one that can.
    pub fn raise(&self, event: GenericEvent) -> Result<(), EventsError> {
        *self.lock() |= event as u32;
        self.pulse()
    }

    fn pulse(&self) -> Result<(), EventsError> {
        self.interrupt.write(1).map_err(EventsError::Interrupt)
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice<PortSpace> for GenericEvents {
    /// Takes the events that are read, and no others.
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let mut pending = self.lock();
        let mut bytes = pending.to_le_bytes();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = bytes.get_mut(at).map_or(0, std::mem::take);
        }
        *pending = u32::from_le_bytes(bytes);
    }

    /// Nothing is written here.
    fn write(&mut self, _offset: u16, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `EFD_NONBLOCK`, from the kernel's include/uapi/linux/eventfd.h.
    const EFD_NONBLOCK: i32 = 0o4000;

    fn events() -> (GenericEvents, EventFd) {
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        (
            GenericEvents::new(interrupt.try_clone().unwrap()),
            interrupt,
        )
    }

    fn take(register: &mut GenericEvents) -> u32 {
        let mut bytes = [0xaa; 4];
        register.read(0, &mut bytes);
        u32::from_le_bytes(bytes)
    }

    #[test]
    fn a_read_takes_what_was_raised_and_each_pulses() {
        let (mut register, interrupt) = events();
        assert!(interrupt.read().is_err());
        register.raise(GenericEvent::PowerButton).unwrap();
        register.raise(GenericEvent::PowerButton).unwrap();
        register.raise(GenericEvent::GenerationChanged).unwrap();
        assert_eq!(interrupt.read().unwrap(), 3);
        assert_eq!(take(&mut register), 3);
        assert_eq!(take(&mut register), 0);
    }

    #[test]
    fn a_narrow_read_takes_only_its_bits() {
        let (mut register, _interrupt) = events();
        register.raise(GenericEvent::PowerButton).unwrap();
        let mut byte = [0xaa];
        register.read(1, &mut byte);
        assert_eq!(byte, [0]);
        register.write(0, &[0; 4]);
        register.read(0, &mut byte);
        assert_eq!(byte, [1]);
        let mut beyond = [0xaa; 4];
        register.read(3, &mut beyond);
        assert_eq!((beyond, take(&mut register)), ([0; 4], 0));
    }

    #[test]
    fn waiting_events_are_told_again_after_a_restore() {
        let (register, _interrupt) = events();
        register.raise(GenericEvent::PowerButton).unwrap();
        let interrupt = EventFd::new(EFD_NONBLOCK).unwrap();
        let other = interrupt.try_clone().unwrap();
        let mut restored = GenericEvents::restore(register.save(), other).unwrap();
        assert_eq!(interrupt.read().unwrap(), 1);
        assert_eq!(take(&mut restored), GenericEvent::PowerButton as u32);
        let other = interrupt.try_clone().unwrap();
        drop(GenericEvents::restore(restored.save(), other).unwrap());
        assert!(interrupt.read().is_err(), "nothing waits, nothing is told");
    }

    #[test]
    fn unknown_events_are_refused() {
        let (_, interrupt) = events();
        let error = GenericEvents::restore(EventsSnapshot { pending: 4 }, interrupt).err();
        assert!(error.unwrap().to_string().contains("pending is 0x4"));
    }
}
