//! A network device and its driver. A pair of datagram sockets replaces the tap, because they preserve packet
//! boundaries, too.

use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixDatagram;
use std::sync::mpsc;
use std::time::Duration;

use super::super::testing::*;
use super::super::{DeviceState, MmioTransport};
use super::*;
use crate::rate_limit::Rate;

const MAC: [u8; 6] = [0x52, 0x54, 0, 1, 2, 3];

struct Pair {
    socket: UnixDatagram,
    offloads: mpsc::Sender<Offloads>,
}

impl AsRawFd for Pair {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl Tap for Pair {
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.socket.recv(packet)
    }
    fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.socket.send(packet).map(|_| ())
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        if offloads.tso6 && !offloads.tso4 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        self.offloads.send(offloads).map_err(io::Error::other)
    }
}

/// Host's end of the tap.
struct Host {
    socket: UnixDatagram,
    offloads: mpsc::Receiver<Offloads>,
}

impl Host {
    fn receive(&self) -> Vec<u8> {
        let mut packet = vec![0; PACKET_MAX];
        let len = self.socket.recv(&mut packet).unwrap();
        packet.truncate(len);
        packet
    }
    fn is_quiet(&self) -> bool {
        self.socket.set_nonblocking(true).unwrap();
        let quiet = self.socket.recv(&mut [0; 100]).is_err();
        self.socket.set_nonblocking(false).unwrap();
        quiet
    }
}

fn interface(limit: RateLimit) -> (Net, Host) {
    let (near, far) = UnixDatagram::pair().unwrap();
    near.set_nonblocking(true).unwrap();
    far.set_read_timeout(Some(Duration::from_secs(20))).unwrap();
    let (sender, offloads) = mpsc::channel();
    let net = Net::new(NetOptions {
        tap: Box::new(Pair {
            socket: near,
            offloads: sender,
        }),
        mac: MAC,
        mtu: Some(1400),
        receive_limit: limit,
        transmit_limit: limit,
    })
    .unwrap();
    let socket = far;
    (net, Host { socket, offloads })
}

fn started(features: u64) -> (Driver, Host) {
    let (net, host) = interface(RateLimit::default());
    let mut driver = Driver::new(|_| Box::new(net));
    driver.start(features);
    (driver, host)
}

/// Returns a packet with its header. The content depends on `mark`.
fn packet(bytes: usize, mark: u8) -> Vec<u8> {
    let mut packet = vec![0; HEADER_BYTES];
    packet.extend((0..=250).cycle().take(bytes).map(|n: u8| n ^ mark));
    packet
}

#[test]
fn it_says_what_it_is() {
    let (mut driver, _host) = started(0);
    assert_eq!(driver.get(8), 1);
    assert_eq!(
        driver.config::<12>(0),
        [0x52, 0x54, 0, 1, 2, 3, 1, 0, 1, 0, 0x78, 5]
    );
    // Neither UFO (in either direction) nor a control queue is offered.
    assert_eq!(driver.offered() & (1 << 10 | 1 << 14 | 1 << 17), 0);
    for (bad, good) in [
        (1 << 11, 1 << 11 | 1),
        (1 << 12, 1 << 12 | 1),
        (1 << 7, 1 << 7 | 2),
        (1 << 8 | 1, 1 << 8 | 2),
    ] {
        assert!(!driver.negotiate(VERSION_1 | bad));
        assert!(driver.negotiate(VERSION_1 | good));
    }
}

#[test]
fn packets_go_out_whole() {
    for features in [0, EVENT_INDEX] {
        let (mut driver, host) = started(features);
        for (mark, bytes) in (1..).zip([14, 60, 1514, 9000, 65_549]) {
            let sent = packet(bytes, mark);
            driver.write_memory(DATA, &sent);
            let len = u32::try_from(sent.len()).unwrap();
            let parts = [
                Part::Out(DATA, 12),
                Part::Out(DATA + 12, 1),
                Part::Out(DATA + 13, len - 13),
            ];
            assert_eq!(driver.request(1, &parts), 0);
            assert_eq!(host.receive(), sent);
        }
        let counters = driver.device.counters();
        assert!(counters.contains(&("tx_frames", 5)) && counters.contains(&("tx_bytes", 76_137)));
    }
}

