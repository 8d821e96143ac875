//! Steps of a guest, and what must hold at the end.

use std::sync::Arc;
use std::thread;

use arbitrary::Arbitrary;
use devices::BusDevice;
use devices::virtio::{Device, Interrupt, MmioTransport};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Guest memory.
pub type Memory = Arc<GuestMemoryMmap<AtomicBitmap>>;

/// Size of guest memory in bytes, and start of the memory for buffers. Rings are below it.
pub const MEMORY_BYTES: u64 = 1 << 20;
const DATA: u64 = 0x8_0000;
const QUEUES_MAX: u8 = 3;
const MOVES_MAX: u32 = 4;
/// Number of entries of a queue that is set up correctly.
const ENTRIES: u16 = 16;

/// Device of one kind, and the host's side of it.
pub trait Host {
    /// Creates a device, and the host's side with it.
    fn device(&mut self, interrupt: Interrupt) -> Box<dyn Device<Memory>>;

    /// Lets the host do something that depends on `bytes`.
    fn act(&mut self, bytes: &[u8]) {
        let _nothing = bytes;
    }
}

/// Descriptor. Most addresses are guest memory, and most lengths are small.
#[derive(Arbitrary, Clone, Debug)]
struct Descriptor {
    address: BufferAddress,
    bytes: u16,
    flags: u8,
    next: u8,
}

#[derive(Arbitrary, Clone, Debug)]
enum BufferAddress {
    Data(u16),
    Ring(u16),
    Anywhere(u64, u32),
}

/// Step of a guest.
#[derive(Arbitrary, Clone, Debug)]
enum Step {
    /// Write of a value to a register, given by its number.
    Register(u8, u32),
    /// Write of a small value to a register.
    Small(u8, u8),
    /// Write and read of any width anywhere in the device's range.
    Access(u16, Vec<u8>),
    /// Reset, and a valid start with the given subset of the offered features.
    Start(u64),
    /// Write to the memory for buffers.
    Fill(u16, Vec<u8>),
    /// Write to the rings.
    Scribble(u16, Vec<u8>),
    /// Chain of descriptors, made available.
    Chain(u8, Vec<Descriptor>),
    /// Valid chain: queue, address, and the number of readable and of writable bytes.
    Request(u8, u16, u16, u16),
    Notify(u8),
    Host(Vec<u8>),
    Pause,
    /// Save of the device, and restore as another device.
    Move,
}

/// Guest that consists of features and steps.
#[derive(Arbitrary, Debug)]
pub struct Script {
    features: u64,
    steps: Vec<Step>,
}

struct Guest<'a> {
    device: Option<MmioTransport>,
    memory: Memory,
    host: &'a mut dyn Host,
    available: [u16; QUEUES_MAX as usize],
    descriptors: [u16; QUEUES_MAX as usize],
    moves: u32,
}

impl Script {
    /// Runs the guest with a device of `host`.
    pub fn run(self, host: &mut dyn Host) {
        let memory: Memory = Arc::new(
            GuestMemoryMmap::from_ranges(&[(GuestAddress(0), MEMORY_BYTES as usize)]).unwrap(),
        );
        let interrupt = interrupt();
        let model = host.device(interrupt.clone());
        let device = MmioTransport::new("_fuzz0", model, Arc::clone(&memory), interrupt).unwrap();
        let mut guest = Guest {
            device: Some(device),
            memory,
            host,
            available: [0; QUEUES_MAX as usize],
            descriptors: [0; QUEUES_MAX as usize],
            moves: 0,
        };
        guest.start(self.features);
        for step in self.steps.into_iter().take(64) {
            guest.step(step);
        }
        guest.move_elsewhere();
        guest.set(0x70, 0);
        assert_eq!(guest.get(0x70), 0, "the reset did not clear the status");
        guest.start(0);
        assert_eq!(
            guest.get(0x70) & 15,
            15,
            "the device cannot be used after a reset"
        );
    }
}

fn interrupt() -> Interrupt {
    Interrupt::new(EventFd::new(EFD_NONBLOCK).unwrap())
}

fn ring(queue: usize) -> u64 {
    0x1_0000 * (queue as u64 + 1)
}

