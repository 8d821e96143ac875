//! Back end for the tests, in a thread of this process. It shares no code with the front end, and can misbehave at any
//! request.

use std::collections::{BTreeMap, BTreeSet};
use std::io::PipeWriter;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread;

use super::SECTORS;
use super::connection::{Connection, wait};

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
