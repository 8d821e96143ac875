//! Registers of virtio over MMIO, version 2 (virtio 1.2, 4.2), and the state machine of the device status.
//!
//! ```text
//! 0 ── ACKNOWLEDGE ── DRIVER ── FEATURES_OK ── DRIVER_OK     status bits, in the order in which a driver sets them
//!                       │            │             │
//!                    features      queues     the queues are served
//! ```
//!
//! A driver can write a register only in the state that is drawn above it. All other writes, and accesses of a wrong
//! width, have no effect and are counted in [`MmioTransport::refused`]. Writing 0 to `Status` resets the device: when
//! the write returns, nothing accesses the driver's memory any more.

use std::sync::atomic::Ordering;

use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;

use super::super::eventfd::notify;
use super::super::queue::{QueueError, QueueSnapshot};
use super::super::spec::{MAGIC, VENDOR, VERSION, register, status};
use super::{MmioTransport, Registers, fresh_queues};
use crate::{BusDevice, MmioSpace};

/// Status bits in the order in which a driver sets them (3.1.1).
const STATUS_ORDER: [u32; 4] = [
    status::ACKNOWLEDGE,
    status::DRIVER,
    status::FEATURES_OK,
    status::DRIVER_OK,
];
/// Status bits that a driver may write. A driver may also write DEVICE_NEEDS_RESET back, which is ignored.
pub(super) const KNOWN_STATUS: u32 =
    status::ACKNOWLEDGE | status::DRIVER | status::FEATURES_OK | status::DRIVER_OK | status::FAILED;

impl MmioTransport {
    /// Returns whether all of `bits` are set in the device status.
    pub(super) fn has(&self, bits: u32) -> bool {
        self.registers.status & bits == bits
    }

    fn read_register(&self, offset: u64) -> u32 {
        let interrupt = &self.interrupt;
        match offset {
            register::MAGIC_VALUE => MAGIC,
            register::VERSION => VERSION,
            register::DEVICE_ID => self.identity.device_type,
            register::VENDOR_ID => VENDOR,
            register::DEVICE_FEATURES => half(
                self.identity.features,
                self.registers.device_features_select,
            ),
            register::QUEUE_NUM_MAX => self.queue().map_or(0, |queue| queue.max_size.into()),
            register::QUEUE_READY => self.queue().map_or(0, |queue| queue.ready.into()),
            register::INTERRUPT_STATUS => interrupt.status(),
            register::STATUS => self.status(),
            register::CONFIG_GENERATION => interrupt.generation(),
            // There is no shared memory region, so length and base are all ones (4.2.2).
            register::SHM_LEN_LOW..=register::SHM_BASE_HIGH => u32::MAX,
            _ => {
                self.refuse();
                0
            }
        }
    }

    fn write_register(&mut self, offset: u64, value: u32) {
        match offset {
            register::DEVICE_FEATURES_SEL => self.registers.device_features_select = value,
            register::DRIVER_FEATURES => self.write_driver_features(value),
            register::DRIVER_FEATURES_SEL => self.registers.driver_features_select = value,
            register::QUEUE_SEL => self.registers.queue_select = value,
            register::QUEUE_READY => self.write_queue_ready(value),
            register::QUEUE_NUM
            | register::QUEUE_DESC_LOW
            | register::QUEUE_DESC_HIGH
            | register::QUEUE_DRIVER_LOW
            | register::QUEUE_DRIVER_HIGH
            | register::QUEUE_DEVICE_LOW
            | register::QUEUE_DEVICE_HIGH => self.write_queue(offset, value),
            register::QUEUE_NOTIFY => self.notify(value),
            register::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            register::STATUS => self.write_status(value),
            _ => self.refuse(),
        }
    }

    /// Returns the value of `Status`, including DEVICE_NEEDS_RESET.
    fn status(&self) -> u32 {
        let needs_reset = if self.interrupt.is_reset_needed() {
            status::DEVICE_NEEDS_RESET
        } else {
            0
        };
        self.registers.status | needs_reset
    }

    /// Handles a write to `Status`. Each bit requires the one before it (3.1.1), and only a reset clears bits (2.1.1).
    fn write_status(&mut self, value: u32) {
        if value == 0 {
            return self.reset();
        }
        let value = value & !status::DEVICE_NEEDS_RESET;
        let old = self.registers.status;
        // True if a bit is set whose predecessor is not.
        let skips = STATUS_ORDER
            .windows(2)
            .any(|pair| value & pair[1] != 0 && value & pair[0] == 0);
        if value & !KNOWN_STATUS != 0 || old & !value != 0 || skips {
            return self.refuse();
        }
        let new = value & !old;
        if new & status::FEATURES_OK != 0 && !self.features_fit() {
            // The driver reads the status back and gives up (3.1.1, steps 5 and 6).
            self.registers.status = value & !(status::FEATURES_OK | status::DRIVER_OK);
            return;
        }
        self.registers.status = value;
        if new & status::DRIVER_OK != 0 {
            self.interrupt.driver_is_ready();
            if let Err(error) = self.activate() {
                self.server.fail(&error);
            }
        }
    }

