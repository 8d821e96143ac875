//! Back end for the tests, in a thread of this process. It implements the vhost-user messages by itself, so that it
//! shares no code with the front end, and can misbehave at any request.
#![allow(clippy::cast_possible_truncation)]

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
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

/// Numbers of requests in the specification.
pub(super) const GET_FEATURES: u32 = 1;
pub(super) const SET_FEATURES: u32 = 2;
pub(super) const SET_MEM_TABLE: u32 = 5;
pub(super) const SET_LOG_BASE: u32 = 6;
pub(super) const SET_VRING_NUM: u32 = 8;
pub(super) const SET_VRING_ADDR: u32 = 9;
pub(super) const SET_VRING_BASE: u32 = 10;
pub(super) const GET_VRING_BASE: u32 = 11;
pub(super) const SET_VRING_KICK: u32 = 12;
pub(super) const SET_VRING_CALL: u32 = 13;
pub(super) const GET_PROTOCOL_FEATURES: u32 = 15;
pub(super) const SET_PROTOCOL_FEATURES: u32 = 16;
pub(super) const SET_VRING_ENABLE: u32 = 18;
pub(super) const GET_CONFIG: u32 = 24;
pub(super) const SET_CONFIG: u32 = 25;

const NEED_REPLY: u32 = 8;
const REPLY: u32 = 4 | 1;
pub(super) const LOG_ALL: u64 = 1 << 26;
/// VERSION_1, PROTOCOL_FEATURES, LOG_ALL, EVENT_IDX, FLUSH, CONFIG_WCE, and MQ, which the front end does not offer to
/// the driver.
pub(super) const FEATURES: u64 = 1 << 32 | 1 << 30 | LOG_ALL | 1 << 29 | 1 << 9 | 1 << 11 | 1 << 12;
/// VHOST_USER_PROTOCOL_F_REPLY_ACK.
pub(super) const REPLY_ACK: u64 = 1 << 3;
/// CONFIG, REPLY_ACK, LOG_SHMFD, MQ.
pub(super) const PROTOCOL: u64 = 1 << 9 | REPLY_ACK | 1 << 1 | 1;

/// Reaction to a request instead of the correct one.
#[derive(Clone, Debug)]
pub(super) enum Reaction {
    /// The back end does not reply.
    Silent,
    /// The back end closes the connection.
    Close,
    /// The back end replies with this number.
    Answer(u64),
    /// The back end sends these bytes.
    Bytes(Vec<u8>),
}

/// Features and behavior of a back end.
#[derive(Clone, Debug)]
pub(super) struct Behavior {
    pub(super) features: u64,
    pub(super) protocol: u64,
    pub(super) reactions: BTreeMap<u32, Reaction>,
    /// Size of the reply to SET_LOG_BASE: 0 for DPDK, 8 for libvhost-user, 16 for rust-vmm.
    pub(super) log_answer: usize,
    /// Requests are popped but never completed.
    pub(super) keeps_requests: bool,
    /// The queue is served for a while after the request to log, before logging starts, as by a thread of its own.
    pub(super) logs_late: bool,
}

impl Default for Behavior {
    fn default() -> Self {
        Self {
            features: FEATURES,
            protocol: PROTOCOL,
            reactions: BTreeMap::new(),
            log_answer: 8,
            keeps_requests: false,
            logs_late: false,
        }
    }
}

impl Behavior {
    pub(super) fn with(request: u32, reaction: Reaction) -> Self {
        let mut behavior = Self::default();
        behavior.reactions.insert(request, reaction);
        behavior
    }
}

/// State that all connections of a back end share.
#[derive(Debug, Default)]
pub(super) struct Seen {
    /// Received requests with their payloads, in order.
    pub(super) requests: Vec<(u32, Vec<u8>)>,
    /// Pages that the back end wrote while logging was enabled.
    pub(super) written: BTreeSet<u64>,
    pub(super) disk: Vec<u8>,
    pub(super) connections: usize,
}

/// Back end that accepts connections until it is dropped.
pub(super) struct BackEnd {
    folder: tempfile::TempDir,
    pub(super) seen: Arc<Mutex<Seen>>,
    pub(super) behavior: Arc<Mutex<Behavior>>,
    /// Closing the pipe ends the thread.
    stop: Option<PipeWriter>,
    thread: Option<thread::JoinHandle<()>>,
}

impl BackEnd {
    pub(super) fn start(behavior: Behavior) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let listener = UnixListener::bind(folder.path().join("socket")).unwrap();
        let seen = Arc::new(Mutex::new(Seen {
            disk: vec![0; SECTORS * 512],
            ..Seen::default()
        }));
        let behavior = Arc::new(Mutex::new(behavior));
        let (told, stop) = std::io::pipe().unwrap();
        let (all, how) = (Arc::clone(&seen), Arc::clone(&behavior));
        let thread = thread::spawn(move || {
            while wait(&[&listener], &told) {
                let (socket, _) = listener.accept().unwrap();
                all.lock().unwrap().connections += 1;
                Connection::new(socket, &all, &how).serve(&told);
            }
        });
        Self {
            folder,
            seen,
            behavior,
            stop: Some(stop),
            thread: Some(thread),
        }
    }

    pub(super) fn socket(&self) -> PathBuf {
        self.folder.path().join("socket")
    }

    pub(super) fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap()
    }

    /// Returns the payloads of all requests with this number.
    pub(super) fn bodies(&self, request: u32) -> Vec<Vec<u8>> {
        let seen = self.seen();
        let those = seen
            .requests
            .iter()
            .filter(|(number, _)| *number == request);
        those.map(|(_, body)| body.clone()).collect()
    }

    /// Ends the back end, as SIGKILL would.
    pub(super) fn kill(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }
}

impl Drop for BackEnd {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Waits until one of `what` is readable. Returns false if the back end has to end.
fn wait(what: &[&dyn std::os::fd::AsFd], told: &PipeReader) -> bool {
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

struct Region {
    guest: u64,
    bytes: u64,
    user: u64,
}

struct Connection<'a> {
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
    fn new(socket: UnixStream, seen: &'a Mutex<Seen>, behavior: &'a Mutex<Behavior>) -> Self {
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

    fn serve(&mut self, told: &PipeReader) {
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