impl Guest<'_> {
    fn device(&mut self) -> &mut MmioTransport {
        self.device
            .as_mut()
            .expect("there is a device except during a move")
    }

    fn get(&mut self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.device().read(offset, &mut data);
        u32::from_le_bytes(data)
    }

    fn set(&mut self, offset: u64, value: u32) {
        self.device().write(offset, &value.to_le_bytes());
    }

    fn write(&self, address: u64, data: &[u8]) {
        // Writes outside of guest memory have no effect.
        let _outside = self.memory.write_slice(data, GuestAddress(address));
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Register(number, value) => self.set(u64::from(number % 0x50) * 4, value),
            Step::Small(number, value) => self.set(u64::from(number % 0x50) * 4, value.into()),
            Step::Access(offset, mut data) => {
                data.truncate(8);
                let offset = u64::from(offset % 0x1000);
                self.device().write(offset, &data);
                self.device().read(offset, &mut data);
            }
            Step::Start(features) => self.start(features),
            Step::Fill(offset, data) => self.write(DATA + u64::from(offset), &data),
            Step::Scribble(offset, data) => {
                let queue = usize::from(offset) % usize::from(QUEUES_MAX);
                self.write(ring(queue) + u64::from(offset >> 2), &data);
            }
            Step::Chain(queue, descriptors) => self.chain(queue, &descriptors),
            Step::Request(queue, place, out, room) => self.request(queue, place, out, room),
            Step::Notify(queue) => self.notify(queue % QUEUES_MAX),
            Step::Host(bytes) => {
                self.host.act(&bytes);
                thread::yield_now();
            }
            Step::Pause => {
                self.device().pause();
                self.device().resume();
            }
            // A restore takes as long as many other steps.
            Step::Move if self.moves < MOVES_MAX => self.move_elsewhere(),
            Step::Move => {}
        }
    }

    fn start(&mut self, features: u64) {
        for status in [0, 1, 3] {
            self.set(0x70, status);
        }
        for (select, half) in [(0, features as u32), (1, 1)] {
            self.set(0x14, select);
            let offered = self.get(0x10);
            self.set(0x24, select);
            self.set(0x20, half & offered);
        }
        self.set(0x70, 11);
        if self.get(0x70) & 8 == 0 {
            // The features depend on others that were not accepted.
            self.set(0x24, 0);
            self.set(0x20, 0);
            self.set(0x70, 11);
        }
        for queue in 0..self.device().notifiers().len() {
            let base = ring(queue);
            self.write(base, &[0; 0x3000]);
            self.set(0x30, queue as u32);
            self.set(0x38, ENTRIES.into());
            for (register, address) in [(0x80, base), (0x90, base + 0x1000), (0xa0, base + 0x2000)]
            {
                self.set(register, address as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.available = Default::default();
        self.descriptors = Default::default();
        self.set(0x70, 15);
    }

    fn descriptor(&mut self, queue: usize, address: u64, bytes: u32, flags: u16, next: u16) -> u16 {
        let index = self.descriptors[queue] % ENTRIES;
        self.descriptors[queue] = index + 1;
        let mut raw = address.to_le_bytes().to_vec();
        raw.extend(bytes.to_le_bytes());
        raw.extend(flags.to_le_bytes());
        raw.extend(next.to_le_bytes());
        self.write(ring(queue) + 16 * u64::from(index), &raw);
        index
    }

    fn make_available(&mut self, queue: usize, head: u16) {
        let at = self.available[queue];
        self.available[queue] = at.wrapping_add(1);
        let base = ring(queue) + 0x1000;
        self.write(base + 4 + 2 * u64::from(at % ENTRIES), &head.to_le_bytes());
        self.write(base + 2, &self.available[queue].to_le_bytes());
    }

    fn chain(&mut self, queue: u8, descriptors: &[Descriptor]) {
        let queue = usize::from(queue % QUEUES_MAX);
        let mut head = None;
        for descriptor in descriptors.iter().take(usize::from(ENTRIES)) {
            let (address, bytes) = match descriptor.address {
                BufferAddress::Data(offset) => (DATA + u64::from(offset), descriptor.bytes.into()),
                BufferAddress::Ring(offset) => {
                    (ring(queue) + u64::from(offset), descriptor.bytes.into())
                }
                BufferAddress::Anywhere(address, bytes) => (address, bytes),
            };
            let flags = (descriptor.flags % 8).into();
            let next = (descriptor.next % 20).into();
            let index = self.descriptor(queue, address, bytes, flags, next);
            head.get_or_insert(index);
        }
        self.make_available(queue, head.unwrap_or(u16::MAX));
        self.notify(queue as u8);
    }

    fn request(&mut self, queue: u8, place: u16, out: u16, room: u16) {
        let queue = usize::from(queue % QUEUES_MAX);
        let start = DATA + u64::from(place);
        let next = (self.descriptors[queue] % ENTRIES + 1) % ENTRIES;
        let head = match (out, room) {
            (0, _) => self.descriptor(queue, start, room.into(), 2, 0),
            (_, 0) => self.descriptor(queue, start, out.into(), 0, 0),
            _ => {
                let head = self.descriptor(queue, start, out.into(), 1, next);
                self.descriptor(queue, start + 0x1_0000, room.into(), 2, 0);
                head
            }
        };
        self.make_available(queue, head);
        self.notify(queue as u8);
    }

    /// Notifies the queue, and gives the worker some time.
    fn notify(&mut self, queue: u8) {
        let used = |guest: &Self| -> u16 {
            let at = GuestAddress(ring(usize::from(queue)) + 0x2002);
            guest.memory.read_obj(at).unwrap()
        };
        let before = used(self);
        self.set(0x50, queue.into());
        for _ in 0..20 {
            thread::yield_now();
            if used(self) != before || self.get(0x70) & 64 != 0 {
                break;
            }
        }
    }

    fn move_elsewhere(&mut self) {
        self.moves += 1;
        self.device().pause();
        let saved = self.device().save().expect("the device is paused");
        // The new device may need a resource of this one, for example its socket.
        self.device = None;
        let interrupt = interrupt();
        let model = self.host.device(interrupt.clone());
        let memory = Arc::clone(&self.memory);
        let restored = MmioTransport::restore("_fuzz0", model, memory, interrupt, &saved);
        let device = restored.unwrap_or_else(|error| panic!("{error}, of {saved:?}"));
        let again = device.save().expect("the device is paused");
        assert_eq!(again, saved, "the restored device has another state");
        device.resume();
        self.device = Some(device);
    }
}
