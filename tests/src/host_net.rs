//! Host side of the network and the vsock of a guest in the lab: tap devices, bridges, and traffic through them.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};
use std::{fs, io};

use crate::linux_shell::SHELL_LIMIT;
use crate::process;

/// Runs a shell command on the lab host. It must succeed.
///
/// # Panics
/// Panics if it fails.
pub fn host(command: &str) {
    let mut shell = Command::new("sh");
    let done = process::run(shell.args(["-c", command]), SHELL_LIMIT).unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
}

/// Tap device of the lab host. Dropping it removes the device.
#[derive(Debug)]
pub struct HostTap(&'static str);

impl HostTap {
    /// Creates a tap device, gives it an address and brings it up.
    ///
    /// # Panics
    /// Panics if the device cannot be created.
    #[must_use]
    pub fn with_address(name: &'static str, address: &str) -> Self {
        let tap = Self::new(name);
        host(&format!("ip addr add {address} dev {name}"));
        tap
    }

    fn new(name: &'static str) -> Self {
        host(&format!("tunctl -t {name} && ip link set {name} up"));
        Self(name)
    }

    /// Returns a counter of the device, such as `rx_packets` for packets that the guest sent.
    ///
    /// # Panics
    /// Panics if the kernel has no such counter.
    #[must_use]
    pub fn counted(&self, counter: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{counter}", self.0);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        // Removing a device that does not exist any more fails, which is harmless.
        let _gone = Command::new("tunctl").args(["-d", self.0]).output();
    }
}

/// Bridge of the lab host, which connects the tap devices of two monitors. Dropping it removes the bridge.
#[derive(Debug)]
pub struct Bridge {
    name: &'static str,
    _taps: Vec<HostTap>,
}

impl Bridge {
    /// Creates a bridge with these taps, gives it an address and brings it up.
    ///
    /// # Panics
    /// Panics if the device cannot be created.
    #[must_use]
    pub fn new(name: &'static str, address: &str, taps: &[&'static str]) -> Self {
        host(&format!(
            "brctl addbr {name} && ip addr add {address} dev {name} && ip link set {name} up"
        ));
        let taps = taps.iter().map(|tap| {
            let made = HostTap::new(tap);
            host(&format!("brctl addif {name} {tap}"));
            made
        });
        Self {
            name,
            _taps: taps.collect(),
        }
    }
}

impl Drop for Bridge {
    fn drop(&mut self) {
        let down = format!("ip link set {0} down; brctl delbr {0}", self.name);
        let _gone = Command::new("sh").args(["-c", &down]).output();
    }
}

/// Connects to a vsock port of the guest by the protocol of Firecracker and Cloud Hypervisor.
///
/// # Panics
/// Panics if no process in the guest listens on the port.
#[must_use]
pub fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = String::new();
    // Reads byte by byte, so that no data of the guest is consumed after the answer.
    BufReader::with_capacity(1, stream.try_clone().unwrap())
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
}

/// Returns pseudo-random bytes for a transfer.
#[must_use]
pub fn pattern(bytes: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let mut pattern = Vec::with_capacity(bytes + 8);
    while pattern.len() < bytes {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        pattern.extend_from_slice(&state.to_le_bytes());
    }
    pattern.truncate(bytes);
    pattern
}

/// Sends `bytes` and reads the same number of bytes back at the same time.
///
/// # Panics
/// Panics if the bytes that come back differ or do not arrive.
pub fn echoes(mut writer: impl Write + Send + 'static, mut reader: impl Read, bytes: &[u8]) {
    let outgoing = bytes.to_vec();
    let sender = thread::spawn(move || writer.write_all(&outgoing));
    let mut back = vec![0; bytes.len()];
    reader.read_exact(&mut back).unwrap();
    sender.join().unwrap().unwrap();
    let wrong = back.iter().zip(bytes).position(|(one, other)| one != other);
    assert_eq!(wrong, None, "the first byte that came back as another");
}

/// Client that sends messages over one connection, one after the other, and waits for the echo of each.
#[derive(Debug)]
pub struct Conversation {
    echoed: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    speaker: JoinHandle<io::Result<()>>,
}

impl Conversation {
    /// Starts the client on a thread of its own.
    pub fn over(mut stream: impl Read + Write + Send + 'static) -> Self {
        let echoed = Arc::new(AtomicU64::new(0));
        let over = Arc::new(AtomicBool::new(false));
        let (count, end) = (Arc::clone(&echoed), Arc::clone(&over));
        let speaker = thread::spawn(move || {
            while !end.load(Ordering::SeqCst) {
                let said = count.load(Ordering::SeqCst).to_le_bytes();
                stream.write_all(&said)?;
                let mut heard = [0; 8];
                stream.read_exact(&mut heard)?;
                if heard != said {
                    return Err(io::Error::other(format!("{said:?} came back as {heard:?}")));
                }
                count.fetch_add(1, Ordering::SeqCst);
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        });
        Self {
            echoed,
            over,
            speaker,
        }
    }

    /// Waits until another echo arrives.
    ///
    /// # Panics
    /// Panics if none arrives in time.
    pub fn goes_on(&self) {
        let before = self.echoed.load(Ordering::SeqCst);
        let deadline = Instant::now() + SHELL_LIMIT;
        while self.echoed.load(Ordering::SeqCst) < before + 10 {
            assert!(
                !self.speaker.is_finished(),
                "it broke off after {before} echoes"
            );
            assert!(Instant::now() < deadline, "silence after {before} echoes");
            thread::sleep(Duration::from_millis(10));
        }
    }

    /// Stops the client.
    ///
    /// # Panics
    /// Panics if the connection broke or an echo differed.
    pub fn ends(self) {
        self.over.store(true, Ordering::SeqCst);
        self.speaker.join().unwrap().unwrap();
    }
}
