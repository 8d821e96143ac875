//! Register of pending events for the ACPI Generic Event Device.
//!
//! [`GenericEvents::raise`] sets the bit of an event and raises the interrupt. The guest's handler, `_EVT` in the DSDT,
//! reads the register, which clears it, and notifies the ACPI device of each bit that was set. An event that arrives
//! during this raises the interrupt again, so that no event is lost; a handler that reads 0 has nothing to do.
//!
//! Specification: ACPI 6.5, section 5.6.9. The register itself is specific to this project.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use minicbor::{Decode, Encode};
use vmm_sys_util::eventfd::EventFd;

use crate::{BusDevice, PortSpace, SavedState};

/// First port of the register.
pub const EVENTS_PORT: u16 = 0x604;
/// Number of ports of the register.
pub const EVENTS_PORTS: u16 = 4;
/// Interrupt line of the Generic Event Device, edge-triggered and active high. It is the ACPI interrupt of a PC.
pub const GENERIC_EVENTS_INTERRUPT: u32 = 9;

/// Event that the Generic Event Device reports to the guest. The discriminant is the event's bit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum GenericEvent {
    /// The power button was pressed.
    PowerButton = 1,
    /// The guest was cloned or restored from a snapshot, and has a new generation ID.
    GenerationChanged = 1 << 1,
}

/// Bits of all events.
const ALL: u32 = GenericEvent::PowerButton as u32 | GenericEvent::GenerationChanged as u32;

/// Reason for which the register could not be restored, or an event not be raised.
#[derive(Debug, thiserror::Error)]
pub enum EventsError {
    /// The saved state has bits that are no event.
    #[error("generic event state: pending is {0:#x}, but only the bits {ALL:#x} are events")]
    State(u32),
    /// The write to the interrupt's eventfd failed.
    #[error("cannot raise the interrupt of the Generic Event Device: {0}")]
    Interrupt(#[source] io::Error),
}

/// Saved state of the register of pending events.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct EventsSnapshot {
    /// Bits of the events that the guest has not read yet.
    #[n(0)]
    pub pending: u32,
}

impl SavedState for EventsSnapshot {
    const VERSION: u16 = 1;
}

/// Register of pending events. Clones share the register.
#[derive(Clone)]
pub struct GenericEvents {
    pending: Arc<Mutex<u32>>,
    interrupt: Arc<EventFd>,
}

impl GenericEvents {
    /// Creates a register without pending events that raises `interrupt`.
    #[must_use]
    pub fn new(interrupt: EventFd) -> Self {
        Self {
            pending: Arc::default(),
            interrupt: Arc::new(interrupt),
        }
    }

    /// Creates a register from its saved state. Raises the interrupt if events are pending, because the guest may have
    /// been saved before it received the interrupt.
    ///
    /// # Errors
    /// Returns [`EventsError`] if the state has unknown bits, or the interrupt cannot be raised.
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

    /// Returns the state of the register.
    #[must_use]
    pub fn save(&self) -> EventsSnapshot {
        EventsSnapshot {
            pending: *self.lock(),
        }
    }

    /// Reports `event` to the guest. An event that is raised twice before the guest reads the register counts once.
    ///
    /// # Errors
    /// Returns [`EventsError::Interrupt`] if the interrupt cannot be raised. The event stays pending until the next
    /// interrupt.
    pub fn raise(&self, event: GenericEvent) -> Result<(), EventsError> {
        *self.lock() |= event as u32;
        self.pulse()
    }

    /// Raises the interrupt.
    fn pulse(&self) -> Result<(), EventsError> {
        self.interrupt.write(1).map_err(EventsError::Interrupt)
    }

    fn lock(&self) -> MutexGuard<'_, u32> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl BusDevice<PortSpace> for GenericEvents {
    /// Returns the requested bytes of the register and clears them. Other bytes keep their events.
    fn read(&mut self, offset: u16, data: &mut [u8]) {
        let mut pending = self.lock();
        let mut bytes = pending.to_le_bytes();
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = bytes.get_mut(at).map_or(0, std::mem::take);
        }
        *pending = u32::from_le_bytes(bytes);
    }

    /// The register is read-only.
    fn write(&mut self, _offset: u16, _data: &[u8]) {}
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `EFD_NONBLOCK` of the kernel's include/uapi/linux/eventfd.h.
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
        assert!(
            interrupt.read().is_err(),
            "an interrupt without a pending event"
        );
    }

    #[test]
    fn unknown_events_are_refused() {
        let (_, interrupt) = events();
        let error = GenericEvents::restore(EventsSnapshot { pending: 4 }, interrupt).err();
        assert!(error.unwrap().to_string().contains("pending is 0x4"));
    }
}