#[test]
fn packets_that_cannot_be_are_dropped_or_need_a_reset() {
    let (mut driver, host) = started(0);
    let too_long = u32::try_from(PACKET_MAX + 1).unwrap();
    for len in [12, 25, too_long] {
        driver.request(1, &[Part::Out(DATA, len)]);
    }
    assert!(host.is_quiet());
    assert!(driver.device.counters().contains(&("tx_dropped", 3)));
    for parts in [
        vec![Part::Out(DATA, 11)],
        vec![Part::In(DATA, 60)],
        vec![Part::Out(DATA, 60), Part::In(DATA, 1)],
    ] {
        driver.add(1, &parts);
        driver.notify(1);
        driver.wait_needs_reset();
        driver.start(0);
    }
    driver.request(1, &[Part::Out(DATA, 60)]);
    assert_eq!(host.receive().len(), 60);
    host.socket.send(&packet(60, 0)).unwrap();
    driver.add(0, &[Part::Out(DATA, 60), Part::In(DATA, 100)]);
    driver.notify(0);
    driver.wait_needs_reset();
}

#[test]
fn packets_come_in_to_buffers_of_their_own() {
    let (mut driver, host) = started(EVENT_INDEX);
    for round in 0..40_u8 {
        // In even rounds, the packet arrives before the buffer; in odd rounds, after it.
        let sent = packet(60 + usize::from(round), round);
        if round % 2 == 0 {
            host.socket.send(&sent).unwrap();
        }
        driver.add(0, &[Part::In(DATA, 12), Part::In(DATA + 0x1000, 1600)]);
        driver.notify(0);
        if round % 2 == 1 {
            host.socket.send(&sent).unwrap();
        }
        let (_, written) = driver.wait_used(0);
        assert_eq!(written as usize, sent.len());
        let mut expected = sent.clone();
        expected[10] = 1;
        let mut seen = driver.read_memory(DATA, 12);
        seen.extend(driver.read_memory(DATA + 0x1000, sent.len() - 12));
        assert_eq!(seen, expected);
    }
    assert!(driver.device.counters().contains(&("rx_frames", 40)));
}

#[test]
fn a_packet_larger_than_its_buffer_is_dropped_and_the_buffer_kept() {
    let (mut driver, host) = started(0);
    driver.add(0, &[Part::In(DATA, 100)]);
    driver.notify(0);
    host.socket.send(&packet(1000, 1)).unwrap();
    host.socket.send(&packet(2, 1)).unwrap();
    host.socket.send(&packet(60, 2)).unwrap();
    assert_eq!(driver.wait_used(0).1, 72);
    assert_eq!(driver.read_memory(DATA + 12, 60), packet(60, 2)[12..]);
    assert!(driver.device.counters().contains(&("rx_dropped", 2)));
}

#[test]
fn a_large_packet_is_spread_over_mergeable_buffers() {
    for features in [spec::MERGEABLE, spec::MERGEABLE | EVENT_INDEX] {
        let (mut driver, host) = started(features);
        // The guest adds one buffer at a time.
        let sent = packet(5000, 9);
        host.socket.send(&sent).unwrap();
        let mut heads = Vec::new();
        for buffer in 0..6 {
            if buffer < 5 {
                assert_eq!(driver.used(0), None);
            }
            heads.push(driver.add(0, &[Part::In(DATA + buffer * 0x1000, 1024)]));
            driver.notify(0);
        }
        let mut seen = Vec::new();
        for (buffer, head) in (0..).zip(&heads[..5]) {
            let (used, written) = driver.wait_used(0);
            assert_eq!(
                (used, written),
                (*head, if buffer == 4 { 916 } else { 1024 })
            );
            seen.extend(driver.read_memory(DATA + buffer * 0x1000, written as usize));
        }
        let mut expected = sent;
        expected[10] = 5;
        assert_eq!(seen, expected);
        // The sixth buffer is left for the next packet.
        host.socket.send(&packet(60, 1)).unwrap();
        assert_eq!(driver.wait_used(0), (heads[5], 72));
    }
}

