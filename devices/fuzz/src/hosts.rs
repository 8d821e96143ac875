//! Host's side of each kind of device.

use std::fs::File;
use std::io::{self, Write};
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use devices::virtio::{self, Access, Device, Interrupt, Offloads, Tap};
use devices::{Rate, RateLimit};
use rustix::fs::{MemfdFlags, memfd_create};

use crate::script::{Host, MEMORY_BYTES, Memory};

fn fast() -> RateLimit {
    let rate = Rate {
        per_second: 10_000_000,
        burst: 100_000,
    };
    RateLimit {
        bytes: Some(rate),
        operations: Some(rate),
    }
}

/// Asserts that the discarded ranges are what [`virtio::Discard`] promises.
struct Checked;

impl virtio::Discard for Checked {
    fn discard(&mut self, ranges: &[Range<u64>], _: &dyn Fn() -> bool) -> io::Result<()> {
        let mut end = None;
        for range in ranges {
            assert!(
                range.start < range.end && range.end <= MEMORY_BYTES,
                "{range:?}"
            );
            assert_eq!((range.start % 4096, range.end % 4096), (0, 0), "{range:?}");
            assert!(end.is_none_or(|end| range.start > end), "{ranges:?}");
            end = Some(range.end);
        }
        Ok(())
    }
}

/// Balloon. The host changes its target.
#[derive(Default)]
pub struct Balloon {
    control: Option<virtio::BalloonControl>,
}

impl Host for Balloon {
    fn device(&mut self, interrupt: Interrupt) -> Box<dyn Device<Memory>> {
        let config = virtio::BalloonOptions {
            target_pages: 16,
            deflate_on_oom: true,
            free_page_reporting: true,
        };
        let (balloon, control) = virtio::Balloon::new(config, Box::new(Checked), interrupt);
        self.control = Some(control);
        Box::new(balloon)
    }

    fn act(&mut self, bytes: &[u8]) {
        if let (Some(control), Some(byte)) = (&self.control, bytes.first()) {
            control.set_target((*byte).into());
        }
    }
}

/// Disk in memory, of 64 KiB and half a sector.
#[derive(Default)]
pub struct Block;

impl Host for Block {
    fn device(&mut self, _: Interrupt) -> Box<dyn Device<Memory>> {
        let file = File::from(memfd_create("disk", MemfdFlags::CLOEXEC).unwrap());
        file.set_len(65_536 + 256).unwrap();
        let config = virtio::BlockOptions {
            file,
            access: Access::ReadWrite,
            id: "fuzz".into(),
            rate_limit: fast(),
        };
        Box::new(virtio::Block::new(config).unwrap())
    }
}

/// Console. The host sends input.
#[derive(Default)]
pub struct Console {
    input: Option<virtio::ConsoleInput>,
}

impl Host for Console {
    fn device(&mut self, _: Interrupt) -> Box<dyn Device<Memory>> {
        let (console, input) = virtio::Console::new(Box::new(io::sink())).unwrap();
        self.input = Some(input);
        Box::new(console)
    }

    fn act(&mut self, bytes: &[u8]) {
        if let Some(input) = &self.input {
            input.input(bytes);
        }
    }
}

struct Pair(UnixDatagram);

impl AsRawFd for Pair {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
}

impl Tap for Pair {
    fn receive(&self, packet: &mut [u8]) -> io::Result<usize> {
        self.0.recv(packet)
    }
    fn send(&self, packet: &[u8]) -> io::Result<()> {
        self.0.send(packet).map(|_| ())
    }
    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Ok(())
    }
}

/// Network device. The host sends packets, and does not always receive.
#[derive(Default)]
pub struct Net {
    far: Option<UnixDatagram>,
}

impl Host for Net {
    fn device(&mut self, _: Interrupt) -> Box<dyn Device<Memory>> {
        let (near, far) = UnixDatagram::pair().unwrap();
        near.set_nonblocking(true).unwrap();
        far.set_nonblocking(true).unwrap();
        self.far = Some(far);
        let config = virtio::NetOptions {
            tap: Box::new(Pair(near)),
            mac: [2, 0, 0, 0, 0, 1],
            mtu: Some(1500),
            receive_limit: fast(),
            transmit_limit: fast(),
        };
        Box::new(virtio::Net::new(config).unwrap())
    }

    fn act(&mut self, bytes: &[u8]) {
        let Some(far) = &self.far else { return };
        // A packet is lost if the socket has no room for it.
        let mut buffer = [0; 2048];
        while far.recv(&mut buffer).is_ok() {}
        let len = bytes.first().map_or(0, |len| usize::from(*len) * 8);
        let _full = far.send(&buffer[..len]);
        let _full = far.send(bytes);
    }
}

/// Entropy device, for which the host has nothing to do.
#[derive(Default)]
pub struct Rng;

impl Host for Rng {
    fn device(&mut self, _: Interrupt) -> Box<dyn Device<Memory>> {
        Box::new(virtio::Rng::new())
    }
}

/// Socket device. The host connects to it, and listens on port 5.
#[derive(Default)]
pub struct Vsock {
    path: PathBuf,
    listener: Option<UnixListener>,
    streams: Vec<UnixStream>,
}

impl Vsock {
    fn listener_path(&self) -> PathBuf {
        let mut path = self.path.clone().into_os_string();
        path.push("_5");
        path.into()
    }
}

impl Host for Vsock {
    fn device(&mut self, _: Interrupt) -> Box<dyn Device<Memory>> {
        self.path = std::env::temp_dir().join(format!("ferry-fuzz-{}", std::process::id()));
        let path = self.listener_path();
        // A run that crashed, or the previous device, may have left the sockets behind.
        for left in [&self.path, &path] {
            let _none = std::fs::remove_file(left);
        }
        let listener = UnixListener::bind(path).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.listener = Some(listener);
        self.streams.clear();
        let config = virtio::VsockOptions {
            guest_cid: 3,
            path: self.path.clone(),
        };
        Box::new(virtio::Vsock::new(config).unwrap())
    }

    /// Connects, sends, or closes a connection.
    fn act(&mut self, bytes: &[u8]) {
        if let Some(Ok((stream, _))) = self.listener.as_ref().map(UnixListener::accept) {
            self.streams.push(stream);
        }
        match bytes.split_first() {
            Some((0..64, rest)) => {
                let Ok(mut stream) = UnixStream::connect(&self.path) else {
                    return;
                };
                let _closed = stream.write_all(b"CONNECT 7\n");
                let _closed = stream.write_all(rest);
                stream.set_nonblocking(true).unwrap();
                self.streams.push(stream);
            }
            Some((64..192, rest)) => {
                if let Some(stream) = self.streams.last_mut() {
                    let _closed = stream.set_nonblocking(true);
                    let _full = stream.write(rest);
                }
            }
            Some(_) => drop(self.streams.pop()),
            None => {}
        }
    }
}

impl Drop for Vsock {
    fn drop(&mut self) {
        let _none = std::fs::remove_file(self.listener_path());
    }
}
