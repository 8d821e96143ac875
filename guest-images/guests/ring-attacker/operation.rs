//! One operation of each kind of device, with a check of its result.

use crate::device::{BUFFER_BYTES, Device, RECEIVE_BUFFERS, Result, Trouble, ensure};
use crate::dma::{self, Patience, fill, is_filled, load, load_be16, store, store_be16, write};
use crate::queue::Part;
use crate::spec::Kind;

/// Numbers of the buffers by their contents.
const HEADER: u64 = 0;
const DATA: u64 = 1;
const BACK: u64 = 2;
const GIVEN_PAGE: u64 = 3;

/// Number of sectors that are only read. Their 64-bit words are the number of the sector.
const FIXED_SECTORS: u64 = 8;
/// Number of the following sectors, which this program writes.
const OWN_SECTORS: u64 = 8;
pub(crate) const SECTOR_BYTES: u32 = 512;
/// High bits of the words in written sectors.
const OWN_WORD: u64 = 0x5249_4e47 << 32;

/// Request types of the block device (5.2.6).
pub(crate) mod block {
    pub(crate) const READ: u32 = 0;
    pub(crate) const WRITE: u32 = 1;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
    /// VIRTIO_BLK_S_OK.
    pub(crate) const DONE: u8 = 0;
    pub(crate) const HEADER_BYTES: u32 = 16;
}

/// Sizes of `struct virtio_net_hdr` with `num_buffers` (5.1.6), and of an ARP packet for IPv4 with its Ethernet header
/// (RFC 826).
pub(crate) const NET_HEADER_BYTES: u32 = 12;
const ARP_BYTES: u32 = 14 + 28;
const ARP: u16 = 0x0806;
/// Address of the host in the network, and prefix of the guest's addresses.
const HOST_ADDRESS: [u8; 4] = [10, 99, 0, 1];
const GUEST_PREFIX: [u8; 3] = [10, 99, 0];

/// Fields of `struct virtio_vsock_hdr` (5.10.6) that this program sets.
#[derive(Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) source: u64,
    pub(crate) destination: u64,
    pub(crate) guest_port: u32,
    pub(crate) host_port: u32,
    pub(crate) len: u32,
    pub(crate) kind: u16,
    pub(crate) op: u16,
}

impl Packet {
    /// Writes the header to memory that must be zeroed.
    pub(crate) fn store(&self, at: u64) {
        store(at, self.source);
        store(at + 8, self.destination);
        store(at + 16, self.guest_port);
        store(at + 20, self.host_port);
        store(at + 24, self.len);
        store(at + 28, self.kind);
        store(at + 30, self.op);
    }
}

pub(crate) mod vsock {
    pub(crate) const HEADER_BYTES: u32 = 44;
    pub(crate) const HOST: u64 = 2;
    pub(crate) const STREAM: u16 = 1;
    pub(crate) const REQUEST: u16 = 1;
    pub(crate) const RESET: u16 = 3;
    pub(crate) const DATA: u16 = 5;
    /// First port of those without a listener.
    pub(crate) const DEAF_PORTS: u32 = 1 << 20;
}

impl Device {
    /// Completes one operation and checks its result.
    pub(crate) fn operate(&mut self) -> Result {
        self.operations += 1;
        match self.kind {
            Kind::Block => self.move_sectors(),
            Kind::Rng => self.get_entropy(),
            Kind::Net => self.resolve(),
            Kind::Vsock => self.be_turned_away(),
            Kind::Balloon => self.give_a_page(),
            Kind::Console => self.print(),
        }
    }

    /// Makes a request to the block device. Returns its status.
    pub(crate) fn block_request(&mut self, kind: u32, sector: u64, data: &[Part]) -> Result<u8> {
        let header = self.buffer(HEADER);
        let status_byte = header + 64;
        store(header, kind);
        store(header + 4, 0_u32);
        store(header + 8, sector);
        store(status_byte, 0xff_u8);
        let mut parts = [Part::out(header, block::HEADER_BYTES); 4];
        parts[1..=data.len()].copy_from_slice(data);
        parts[data.len() + 1] = Part::into(status_byte, 1);
        self.request(0, &parts[..data.len() + 2])?;
        Ok(load(status_byte))
    }

