//! The other end of the network loads of `ferry bench devices`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Answers guests for as long as the process lives, and says where.
pub(super) fn start(address: IpAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((address, 0))?;
    let place = listener.local_addr()?;
    thread::Builder::new()
        .name("_bench_net".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    // A guest that is gone in the middle says nothing more itself: that is what is reported.
                    let _gone = answer(stream);
                });
            }
        })?;
    Ok(place)
}

/// The first byte says what a connection is for.
fn answer(mut stream: TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    let mut purpose = [0];
    stream.read_exact(&mut purpose)?;
    match purpose {
        [b's'] => count(stream),
        [b'r'] => send(stream),
        [b't'] => echo(stream),
        _ => Ok(()),
    }
}

fn count(mut stream: TcpStream) -> io::Result<()> {
    let mut buffer = vec![0; 128 << 10];
    let mut bytes = 0_u64;
    loop {
        match stream.read(&mut buffer)? {
            0 => return stream.write_all(&bytes.to_le_bytes()),
            read => bytes += read as u64,
        }
    }
}

fn send(mut stream: TcpStream) -> io::Result<()> {
    let buffer = vec![0x5a; 128 << 10];
    loop {
        stream.write_all(&buffer)?;
    }
}

fn echo(mut stream: TcpStream) -> io::Result<()> {
    let mut byte = [0];
    loop {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn connect(purpose: u8) -> TcpStream {
        let place = start(IpAddr::from([127, 0, 0, 1])).unwrap();
        let mut stream = TcpStream::connect(place).unwrap();
        stream.write_all(&[purpose]).unwrap();
        stream
    }

    #[test]
    fn what_comes_is_counted() {
        let mut stream = connect(b's');
        stream.write_all(&vec![1; 300_000]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut counted = [0; 8];
        stream.read_exact(&mut counted).unwrap();
        assert_eq!(u64::from_le_bytes(counted), 300_000);
    }

    #[test]
    fn bytes_come_without_end_and_come_back() {
        let mut much = vec![0; 300_000];
        connect(b'r').read_exact(&mut much).unwrap();
        assert!(much.iter().all(|byte| *byte == 0x5a));
        let mut stream = connect(b't');
        for byte in 0..100 {
            let mut back = [0];
            stream.write_all(&[byte]).unwrap();
            stream.read_exact(&mut back).unwrap();
            assert_eq!(back, [byte]);
        }
    }

    #[test]
    fn an_unknown_purpose_ends_the_connection() {
        assert_eq!(connect(b'x').read(&mut [0]).unwrap(), 0);
    }
}
