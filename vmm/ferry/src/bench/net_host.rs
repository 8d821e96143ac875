//! TCP server on the host for the network loads of `ferry bench devices`.

use std::io::{self, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::thread;

/// Starts the server on a free port. It runs until the process exits. Returns its address.
pub(super) fn start(address: IpAddr) -> io::Result<SocketAddr> {
    let listener = TcpListener::bind((address, 0))?;
    let address = listener.local_addr()?;
    thread::Builder::new()
        .name("_bench_net".into())
        .spawn(move || {
            for stream in listener.incoming().flatten() {
                thread::spawn(move || {
                    // If the guest is gone, its missing output is reported instead.
                    let _gone = serve(stream);
                });
            }
        })?;
    Ok(address)
}

/// Serves one connection. Its first byte selects the purpose.
fn serve(mut stream: TcpStream) -> io::Result<()> {
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

/// Counts the bytes that the guest sends, and answers with their number.
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

/// Sends bytes until the guest closes the connection.
fn send(mut stream: TcpStream) -> io::Result<()> {
    let buffer = vec![0x5a; 128 << 10];
    loop {
        stream.write_all(&buffer)?;
    }
}

/// Returns each byte that the guest sends.
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
        let address = start(IpAddr::from([127, 0, 0, 1])).unwrap();
        let mut stream = TcpStream::connect(address).unwrap();
        stream.write_all(&[purpose]).unwrap();
        stream
    }

    #[test]
    fn received_bytes_are_counted() {
        let mut stream = connect(b's');
        stream.write_all(&vec![1; 300_000]).unwrap();
        stream.shutdown(std::net::Shutdown::Write).unwrap();
        let mut counted = [0; 8];
        stream.read_exact(&mut counted).unwrap();
        assert_eq!(u64::from_le_bytes(counted), 300_000);
    }

    #[test]
    fn bytes_are_sent_without_end_and_echoed() {
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
