//! One connection of the tests' back end: the vhost-user messages, and a disk that serves one queue.
#![allow(clippy::cast_possible_truncation)]

use std::fs::File;
use std::io::{PipeReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use virtio_queue::{Queue, QueueOwnedT, QueueState, QueueT};
use vm_memory::mmap::MmapRegion;
use vm_memory::{
    Bytes, FileOffset, GuestAddress, GuestMemoryMmap, GuestRegionMmap, VolatileMemory,
};
use vmm_sys_util::sock_ctrl_msg::ScmSocket;

use super::SECTORS;
use super::back_end::*;

/// Flags of a message: a reply is wanted; this is a reply, in protocol version 1.
const NEED_REPLY: u32 = 8;
const REPLY: u32 = 4 | 1;

/// Waits until one of `what` is readable. Returns false if the back end has to end.
pub(super) fn wait(what: &[&dyn std::os::fd::AsFd], told: &PipeReader) -> bool {
    let mut watched: Vec<_> = what
        .iter()
        .map(|fd| PollFd::from_borrowed_fd(fd.as_fd(), PollFlags::IN))
        .collect();
    watched.push(PollFd::new(told, PollFlags::IN));
    poll(&mut watched, None).unwrap();
    watched.last().unwrap().revents().is_empty()
}

fn readable(file: &impl std::os::fd::AsFd) -> bool {
    let mut watched = [PollFd::new(file, PollFlags::IN)];
    let now = Timespec::try_from(Duration::ZERO).unwrap();
    poll(&mut watched, Some(&now)).unwrap() > 0
}

/// Region of the memory table: guest-physical address, size, and address in the front end.
struct Region {
    guest: u64,
    bytes: u64,
    user: u64,
}

/// Connection to the front end, and what it has sent.
pub(super) struct Connection<'a> {
    socket: UnixStream,
    seen: &'a Mutex<Seen>,
    behavior: &'a Mutex<Behavior>,
    regions: Vec<Region>,
    memory: GuestMemoryMmap,
    ring: QueueState,
    started: bool,
    kick: Option<File>,
    call: Option<File>,
    features: u64,
    log_used: bool,
    log: Option<MmapRegion>,
}

fn word(body: &[u8], at: usize) -> u32 {
    u32::from_ne_bytes(body[at..at + 4].try_into().unwrap())
}

fn long(body: &[u8], at: usize) -> u64 {
    u64::from_ne_bytes(body[at..at + 8].try_into().unwrap())
}

impl<'a> Connection<'a> {
    pub(super) fn new(
        socket: UnixStream,
        seen: &'a Mutex<Seen>,
        behavior: &'a Mutex<Behavior>,
    ) -> Self {
        Self {
            socket,
            seen,
            behavior,
            regions: Vec::new(),
            memory: GuestMemoryMmap::new(),
            ring: QueueState {
                max_size: 1024,
                next_avail: 0,
                next_used: 0,
                event_idx_enabled: false,
                size: 0,
                ready: true,
                desc_table: 0,
                avail_ring: 0,
                used_ring: 0,
            },
            started: false,
            kick: None,
            call: None,
            features: 0,
            log_used: false,
            log: None,
        }
    }

    /// Serves the front end and the queue until the connection ends or the back end has to end.
    pub(super) fn serve(&mut self, told: &PipeReader) {
        loop {
            let alive = match (&self.kick, self.started) {
                (Some(kick), true) => wait(&[&self.socket, kick], told),
                _ => wait(&[&self.socket], told),
            };
            if !alive {
                return;
            }
            let kicked = self
                .kick
                .as_ref()
                .filter(|_| self.started)
                .is_some_and(readable);
            if kicked {
                let _taken = self.kick.as_ref().unwrap().read(&mut [0; 8]);
                self.work();
            }
            if readable(&self.socket) && !self.message() {
                return;
            }
        }
    }