/// Linux drops a packet if it sees its first buffer used but not its last.
#[test]
fn a_spread_packet_is_seen_whole_or_not_at_all() {
    const PACKETS: u16 = 5000;
    const BUFFERS: u16 = 4;
    let (mut driver, host) = started(spec::MERGEABLE | EVENT_INDEX);
    let index = driver.used_index_of(0);
    let (begins, begun) = mpsc::channel();
    let watcher = std::thread::spawn(move || {
        let mut parts = 0;
        begins.send(()).unwrap();
        loop {
            match index() {
                index if index == PACKETS * BUFFERS => return parts,
                index if !index.is_multiple_of(BUFFERS) => parts += 1,
                _ => {}
            }
        }
    });
    begun.recv().unwrap();
    for _ in 0..PACKETS {
        for buffer in 0..u64::from(BUFFERS) {
            driver.add(0, &[Part::In(DATA + buffer * 0x1000, 1024)]);
        }
        driver.notify(0);
        host.socket.send(&packet(4000, 1)).unwrap();
        for _ in 0..BUFFERS {
            driver.wait_used(0);
        }
    }
    assert_eq!(watcher.join().unwrap(), 0);
}

/// The driver notifies the device only if the event index asks for it, as Linux does.
#[test]
fn a_driver_is_asked_to_notify_of_every_bit_of_room() {
    let (mut driver, host) = started(spec::MERGEABLE | EVENT_INDEX);
    host.socket.send(&packet(2000, 9)).unwrap();
    for buffer in 0..3 {
        let avail_event = driver.rings[0].used() + 4 + 8 * 16;
        driver.wait_until("the wish to be notified", |driver| {
            driver.read_memory(avail_event, 2) == [buffer, 0]
        });
        driver.add(0, &[Part::In(DATA + u64::from(buffer) * 0x1000, 800)]);
        driver.notify(0);
    }
    assert_eq!(driver.wait_used(0).1, 800);
    assert_eq!(driver.wait_used(0).1, 800);
    assert_eq!(driver.wait_used(0).1, 412);
}

#[test]
fn a_packet_that_no_queue_holds_is_dropped() {
    let (mut driver, host) = started(spec::MERGEABLE);
    for _ in 0..16 {
        driver.add(0, &[Part::In(DATA, 100)]);
    }
    driver.notify(0);
    host.socket.send(&packet(2000, 9)).unwrap();
    host.socket.send(&packet(60, 9)).unwrap();
    assert_eq!(driver.wait_used(0).1, 72);
    assert!(driver.device.counters().contains(&("rx_dropped", 1)));
}

#[test]
fn the_tap_is_told_what_the_guest_takes() {
    let (mut driver, host) = started(2 | 1 << 7 | 1 << 8);
    let all = Offloads {
        checksum: true,
        tso4: true,
        tso6: true,
    };
    let patience = Duration::from_secs(20);
    assert_eq!(host.offloads.recv_timeout(patience), Ok(all));
    driver.start(2);
    let checksum = Offloads {
        checksum: true,
        ..Offloads::default()
    };
    assert_eq!(host.offloads.recv_timeout(patience), Ok(checksum));
    // If the tap refuses the offloads, the device cannot work, although the driver did nothing wrong.
    driver.negotiate(VERSION_1 | 2 | 1 << 8);
    driver.set_up_queue(0, 16);
    driver.set(0x70, RUNNING);
    driver.wait_needs_reset();
    assert!(driver.device.failure().unwrap().contains("TUNSETOFFLOAD"));
}

