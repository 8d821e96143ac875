//! Loads the disk and the network of a guest at full speed and prints the throughput, for `ferry bench devices`.
//!
//! It prints one line for each load, `ferry-bench: NAME operations=N us=N`, or `bytes=N` for large requests, and
//! `ferry-bench: end` at the end. It is linked statically, because the guest has no shared libraries.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::thread;
use std::time::{Duration, Instant};

use clap::Parser;

/// Loads a disk and a network, and prints the throughput.
#[derive(Parser)]
struct Arguments {
    /// Disk. Its contents are overwritten.
    #[arg(long)]
    disk: Option<PathBuf>,
    /// Address on which `ferry bench devices` listens.
    #[arg(long)]
    host: Option<SocketAddr>,
    /// Duration of each load in seconds.
    #[arg(long, default_value_t = 3)]
    seconds: u64,
}

/// Block size of the disk and of its page cache. Buffers for direct I/O are aligned to it.
const ALIGNMENT: usize = 4096;

#[derive(Clone, Copy)]
enum Direction {
    Read,
    Write,
}

#[derive(Clone, Copy)]
enum Order {
    Random,
    Sequential,
}

/// Load on a disk: a number of threads, each with one request in flight.
#[derive(Clone, Copy)]
struct DiskLoad {
    name: &'static str,
    direction: Direction,
    order: Order,
    bytes: usize,
    threads: u64,
}

const DISK_LOADS: [DiskLoad; 6] = {
    use Direction::{Read, Write};
    use Order::{Random, Sequential};
    const fn load(
        name: &'static str,
        direction: Direction,
        order: Order,
        bytes: usize,
        threads: u64,
    ) -> DiskLoad {
        DiskLoad {
            name,
            direction,
            order,
            bytes,
            threads,
        }
    }
    [
        load("block-read-4k", Read, Random, 4 << 10, 1),
        load("block-read-4k-by-4", Read, Random, 4 << 10, 4),
        load("block-write-4k", Write, Random, 4 << 10, 1),
        load("block-write-4k-by-4", Write, Random, 4 << 10, 4),
        load("block-read-1m", Read, Sequential, 1 << 20, 1),
        load("block-write-1m", Write, Sequential, 1 << 20, 1),
    ]
};

/// Throughput: an amount and the time it took.
struct Done {
    what: What,
    time: Duration,
}

enum What {
    Operations(u64),
    Bytes(u64),
}

fn main() -> ExitCode {
    match work(&Arguments::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            println!("ferry-bench: failed: {error}");
            ExitCode::FAILURE
        }
    }
}

fn work(arguments: &Arguments) -> io::Result<()> {
    let time = Duration::from_secs(arguments.seconds);
    if let Some(disk) = &arguments.disk {
        for load in DISK_LOADS {
            say(load.name, &work_disk(disk, load, time)?);
        }
    }
    if let Some(host) = arguments.host {
        say("net-send", &send(host, time)?);
        say("net-receive", &receive(host, time)?);
        say("net-round-trip", &round_trips(host, time)?);
    }
    println!("ferry-bench: end");
    Ok(())
}

fn say(name: &str, done: &Done) {
    let us = done.time.as_micros();
    match done.what {
        What::Operations(count) => println!("ferry-bench: {name} operations={count} us={us}"),
        What::Bytes(count) => println!("ferry-bench: {name} bytes={count} us={us}"),
    }
}

fn work_disk(disk: &Path, load: DiskLoad, time: Duration) -> io::Result<Done> {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .custom_flags(libc::O_DIRECT)
        .open(disk)?;
    let places = size_of_disk(disk)? / load.bytes as u64;
    if places == 0 {
        return Err(io::Error::other("the disk is smaller than one request"));
    }
    let began = Instant::now();
    let (file, end) = (&file, began + time);
    let all = thread::scope(|scope| {
        let workers: Vec<_> = (0..load.threads)
            .map(|thread| scope.spawn(move || request_until(file, load, places, thread + 1, end)))
            .collect();
        workers
            .into_iter()
            .map(|worker| {
                worker
                    .join()
                    .map_err(|_| io::Error::other("a thread panicked"))?
            })
            .sum::<io::Result<u64>>()
    })?;
    if matches!(load.direction, Direction::Write) {
        file.sync_data()?;
    }
    let what = match load.order {
        Order::Random => What::Operations(all),
        Order::Sequential => What::Bytes(all * load.bytes as u64),
    };
    Ok(Done {
        what,
        time: began.elapsed(),
    })
}

/// Returns the size of a block device by seeking to its end, because its metadata has no size.
fn size_of_disk(disk: &Path) -> io::Result<u64> {
    io::Seek::seek(&mut File::open(disk)?, io::SeekFrom::End(0))
}

fn request_until(
    file: &File,
    load: DiskLoad,
    places: u64,
    seed: u64,
    end: Instant,
) -> io::Result<u64> {
    let mut memory = vec![seed.to_le_bytes()[0]; load.bytes + ALIGNMENT];
    let skipped = memory.as_ptr().align_offset(ALIGNMENT);
    let buffer = &mut memory[skipped..skipped + load.bytes];
    let mut random = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut operations = 0;
    while Instant::now() < end {
        let place = match load.order {
            Order::Sequential => operations,
            Order::Random => next(&mut random),
        };
        let offset = place % places * load.bytes as u64;
        match load.direction {
            Direction::Read => file.read_exact_at(buffer, offset)?,
            Direction::Write => file.write_all_at(buffer, offset)?,
        }
        operations += 1;
    }
    Ok(operations)
}

/// Marsaglia's xorshift.
fn next(state: &mut u64) -> u64 {
    *state ^= *state << 13;
    *state ^= *state >> 7;
    *state ^= *state << 17;
    *state
}

/// Opens a connection and sends its purpose as the first byte.
fn connect(host: SocketAddr, purpose: u8) -> io::Result<TcpStream> {
    let mut stream = TcpStream::connect(host)?;
    stream.set_nodelay(true)?;
    stream.write_all(&[purpose])?;
    Ok(stream)
}

/// Measures sending by the number of bytes that the host reports as received.
fn send(host: SocketAddr, time: Duration) -> io::Result<Done> {
    let mut stream = connect(host, b's')?;
    let buffer = vec![0x5a; 128 << 10];
    let began = Instant::now();
    while began.elapsed() < time {
        stream.write_all(&buffer)?;
    }
    stream.shutdown(Shutdown::Write)?;
    let mut bytes = [0; 8];
    stream.read_exact(&mut bytes)?;
    Ok(Done {
        what: What::Bytes(u64::from_le_bytes(bytes)),
        time: began.elapsed(),
    })
}

fn receive(host: SocketAddr, time: Duration) -> io::Result<Done> {
    let mut stream = connect(host, b'r')?;
    let mut buffer = vec![0; 128 << 10];
    let began = Instant::now();
    let mut bytes = 0;
    while began.elapsed() < time {
        let read = stream.read(&mut buffer)?;
        if read == 0 {
            return Err(io::Error::other("the host has no more to send"));
        }
        bytes += read as u64;
    }
    Ok(Done {
        what: What::Bytes(bytes),
        time: began.elapsed(),
    })
}

fn round_trips(host: SocketAddr, time: Duration) -> io::Result<Done> {
    let mut stream = connect(host, b't')?;
    let began = Instant::now();
    let mut count = 0;
    while began.elapsed() < time {
        let mut byte = [1];
        stream.write_all(&byte)?;
        stream.read_exact(&mut byte)?;
        count += 1;
    }
    Ok(Done {
        what: What::Operations(count),
        time: began.elapsed(),
    })
}