    /// Reads one message and replies to it. Returns false at the end of the connection.
    fn message(&mut self) -> bool {
        let mut head = [0; 12];
        let (bytes, file) = match self.socket.recv_with_fd(&mut head) {
            Ok((12, file)) => (word(&head, 8), file),
            _ => return false,
        };
        let (request, flags) = (word(&head, 0), word(&head, 4));
        let mut body = vec![0; bytes as usize];
        self.socket.read_exact(&mut body).unwrap();
        let known = (request, body.clone());
        self.seen.lock().unwrap().requests.push(known);
        let reaction = self
            .behavior
            .lock()
            .unwrap()
            .reactions
            .get(&request)
            .cloned();
        match reaction {
            Some(Reaction::Silent) => true,
            Some(Reaction::Close) => false,
            Some(Reaction::Answer(value)) => self.answer(request, &value.to_ne_bytes()),
            Some(Reaction::Bytes(bytes)) => self.socket.write_all(&bytes).is_ok(),
            None => match self.handle(request, &body, file) {
                Some(answer) => self.answer(request, &answer),
                None if flags & NEED_REPLY != 0 => self.answer(request, &[0; 8]),
                None => true,
            },
        }
    }

    fn answer(&mut self, request: u32, body: &[u8]) -> bool {
        let mut bytes = Vec::new();
        for word in [request, REPLY, body.len() as u32] {
            bytes.extend(word.to_ne_bytes());
        }
        bytes.extend(body);
        self.socket.write_all(&bytes).is_ok()
    }

    fn handle(&mut self, request: u32, body: &[u8], file: Option<File>) -> Option<Vec<u8>> {
        let behavior = self.behavior.lock().unwrap().clone();
        match request {
            GET_FEATURES => return Some(behavior.features.to_ne_bytes().to_vec()),
            GET_PROTOCOL_FEATURES => return Some(behavior.protocol.to_ne_bytes().to_vec()),
            SET_FEATURES => {
                if behavior.logs_late && long(body, 0) & LOG_ALL != 0 {
                    self.work_on();
                }
                self.features = long(body, 0);
            }
            SET_MEM_TABLE => self.map(body, file.unwrap()),
            SET_LOG_BASE => {
                let file = FileOffset::new(file.unwrap(), long(body, 8));
                let log = MmapRegion::from_file(file, long(body, 0) as usize).unwrap();
                self.log = Some(log);
                return Some(vec![0; behavior.log_answer]);
            }
            SET_VRING_NUM => self.ring.size = word(body, 4) as u16,
            SET_VRING_ADDR => self.set_rings(body),
            SET_VRING_BASE => self.ring.next_avail = word(body, 4) as u16,
            GET_VRING_BASE => {
                self.started = false;
                let mut answer = body.to_vec();
                answer[4..].copy_from_slice(&u32::from(self.ring.next_avail).to_ne_bytes());
                return Some(answer);
            }
            SET_VRING_KICK => (self.kick, self.started) = (file, true),
            SET_VRING_CALL => self.call = file,
            GET_CONFIG => {
                let mut answer = body.to_vec();
                answer[12..20].copy_from_slice(&(SECTORS as u64).to_le_bytes());
                answer[12 + 32] = 1;
                return Some(answer);
            }
            _ => {}
        }
        None
    }

    /// Maps guest memory. All regions of the tests' memory are in one file.
    fn map(&mut self, body: &[u8], file: File) {
        let file = Arc::new(file);
        let mut mapped = Vec::new();
        for at in (0..word(body, 0) as usize).map(|index| 8 + index * 32) {
            let region = Region {
                guest: long(body, at),
                bytes: long(body, at + 8),
                user: long(body, at + 16),
            };
            let offset = FileOffset::from_arc(Arc::clone(&file), long(body, at + 24));
            let map = MmapRegion::from_file(offset, region.bytes as usize).unwrap();
            mapped.push(GuestRegionMmap::new(map, GuestAddress(region.guest)).unwrap());
            self.regions.push(region);
        }
        self.memory = GuestMemoryMmap::from_regions(mapped).unwrap();
    }

