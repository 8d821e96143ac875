//! Echoes the bytes of a vsock connection in a guest: `vsock-echo listen PORT` accepts one connection from the host,
//! `vsock-echo connect PORT` connects to the host. It ends when the peer closes its side.
//!
//! It is linked statically, because the guest has no shared libraries. It uses `unsafe` because neither the standard
//! library nor rustix supports vsock addresses.
#![allow(unsafe_code)]

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem::size_of;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

/// Any local address: `VMADDR_CID_ANY` in include/uapi/linux/vm_sockets.h.
const ANY: u32 = u32::MAX;
/// Address of the host: `VMADDR_CID_HOST`.
const HOST: u32 = 2;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let done = match arguments.iter().map(String::as_str).collect::<Vec<_>>()[..] {
        ["listen", port] => port.parse().map_err(io::Error::other).and_then(listen),
        ["connect", port] => port.parse().map_err(io::Error::other).and_then(connect),
        _ => Err(io::Error::other("usage: vsock-echo listen|connect PORT")),
    };
    match done.and_then(|connection| echo(&connection)) {
        Ok(bytes) => {
            println!("vsock-echo: {bytes} bytes");
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("vsock-echo: {error}");
            ExitCode::FAILURE
        }
    }
}

/// Echoes until the peer closes its side. Returns the number of bytes.
fn echo(mut connection: &File) -> io::Result<u64> {
    let mut buffer = vec![0; 64 * 1024];
    let mut bytes = 0;
    loop {
        let read = connection.read(&mut buffer)?;
        if read == 0 {
            return Ok(bytes);
        }
        connection.write_all(&buffer[..read])?;
        bytes += read as u64;
    }
}

fn listen(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(ANY, port);
    // SAFETY: the kernel reads one address of the given size.
    checked(unsafe {
        libc::bind(
            socket.as_raw_fd(),
            (&raw const address).cast(),
            ADDRESS_BYTES,
        )
    })?;
    // SAFETY: the call accesses no memory of this process.
    checked(unsafe { libc::listen(socket.as_raw_fd(), 1) })?;
    println!("vsock-echo: listening");
    // SAFETY: the kernel writes no address, because none is requested.
    let accepted = checked(unsafe {
        libc::accept(
            socket.as_raw_fd(),
            std::ptr::null_mut(),
            std::ptr::null_mut(),
        )
    })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(File::from(unsafe { OwnedFd::from_raw_fd(accepted) }))
}

fn connect(port: u32) -> io::Result<File> {
    let socket = socket()?;
    let address = address(HOST, port);
    let (fd, address) = (socket.as_raw_fd(), (&raw const address).cast());
    // SAFETY: the kernel reads one address of the given size.
    checked(unsafe { libc::connect(fd, address, ADDRESS_BYTES) })?;
    Ok(File::from(socket))
}

fn socket() -> io::Result<OwnedFd> {
    // SAFETY: the call accesses no memory of this process.
    let socket = checked(unsafe { libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM, 0) })?;
    // SAFETY: the kernel has just returned this descriptor, and nothing else owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(socket) })
}

#[allow(clippy::cast_possible_truncation)]
const ADDRESS_BYTES: libc::socklen_t = size_of::<libc::sockaddr_vm>() as libc::socklen_t;

fn address(cid: u32, port: u32) -> libc::sockaddr_vm {
    // SAFETY: all fields of the structure may be zero.
    let mut address: libc::sockaddr_vm = unsafe { std::mem::zeroed() };
    address.svm_family = libc::sa_family_t::try_from(libc::AF_VSOCK).unwrap_or_default();
    address.svm_cid = cid;
    address.svm_port = port;
    address
}

fn checked(returned: i32) -> io::Result<i32> {
    if returned < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(returned)
}