    /// Reads a sector with known contents; writes another sector and reads it back.
    fn move_sectors(&mut self) -> Result {
        let (data, back) = (self.buffer(DATA), self.buffer(BACK));
        let turn = u64::from(self.operations);
        let fixed = turn % FIXED_SECTORS;
        fill(back, 0xee, BUFFER_BYTES.into());
        let read = [Part::into(back, SECTOR_BYTES)];
        let status = self.block_request(block::READ, fixed, &read)?;
        ensure(status == block::DONE, "a sector cannot be read")?;
        ensure(holds(back, fixed), "a sector is not what it was")?;

        let own = FIXED_SECTORS + turn % OWN_SECTORS;
        let word = OWN_WORD | turn;
        (0..u64::from(SECTOR_BYTES))
            .step_by(8)
            .for_each(|at| store(data + at, word));
        let written = [Part::out(data, SECTOR_BYTES)];
        let status = self.block_request(block::WRITE, own, &written)?;
        ensure(status == block::DONE, "a sector cannot be written")?;
        let status = self.block_request(block::READ, own, &read)?;
        ensure(
            status == block::DONE && holds(back, word),
            "a sector is not what was written",
        )?;
        let behind = back + u64::from(SECTOR_BYTES);
        ensure(
            is_filled(behind, 0xee, 512),
            "more was read than was asked for",
        )
    }

    /// Requests random bytes.
    fn get_entropy(&mut self) -> Result {
        let data = self.buffer(DATA);
        fill(data, 0, 64);
        let got = self.request(0, &[Part::into(data, 32)])?;
        ensure((1..=32).contains(&got), "as many random bytes as cannot be")?;
        // 16 random bytes are all zeros with a probability of 2^-128.
        ensure(
            got < 16 || !is_filled(data, 0, got.into()),
            "random bytes are all zeros",
        )?;
        ensure(
            is_filled(data + 32, 0, 32),
            "more random bytes than were asked for",
        )
    }

    /// Resolves the address of the host by ARP, each time from another guest address.
    fn resolve(&mut self) -> Result {
        let last = (self.operations % 200 + 10) as u8;
        self.send_question(last);
        self.wait_used(1, 0)?;
        let reply = move |device: &Self, number: u16, written: u32| {
            device.is_answer(device.receive_buffer(number), written, last)
        };
        self.receive(reply)
    }

    /// Sends an ARP request. `last` is the last byte of the guest's address.
    pub(crate) fn send_question(&mut self, last: u8) {
        let packet = self.buffer(HEADER);
        fill(packet, 0, u64::from(NET_HEADER_BYTES + ARP_BYTES));
        let frame = packet + u64::from(NET_HEADER_BYTES);
        self.ethernet(frame, ARP);
        // Ethernet, IPv4, 6 and 4 bytes of address, request.
        write(frame + 14, &[0, 1, 8, 0, 6, 4, 0, 1]);
        self.write_mac(frame + 22);
        write(frame + 28, &GUEST_PREFIX);
        store(frame + 31, last);
        write(frame + 38, &HOST_ADDRESS);
        let part = Part::out(packet, NET_HEADER_BYTES + ARP_BYTES);
        self.queues[1].chain(0, &[part]);
        self.queues[1].publish(0);
        self.notify(1);
    }

    /// Writes an Ethernet header with the broadcast address as destination.
    pub(crate) fn ethernet(&self, frame: u64, kind: u16) {
        fill(frame, 0xff, 6);
        self.write_mac(frame + 6);
        store_be16(frame + 12, kind);
    }

    fn write_mac(&self, at: u64) {
        (0..6).for_each(|index| store(at + index, self.config8(index)));
    }

    /// Returns true if a received packet is the ARP reply to the guest address that ends with `last`.
    fn is_answer(&self, packet: u64, written: u32, last: u8) -> bool {
        let frame = packet + u64::from(NET_HEADER_BYTES);
        let from = frame + 28;
        let to = frame + 38;
        written >= NET_HEADER_BYTES + ARP_BYTES
            && load_be16(frame + 12) == ARP
            && load_be16(frame + 20) == 2
            && (0..4).all(|at| load::<u8>(from + at) == HOST_ADDRESS[at as usize])
            && load::<u8>(to + 3) == last
    }

