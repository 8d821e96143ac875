//! Saved state of virtio devices: the transport's registers and queues, and an opaque value for the device model.
//!
//! The transport does not know which device models exist. Each model encodes its own snapshot type into a
//! [`DeviceState`] and decodes it again; `DeviceID` in the transport's state guards against mixing up device types.

use minicbor::{Decode, Encode};

use super::queue::QueueSnapshot;
use crate::{SavedState, StateError, decode_state, encode_state};

/// Saved state of a virtio device: transport registers, queues, and the device model's own state.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct VirtioSnapshot {
    /// Registers and queues.
    #[n(0)]
    pub transport: TransportSnapshot,
    /// State of the device model.
    #[n(1)]
    pub device: DeviceState,
}

impl SavedState for VirtioSnapshot {
    const VERSION: u16 = 1;
}

/// Saved registers of virtio-mmio (virtio 1.2, 4.2.2) and the queues.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct TransportSnapshot {
    /// `DeviceID`. Restoring the state to a device of another type is refused.
    #[n(0)]
    pub device_type: u32,
    /// `Status`, without the bit DEVICE_NEEDS_RESET.
    #[n(1)]
    pub status: u32,
    /// DEVICE_NEEDS_RESET.
    #[n(2)]
    pub needs_reset: bool,
    /// Feature bits that the device offered.
    #[n(3)]
    pub device_features: u64,
    /// `DeviceFeaturesSel`.
    #[n(4)]
    pub device_features_select: u32,
    /// Feature bits that the driver accepted.
    #[n(5)]
    pub driver_features: u64,
    /// `DriverFeaturesSel`.
    #[n(6)]
    pub driver_features_select: u32,
    /// `QueueSel`.
    #[n(7)]
    pub queue_select: u32,
    /// `InterruptStatus`.
    #[n(8)]
    pub interrupt_status: u32,
    /// `ConfigGeneration`.
    #[n(9)]
    pub config_generation: u32,
    /// Queues, by index.
    #[n(10)]
    pub queues: Vec<QueueSnapshot>,
}

/// Encoded state of a device model. Only the model itself can decode it.
#[derive(Clone, Debug, PartialEq, Eq, Encode, Decode)]
#[cbor(map)]
pub struct DeviceState {
    /// [`SavedState::VERSION`] of the model's snapshot type.
    #[n(0)]
    pub version: u16,
    /// Snapshot of the model, encoded by [`encode_state`].
    #[n(1)]
    #[cbor(with = "minicbor::bytes")]
    pub data: Vec<u8>,
}

impl DeviceState {
    /// Encodes the snapshot of a device model.
    #[must_use]
    pub fn new<T: SavedState>(snapshot: &T) -> Self {
        Self {
            version: T::VERSION,
            data: encode_state(snapshot),
        }
    }

    /// Decodes the snapshot of the device model `device`, whose name goes into the error.
    ///
    /// # Errors
    /// Returns [`DeviceStateError::Unreadable`] if the data is not a snapshot of type `T`, or is a newer version of it.
    pub fn decode<T: SavedState>(&self, device: &'static str) -> Result<T, DeviceStateError> {
        decode_state(self.version, &self.data)
            .map_err(|source| DeviceStateError::Unreadable { device, source })
    }
}

/// Reason for which a device model cannot restore a saved state.
#[derive(Debug, thiserror::Error)]
pub enum DeviceStateError {
    /// The state is not a snapshot of this device model, or a newer build wrote it.
    #[error("{device} state: {source}")]
    Unreadable {
        /// Name of the device model.
        device: &'static str,
        /// Reason for which the state cannot be read.
        source: StateError,
    },
    /// A value in the state is invalid, or does not match the host's side of the device.
    #[error("{device} state: {what}")]
    Mismatch {
        /// Name of the device model.
        device: &'static str,
        /// Description of the value.
        what: String,
    },
}
