//! Constants and layouts of the network device (virtio 1.2, 5.1). Section numbers refer to that specification.

use virtio_bindings::virtio_net;

/// Queue indices (5.1.2), named from the driver's point of view.
pub(super) const RECEIVE: usize = 0;
pub(super) const TRANSMIT: usize = 1;
pub(super) const QUEUE_SIZE: u16 = 256;

/// Size of `struct virtio_net_hdr` with `num_buffers` (5.1.6).
pub(super) const HEADER_BYTES: usize = 12;
/// Position of `num_buffers` in the header.
pub(super) const NUM_BUFFERS: std::ops::Range<usize> = 10..12;
/// Size of an Ethernet header.
pub(super) const ETHERNET_BYTES: usize = 14;
/// Size of the largest packet: header, Ethernet header with two VLAN tags, and 64 KiB (5.1.6.3.1).
pub(super) const PACKET_MAX: usize = HEADER_BYTES + ETHERNET_BYTES + 8 + 65_536;

/// Offloads of packets to the guest.
pub(super) const GUEST_CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_CSUM;
pub(super) const GUEST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO4;
pub(super) const GUEST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_GUEST_TSO6;
const CSUM: u64 = 1 << virtio_net::VIRTIO_NET_F_CSUM;
const HOST_TSO4: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO4;
const HOST_TSO6: u64 = 1 << virtio_net::VIRTIO_NET_F_HOST_TSO6;
/// The driver accepts packets that are spread over several buffers.
pub(super) const MERGEABLE: u64 = 1 << virtio_net::VIRTIO_NET_F_MRG_RXBUF;
pub(super) const MTU: u64 = 1 << virtio_net::VIRTIO_NET_F_MTU;
const MAC: u64 = 1 << virtio_net::VIRTIO_NET_F_MAC;
const STATUS: u64 = 1 << virtio_net::VIRTIO_NET_F_STATUS;

/// Feature bits that every network device offers.
pub(super) const FEATURES: u64 =
    CSUM | HOST_TSO4 | HOST_TSO6 | GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | MERGEABLE | MAC | STATUS;

/// Returns whether the dependencies between features hold: segmentation offloads require checksum offloads (5.1.3.1).
pub(super) fn accepts(features: u64) -> bool {
    let sends = features & (HOST_TSO4 | HOST_TSO6) == 0 || features & CSUM != 0;
    let receives = features & (GUEST_TSO4 | GUEST_TSO6) == 0 || features & GUEST_CSUM != 0;
    sends && receives
}

/// VIRTIO_NET_S_LINK_UP (5.1.4).
const LINK_UP: u16 = 1;

/// Returns the configuration space (5.1.4): MAC address, status, number of queue pairs, MTU.
pub(super) fn config(mac: [u8; 6], mtu: u16) -> [u8; 12] {
    let mut space = [0; 12];
    space[..6].copy_from_slice(&mac);
    space[6..8].copy_from_slice(&LINK_UP.to_le_bytes());
    space[8..10].copy_from_slice(&1_u16.to_le_bytes());
    space[10..].copy_from_slice(&mtu.to_le_bytes());
    space
}