    /// Receives packets until `wanted` returns true for one, and returns the buffers to the device.
    pub(crate) fn receive(&mut self, wanted: impl Fn(&Self, u16, u32) -> bool) -> Result {
        let mut patience = Patience::new();
        while patience.look() {
            if let Some((id, written)) = self.queues[0].take_used() {
                let number = u16::try_from(id).unwrap_or(u16::MAX);
                ensure(number < RECEIVE_BUFFERS, "a buffer that was never given")?;
                let found = wanted(self, number, written);
                self.give_receive_buffer(number);
                self.notify(0);
                if found {
                    return Ok(());
                }
            }
            if patience.is_due() && self.needs_reset()? {
                return Err(Trouble::Wrong("it needs a reset"));
            }
        }
        Err(Trouble::Silent("no answer arrives"))
    }

    /// Returns a packet from this guest to a port of the host without a listener.
    pub(crate) fn packet(&self, op: u16) -> Packet {
        Packet {
            source: u64::from(self.config32(0)),
            destination: vsock::HOST,
            guest_port: 1024 + self.operations,
            host_port: vsock::DEAF_PORTS + self.operations,
            len: 0,
            kind: vsock::STREAM,
            op,
        }
    }

    /// Sends a packet of `bytes` bytes.
    pub(crate) fn send_packet(&mut self, packet: &Packet, bytes: u32) {
        let at = self.buffer(HEADER);
        fill(at, 0, BUFFER_BYTES.into());
        packet.store(at);
        self.queues[1].chain(0, &[Part::out(at, bytes)]);
        self.queues[1].publish(0);
        self.notify(1);
    }

    /// Sends a packet and waits for the reset that answers it.
    pub(crate) fn expect_reset_of(&mut self, packet: &Packet) -> Result {
        self.send_packet(packet, vsock::HEADER_BYTES);
        self.wait_used(1, 0)?;
        let packet = *packet;
        self.receive(move |device, number, written| {
            let at = device.receive_buffer(number);
            written == vsock::HEADER_BYTES
                && load::<u64>(at) == vsock::HOST
                && load::<u64>(at + 8) == packet.source
                && load::<u32>(at + 16) == packet.host_port
                && load::<u32>(at + 20) == packet.guest_port
                && load::<u16>(at + 30) == vsock::RESET
        })
    }

    /// Requests a connection to a port without a listener and receives a reset.
    fn be_turned_away(&mut self) -> Result {
        let packet = self.packet(vsock::REQUEST);
        self.expect_reset_of(&packet)
    }

    /// Inflates the balloon by a page, which must read as zeros, and deflates it.
    fn give_a_page(&mut self) -> Result {
        let page = self.buffer(GIVEN_PAGE);
        let list = self.buffer(DATA);
        fill(page, 0x5a, BUFFER_BYTES.into());
        store(list, (page / u64::from(BUFFER_BYTES)) as u32);
        self.request(0, &[Part::out(list, 4)])?;
        ensure(
            is_filled(page, 0, BUFFER_BYTES.into()),
            "a page that was given away still holds something",
        )?;
        self.request(1, &[Part::out(list, 4)])?;
        fill(page, 0x5a, BUFFER_BYTES.into());
        ensure(
            is_filled(page, 0x5a, BUFFER_BYTES.into()),
            "a page that was taken back is no memory",
        )
    }

    /// Prints `line NUMBER` on the console. The test that reads the output checks the numbers.
    fn print(&mut self) -> Result {
        let data = self.buffer(DATA);
        write(data, b"line 00000000\n");
        let mut number = self.operations;
        for at in (5..13).rev() {
            store(data + at, b'0' + (number % 10) as u8);
            number /= 10;
        }
        let written = self.request(1, &[Part::out(data, 14)])?;
        ensure(written == 0, "a console wrote into its output")
    }
}

/// Returns true if every word of a sector is `word`.
fn holds(sector: u64, word: u64) -> bool {
    (0..u64::from(SECTOR_BYTES))
        .step_by(8)
        .all(|at| dma::load::<u64>(sector + at) == word)
}