    fn guest(&self, user: u64) -> u64 {
        let inside = |r: &&Region| (r.user..r.user + r.bytes).contains(&user);
        let region = self
            .regions
            .iter()
            .find(inside)
            .expect("the address is not in the memory table");
        user - region.user + region.guest
    }

    fn set_rings(&mut self, body: &[u8]) {
        self.log_used = word(body, 4) & 1 != 0;
        self.ring.desc_table = self.guest(long(body, 8));
        self.ring.used_ring = self.guest(long(body, 16));
        self.ring.avail_ring = self.guest(long(body, 24));
        assert_eq!(
            long(body, 32),
            self.ring.used_ring,
            "the address for the log"
        );
        let index: u16 = self
            .memory
            .read_obj(GuestAddress(self.ring.used_ring + 2))
            .unwrap();
        self.ring.next_used = index;
    }

    /// Serves the queue with the old features for 200 ms.
    fn work_on(&mut self) {
        for _ in 0..100 {
            thread::sleep(Duration::from_millis(2));
            let notified = self.kick.as_ref().filter(|kick| readable(*kick));
            if let Some(mut kick) = notified {
                let _taken = kick.read(&mut [0; 8]);
                self.work();
            }
        }
    }

    /// Serves the queue as a disk that supports reads (0) and writes (1) only.
    fn work(&mut self) {
        self.ring.event_idx_enabled = self.features & 1 << 29 != 0;
        let mut queue = Queue::try_from(self.ring).unwrap();
        let memory = self.memory.clone();
        loop {
            queue.disable_notification(&memory).unwrap();
            // Like libvhost-user, the back end ignores a broken ring.
            let Ok(chains) = queue.iter(&memory).map(Iterator::collect::<Vec<_>>) else {
                return;
            };
            for chain in chains {
                if self.behavior.lock().unwrap().keeps_requests {
                    continue;
                }
                let head = chain.head_index();
                let parts: Vec<_> = chain.collect();
                let kind: u32 = memory.read_obj(parts[0].addr()).unwrap();
                let sector: u64 = memory
                    .read_obj(GuestAddress(parts[0].addr().0 + 8))
                    .unwrap();
                let mut at = sector as usize * 512;
                let mut written = 1;
                for part in &parts[1..parts.len() - 1] {
                    let bytes = part.len() as usize;
                    let mut seen = self.seen.lock().unwrap();
                    let data = &mut seen.disk[at..at + bytes];
                    if kind == 0 {
                        memory.write_slice(data, part.addr()).unwrap();
                    } else {
                        memory.read_slice(data, part.addr()).unwrap();
                    }
                    drop(seen);
                    if kind == 0 {
                        self.wrote(part.addr().0, bytes as u64);
                        written += part.len();
                    }
                    at += bytes;
                }
                let status = parts.last().unwrap().addr();
                memory.write_obj(0_u8, status).unwrap();
                self.wrote(status.0, 1);
                queue.add_used(&memory, head, written).unwrap();
                if self.log_used {
                    self.wrote(self.ring.used_ring, 6 + 8 * u64::from(self.ring.size));
                }
            }
            if queue.needs_notification(&memory).unwrap() {
                self.call
                    .as_ref()
                    .unwrap()
                    .write_all(&1_u64.to_ne_bytes())
                    .unwrap();
            }
            self.ring = queue.state();
            if !queue.enable_notification(&memory).unwrap() {
                return;
            }
        }
    }

    /// Sets bits of the log byte by byte, and records the pages in `written`.
    fn wrote(&self, start: u64, bytes: u64) {
        let Some(log) = self.log.as_ref().filter(|_| self.features & LOG_ALL != 0) else {
            return;
        };
        for page in start / 4096..=(start + bytes - 1) / 4096 {
            let byte = log.get_atomic_ref::<AtomicU8>(page as usize / 8).unwrap();
            self.seen.lock().unwrap().written.insert(page);
            byte.fetch_or(1 << (page % 8), Ordering::SeqCst);
        }
    }
}