#[test]
fn limits_delay_packets_and_lose_none() {
    let rate = Some(Rate {
        per_second: 2000,
        burst: 1,
    });
    let (net, host) = interface(RateLimit {
        bytes: None,
        operations: rate,
    });
    let mut driver = Driver::new(|_| Box::new(net));
    driver.start(0);
    for mark in 0..30 {
        let sent = packet(60, mark);
        driver.write_memory(DATA, &sent);
        driver.add(0, &[Part::In(DATA + 0x1000, 1600)]);
        driver.notify(0);
        host.socket.send(&sent).unwrap();
        driver.request(1, &[Part::Out(DATA, 72)]);
        assert_eq!(host.receive(), sent);
        assert_eq!(driver.wait_used(0).1, 72);
        assert_eq!(driver.read_memory(DATA + 0x1000 + 12, 60), sent[12..]);
    }
}

#[test]
fn a_tap_without_room_is_waited_for() {
    let (mut driver, host) = started(0);
    // Together, the packets are larger than the socket's buffer.
    let mut queued = 0;
    let len = 12 + 60_000;
    for mark in 0..16_u8 {
        driver.write_memory(DATA + 0x1_0000 * u64::from(mark), &packet(60_000, mark));
        driver.add(1, &[Part::Out(DATA + 0x1_0000 * u64::from(mark), len)]);
        queued += 1;
    }
    driver.notify(1);
    for mark in 0..queued {
        assert_eq!(host.receive(), packet(60_000, mark));
    }
    for _ in 0..queued {
        driver.wait_used(1);
    }
    assert!(driver.device.counters().contains(&("tx_dropped", 0)));
}

fn net_state(driver: &Driver) -> NetSnapshot {
    let saved = driver.device.save().unwrap();
    saved.device.decode("net").unwrap()
}

#[test]
fn a_guest_moves_with_its_waiting_packet_and_says_so() {
    let (mut driver, host) = started(0);
    host.socket.send(&packet(60, 3)).unwrap();
    // The device reads the tap when it handles an event.
    driver.request(1, &[Part::Out(DATA, 60)]);
    host.receive();
    driver.device.pause();
    driver.device.resume();
    driver.notify(0);
    driver.wait_until("the packet", |driver| {
        driver.device.pause();
        let state = net_state(driver);
        driver.device.resume();
        !state.waiting_packet.is_empty()
    });
    driver.device.pause();
    let mut saved = driver.device.save().unwrap();
    let mut state = net_state(&driver);
    assert_eq!(state.waiting_packet, packet(60, 3));
    state.mac[5] = 9;
    saved.device = DeviceState::new(&state);
    let (net, host) = interface(RateLimit::default());
    let mut driver = driver.moved(&saved, |_| Box::new(net));
    assert!(host.is_quiet());
    driver.device.resume();
    assert_eq!(driver.config::<6>(0)[5], 9);
    let announced = host.receive();
    assert_eq!(announced.len(), 72);
    assert_eq!(
        announced[12..26],
        [
            255, 255, 255, 255, 255, 255, 0x52, 0x54, 0, 1, 2, 9, 0x80, 0x35
        ]
    );
    driver.add(0, &[Part::In(DATA, 1600)]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0).1, 72);
    assert_eq!(driver.read_memory(DATA + 12, 60), packet(60, 3)[12..]);

    for len in [1, HEADER_BYTES - 1, PACKET_MAX + 1] {
        let mut broken = saved.clone();
        broken.device = DeviceState::new(&NetSnapshot {
            mac: MAC,
            waiting_packet: vec![0; len],
        });
        let (net, _host) = interface(RateLimit::default());
        let (interrupt, _line) = interrupt();
        let result = MmioTransport::restore("_net0", Box::new(net), memory(), interrupt, &broken);
        assert!(result.err().unwrap().to_string().contains("waiting packet"));
    }
}

#[test]
fn a_reset_forgets_the_packet_on_its_way() {
    let (mut driver, host) = started(0);
    host.socket.send(&packet(60, 3)).unwrap();
    driver.wait_until("the packet", |driver| {
        driver.notify(0);
        driver.device.pause();
        let state = net_state(driver);
        driver.device.resume();
        !state.waiting_packet.is_empty()
    });
    driver.start(0);
    host.socket.send(&packet(61, 4)).unwrap();
    driver.add(0, &[Part::In(DATA, 1600)]);
    driver.notify(0);
    assert_eq!(driver.wait_used(0).1, 73);
}
