//! Invalid packets for network devices (5.1.6).

use super::chains::chain;
use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{Result, ensure};
use crate::dma::{fill, scratch, store};
use crate::operation::NET_HEADER_BYTES;
use crate::queue::Part;
use crate::spec::Kind;

const NEEDS_CSUM: u8 = 1;
const GSO_TCPV4: u8 = 1;
const FRAME_BYTES: u32 = 60;

const fn transmit(
    name: &'static str,
    expected: Outcome,
    run: fn(&mut Case<'_>) -> Result<Outcome>,
) -> Attack {
    Attack {
        name,
        on: Targets::OnlyQueue(Kind::Net, 1),
        expected,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 10] = [
    transmit("net-header-too-short", Outcome::NeedsReset, |case| {
        chain(case, &[Part::out(scratch(), NET_HEADER_BYTES - 1)])
    }),
    transmit("net-header-alone", Outcome::Dropped, |case| {
        packet(case, Header::NONE, 0)
    }),
    transmit("frame-too-short", Outcome::Dropped, |case| {
        packet(case, Header::NONE, 13)
    }),
    transmit("frame-too-long", Outcome::Dropped, |case| {
        packet(case, Header::NONE, 65_536 + 14 + 9)
    }),
    transmit("frame-of-a-megabyte", Outcome::Dropped, |case| {
        packet(case, Header::NONE, 1 << 20)
    }),
    transmit("segmentation-unknown", Outcome::Dropped, |case| {
        let header = Header {
            gso_type: 0x7f,
            gso_size: 1,
            ..Header::NONE
        };
        packet(case, header, FRAME_BYTES)
    }),
    transmit("segments-of-no-size", Outcome::Dropped, |case| {
        let header = Header {
            flags: NEEDS_CSUM,
            gso_type: GSO_TCPV4,
            ..Header::NONE
        };
        packet(case, header, FRAME_BYTES)
    }),
    transmit("checksum-outside", Outcome::Dropped, |case| {
        let header = Header {
            flags: NEEDS_CSUM,
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
            ..Header::NONE
        };
        packet(case, header, FRAME_BYTES)
    }),
    transmit("net-header-of-ones", Outcome::Dropped, |case| {
        let header = Header {
            flags: u8::MAX,
            gso_type: u8::MAX,
            header_bytes: u16::MAX,
            gso_size: u16::MAX,
            csum_start: u16::MAX,
            csum_offset: u16::MAX,
        };
        packet(case, header, FRAME_BYTES)
    }),
    Attack {
        name: "receive-buffer-too-small",
        on: Targets::OnlyQueue(Kind::Net, 0),
        expected: Outcome::Dropped,
        run: small_buffer,
    },
];

/// `struct virtio_net_hdr`.
#[derive(Clone, Copy)]
struct Header {
    flags: u8,
    gso_type: u8,
    header_bytes: u16,
    gso_size: u16,
    csum_start: u16,
    csum_offset: u16,
}

impl Header {
    const NONE: Self = Self {
        flags: 0,
        gso_type: 0,
        header_bytes: 0,
        gso_size: 0,
        csum_start: 0,
        csum_offset: 0,
    };
}

/// Sends a packet that the device must drop. It must send later packets.
fn packet(case: &mut Case<'_>, header: Header, frame_bytes: u32) -> Result<Outcome> {
    case.device.start(None)?;
    let at = scratch();
    fill(at, 0, u64::from(NET_HEADER_BYTES) + 64);
    store(at, header.flags);
    store(at + 1, header.gso_type);
    store(at + 2, header.header_bytes);
    store(at + 4, header.gso_size);
    store(at + 6, header.csum_start);
    store(at + 8, header.csum_offset);
    case.device
        .ethernet(at + u64::from(NET_HEADER_BYTES), 0x88b5);
    let whole = Part::out(at, NET_HEADER_BYTES + frame_bytes);
    let written = case.device.request(1, &[whole])?;
    ensure(written == 0, "it wrote into a packet to send")?;
    case.lives_on()?;
    Ok(Outcome::Dropped)
}

/// Adds a receive buffer of one byte. The device must drop the packet that arrives and keep the buffer.
fn small_buffer(case: &mut Case<'_>) -> Result<Outcome> {
    case.start()?;
    case.device.queues[0].chain(0, &[Part::into(scratch(), 1)]);
    case.device.queues[0].publish(0);
    case.device.notify(0);
    case.device.send_question(3);
    case.device.wait_used(1, 0)?;
    case.device.runs()?;
    let used = case.device.queues[0].take_used();
    ensure(used.is_none(), "a packet in a buffer of one byte")?;
    Ok(Outcome::Dropped)
}