    /// Returns whether the device agrees with the features that the driver has accepted.
    fn features_fit(&self) -> bool {
        let chosen = self.registers.driver_features;
        chosen & !self.identity.features == 0
            && chosen & (1 << VIRTIO_F_VERSION_1) != 0
            && self.identity.config.accepts(chosen)
    }

    /// Hands the queues to the server.
    pub(super) fn activate(&self) -> Result<(), QueueError> {
        self.server
            .activate(&self.queues, self.registers.driver_features)
    }

    fn reset(&mut self) {
        self.server.reset();
        self.identity.config.reset();
        self.registers = Registers::default();
        self.queues = fresh_queues(&self.identity);
    }

    fn write_driver_features(&mut self, value: u32) {
        if !self.has(status::DRIVER) || self.has(status::FEATURES_OK) {
            return self.refuse();
        }
        let features = &mut self.registers.driver_features;
        match self.registers.driver_features_select {
            0 => set_low(features, value),
            1 => set_high(features, value),
            // A driver may know more than 64 feature bits. It can only reject those that are not offered.
            _ if value == 0 => {}
            _ => self.refuse(),
        }
    }

    /// Returns whether the driver may configure queues: between FEATURES_OK and DRIVER_OK.
    fn can_set_up_queues(&self) -> bool {
        self.has(status::FEATURES_OK)
            && self.registers.status & (status::DRIVER_OK | status::FAILED) == 0
    }

    /// Handles a write to a register of the selected queue, which is allowed until the queue is ready.
    fn write_queue(&mut self, offset: u64, value: u32) {
        let allowed = self.can_set_up_queues();
        let Some(queue) = self.queue_mut().filter(|queue| allowed && !queue.ready) else {
            return self.refuse();
        };
        match offset {
            register::QUEUE_NUM => match u16::try_from(value) {
                Ok(size) if (QueueSnapshot { size, ..*queue }).size_is_possible() => {
                    queue.size = size;
                }
                _ => self.refuse(),
            },
            register::QUEUE_DESC_LOW => set_low(&mut queue.descriptor_table, value),
            register::QUEUE_DESC_HIGH => set_high(&mut queue.descriptor_table, value),
            register::QUEUE_DRIVER_LOW => set_low(&mut queue.available_ring, value),
            register::QUEUE_DRIVER_HIGH => set_high(&mut queue.available_ring, value),
            register::QUEUE_DEVICE_LOW => set_low(&mut queue.used_ring, value),
            _ => set_high(&mut queue.used_ring, value),
        }
    }

    fn write_queue_ready(&mut self, value: u32) {
        let can_set_up = self.can_set_up_queues();
        let index = self.queue_index();
        let Some(queue) = self.queue_mut() else {
            return self.refuse();
        };
        match value {
            // A driver may stop a queue at any time. Only a reset makes it usable again.
            0 => {
                queue.ready = false;
                self.server.stop_queue(index);
            }
            1 if can_set_up => queue.ready = true,
            _ => self.refuse(),
        }
    }

    /// Handles a write to `QueueNotify` that no ioeventfd has caught.
    fn notify(&self, value: u32) {
        let queue = usize::try_from(value)
            .ok()
            .and_then(|index| self.server.notifiers().get(index));
        match queue {
            Some(notifier) if self.has(status::DRIVER_OK) => notify(notifier),
            _ => self.refuse(),
        }
    }

    fn queue_index(&self) -> usize {
        usize::try_from(self.registers.queue_select).unwrap_or(usize::MAX)
    }

    fn queue(&self) -> Option<&QueueSnapshot> {
        self.queues.get(self.queue_index())
    }

    fn queue_mut(&mut self) -> Option<&mut QueueSnapshot> {
        let index = self.queue_index();
        self.queues.get_mut(index)
    }

    /// Counts an access that has no effect.
    fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }
}

impl BusDevice<MmioSpace> for MmioTransport {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) => self.identity.config.read(offset, data),
            None => match <&mut [u8; 4]>::try_from(&mut *data) {
                Ok(data) if offset.is_multiple_of(4) => {
                    *data = self.read_register(offset).to_le_bytes()
                }
                _ => {
                    data.fill(0);
                    self.refuse();
                }
            },
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) {
        match offset.checked_sub(register::CONFIG) {
            Some(offset) if self.has(status::DRIVER) => self.identity.config.write(offset, data),
            Some(_) => self.refuse(),
            None => match <[u8; 4]>::try_from(data) {
                Ok(data) if offset.is_multiple_of(4) => {
                    self.write_register(offset, u32::from_le_bytes(data));
                }
                _ => self.refuse(),
            },
        }
    }
}

/// Returns the 32 bits of `value` that `select` selects: 0 for the low half, 1 for the high half.
fn half(value: u64, select: u32) -> u32 {
    let [a, b, c, d, e, f, g, h] = value.to_le_bytes();
    match select {
        0 => u32::from_le_bytes([a, b, c, d]),
        1 => u32::from_le_bytes([e, f, g, h]),
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = (*value >> 32 << 32) | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = (u64::from(high) << 32) | (*value & u64::from(u32::MAX));
}
