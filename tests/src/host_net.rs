//! The host's side of a guest's network and sockets, in the lab: taps, bridges, and who talks through them.

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

/// Runs a command of the lab host, which must succeed.
///
/// # Panics
/// It does not.
pub fn host(command: &str) {
    let mut shell = Command::new("sh");
    let done = process::run(shell.args(["-c", command]), SHELL_LIMIT).unwrap();
    assert!(done.status.success(), "{command}: {done:?}");
}

/// A tap of the lab host, removed at the end.
#[derive(Debug)]
pub struct HostTap(&'static str);

impl HostTap {
    /// A tap that is up and has an address.
    ///
    /// # Panics
    /// It cannot be made.
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

    /// What the kernel counted of it, such as `rx_packets`: what the guest sent.
    ///
    /// # Panics
    /// There is no such counter.
    #[must_use]
    pub fn counted(&self, counter: &str) -> u64 {
        let path = format!("/sys/class/net/{}/statistics/{counter}", self.0);
        fs::read_to_string(path).unwrap().trim().parse().unwrap()
    }
}

impl Drop for HostTap {
    fn drop(&mut self) {
        // One that is gone already is no matter.
        let _gone = Command::new("tunctl").args(["-d", self.0]).output();
    }
}

/// A bridge of the lab host with taps in it: the switch of two monitors. Removed at the end.
#[derive(Debug)]
pub struct Bridge {
    name: &'static str,
    _taps: Vec<HostTap>,
}

impl Bridge {
    /// A bridge that is up, has an address, and these taps.
    ///
    /// # Panics
    /// It cannot be made.
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

/// Connects to a vsock port of the guest, as Firecracker's and Cloud Hypervisor's users do.
///
/// # Panics
/// Nobody listens there.
#[must_use]
pub fn connect(socket: &Path, port: u32) -> UnixStream {
    let mut stream = UnixStream::connect(socket).unwrap();
    writeln!(stream, "CONNECT {port}").unwrap();
    let mut answer = String::new();
    // The answer ends before anything that the guest sends.
    BufReader::with_capacity(1, stream.try_clone().unwrap())
        .read_line(&mut answer)
        .unwrap();
    assert!(answer.starts_with("OK "), "{answer:?}");
    stream
}

/// Bytes that do not repeat within a transfer.
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

/// Sends all of `bytes` and reads as much back, at the same time.
///
/// # Panics
/// Something else comes back, or nothing.
pub fn echoes(mut writer: impl Write + Send + 'static, mut reader: impl Read, bytes: &[u8]) {
    let outgoing = bytes.to_vec();
    let sender = thread::spawn(move || writer.write_all(&outgoing));
    let mut back = vec![0; bytes.len()];
    reader.read_exact(&mut back).unwrap();
    sender.join().unwrap().unwrap();
    let wrong = back.iter().zip(bytes).position(|(one, other)| one != other);
    assert_eq!(wrong, None, "the first byte that came back as another");
}

/// Somebody who says one thing after the other over one connection, and listens to each echo.
#[derive(Debug)]
pub struct Conversation {
    echoed: Arc<AtomicU64>,
    over: Arc<AtomicBool>,
    speaker: JoinHandle<io::Result<()>>,
}

impl Conversation {
    /// Begins it.
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

    /// Waits until more is heard from now on.
    ///
    /// # Panics
    /// It is not.
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

    /// Ends it.
    ///
    /// # Panics
    /// It broke off, or something else came back.
    pub fn ends(self) {
        self.over.store(true, Ordering::SeqCst);
        self.speaker.join().unwrap().unwrap();
    }
}
