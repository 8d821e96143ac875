//! Raw HTTP requests to the monitor's API, so that tests can also send what `ferry ctl` never sends.

use std::io::{self, IoSlice, Read, Write};
use std::mem::MaybeUninit;
use std::os::fd::BorrowedFd;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

/// Time limit of one request.
const LIMIT: Duration = Duration::from_secs(60);

/// An HTTP response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// The HTTP status.
    pub status: u16,
    /// The body.
    pub body: String,
}

/// Sends one request and reads the response: `request(socket, "PUT", "/api/v1/vm.pause", "")`.
///
/// # Errors
/// Returns the error of the operating system, or `InvalidData` if the response is not HTTP.
pub fn request(socket: &Path, method: &str, path: &str, body: &str) -> io::Result<Answer> {
    request_with(socket, method, path, body, &[])
}

/// Sends one request with file descriptors attached (`SCM_RIGHTS`), at most 16, and reads the response.
///
/// # Errors
/// Returns the same errors as [`request`].
pub fn request_with(
    socket: &Path,
    method: &str,
    path: &str,
    body: &str,
    descriptors: &[BorrowedFd<'_>],
) -> io::Result<Answer> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(LIMIT))?;
    let length = body.len();
    let head = format!(
        "{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\
         Content-Length: {length}\r\n\r\n"
    );
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(16))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !descriptors.is_empty() && !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(io::Error::other("more descriptors than there is room for"));
    }
    let parts = [IoSlice::new(head.as_bytes())];
    let sent = sendmsg(&stream, &parts, &mut ancillary, SendFlags::empty())?;
    stream.write_all(&head.as_bytes()[sent..])?;
    stream.write_all(body.as_bytes())?;
    let mut text = String::new();
    stream.read_to_string(&mut text)?;
    parse(&text).ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, text))
}

fn parse(text: &str) -> Option<Answer> {
    let (head, body) = text.split_once("\r\n\r\n")?;
    let rest = head.strip_prefix("HTTP/1.1 ")?;
    Some(Answer {
        status: rest.get(..3)?.parse().ok()?,
        body: body.to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn status_and_body_are_told_apart() {
        let answer = parse("HTTP/1.1 404 Not Found\r\nContent-Length: 2\r\n\r\n{}").unwrap();
        assert_eq!((answer.status, answer.body.as_str()), (404, "{}"));
        assert_eq!(parse("HTTP/1.1 40"), None);
    }
}
