//! Invalid packets for vsock devices (5.10.6).

use crate::attack::{Attack, Case, Outcome, Targets};
use crate::device::{BUFFER_BYTES, Result, ensure};
use crate::dma::load;
use crate::operation::{Packet, vsock};
use crate::spec::Kind;

/// Number of packets that the device stores for a guest without receive buffers, and number of further packets, which fit
/// into a queue.
const KEPT: u32 = 1024;
const NOT_KEPT: u32 = 128;

const fn attack(
    name: &'static str,
    expected: Outcome,
    run: fn(&mut Case<'_>) -> Result<Outcome>,
) -> Attack {
    Attack {
        name,
        on: Targets::OnlyQueue(Kind::Vsock, 1),
        expected,
        run,
    }
}

pub(super) const ATTACKS: [Attack; 13] = [
    attack("packet-header-too-short", Outcome::NeedsReset, |case| {
        case.start()?;
        let packet = case.device.packet(vsock::REQUEST);
        case.device.send_packet(&packet, vsock::HEADER_BYTES - 1);
        case.verdict()
    }),
    attack("packet-shorter-than-it-says", Outcome::NeedsReset, |case| {
        longer(case, 64, vsock::HEADER_BYTES + 63)
    }),
    attack("packet-of-4-gib-as-it-says", Outcome::NeedsReset, |case| {
        longer(case, u32::MAX, BUFFER_BYTES)
    }),
    attack("operation-none", Outcome::ConnectionReset, |case| {
        reset(case, |packet| packet.op = 0)
    }),
    attack("operation-unknown", Outcome::ConnectionReset, |case| {
        reset(case, |packet| packet.op = u16::MAX)
    }),
    attack("type-of-socket-unknown", Outcome::ConnectionReset, |case| {
        reset(case, |packet| packet.kind = 7)
    }),
    attack(
        "data-without-connection",
        Outcome::ConnectionReset,
        |case| reset(case, |packet| packet.op = vsock::DATA),
    ),
    attack("port-the-largest", Outcome::ConnectionReset, |case| {
        reset(case, |packet| {
            (packet.guest_port, packet.host_port) = (u32::MAX, u32::MAX);
        })
    }),
    attack("packet-of-another-guest", Outcome::Dropped, |case| {
        dropped(case, |packet| packet.source = 77)
    }),
    attack("packet-of-the-host", Outcome::Dropped, |case| {
        dropped(case, |packet| packet.source = vsock::HOST)
    }),
    attack("packet-to-nobody", Outcome::Dropped, |case| {
        dropped(case, |packet| packet.destination = u64::MAX)
    }),
    attack("reset-of-nothing", Outcome::Dropped, |case| {
        dropped(case, |packet| packet.op = vsock::RESET)
    }),
    attack("flood-without-room", Outcome::Served, flood),
];

/// Sends a packet of `bytes` bytes whose header contains the length `len`.
fn longer(case: &mut Case<'_>, len: u32, bytes: u32) -> Result<Outcome> {
    case.start()?;
    let mut packet = case.device.packet(vsock::DATA);
    packet.len = len;
    case.device.send_packet(&packet, bytes);
    case.verdict()
}

/// Sends an invalid packet that the device must answer with a reset.
fn reset(case: &mut Case<'_>, nonsense: fn(&mut Packet)) -> Result<Outcome> {
    case.device.start(None)?;
    let mut packet = case.device.packet(vsock::REQUEST);
    nonsense(&mut packet);
    case.device.expect_reset_of(&packet)?;
    case.lives_on()?;
    Ok(Outcome::ConnectionReset)
}

/// Sends an invalid packet that the device must not answer. The next packet to arrive must answer the next request.
fn dropped(case: &mut Case<'_>, nonsense: fn(&mut Packet)) -> Result<Outcome> {
    case.device.start(None)?;
    let mut packet = case.device.packet(vsock::REQUEST);
    nonsense(&mut packet);
    case.device.send_packet(&packet, vsock::HEADER_BYTES);
    case.device.wait_used(1, 0)?;
    let mut next = case.device.packet(vsock::REQUEST);
    next.host_port -= 1;
    case.device.send_packet(&next, vsock::HEADER_BYTES);
    case.device.wait_used(1, 0)?;
    case.device.receive(|_, _, _| true)?;
    // The first buffer holds the packet that arrived first.
    let port: u32 = load(case.device.receive_buffer(0) + 16);
    ensure(port == next.host_port, "an answer to nobody")?;
    case.lives_on()?;
    Ok(Outcome::Dropped)
}

/// Requests more connections than the device can store answers for, without receive buffers. When the buffers are added,
/// every answer must arrive.
fn flood(case: &mut Case<'_>) -> Result<Outcome> {
    case.device.start(Some(0))?;
    let packet = case.device.packet(vsock::REQUEST);
    for _ in 0..KEPT {
        case.device.send_packet(&packet, vsock::HEADER_BYTES);
        case.device.wait_used(1, 0)?;
    }
    for _ in 0..NOT_KEPT {
        case.device.send_packet(&packet, vsock::HEADER_BYTES);
    }
    case.device.give_receive_buffers();
    for _ in 0..KEPT + NOT_KEPT {
        case.device.receive(|device, number, written| {
            written == vsock::HEADER_BYTES
                && load::<u16>(device.receive_buffer(number) + 30) == vsock::RESET
        })?;
    }
    for _ in 0..NOT_KEPT {
        case.device.wait_used(1, 0)?;
    }
    case.lives_on()?;
    Ok(Outcome::Served)
}
