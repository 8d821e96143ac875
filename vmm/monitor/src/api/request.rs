//! Requests of the API: HTTP/1.1 with a bounded head and body, and with passed descriptors.

use std::io::{self, Read};
use std::os::fd::OwnedFd;

use super::http::{KeepAlive, Response};

/// Maximum bytes of the request line and the headers.
const HEAD_LIMIT: usize = 16 * 1024;
/// Maximum bytes of a body.
const BODY_LIMIT: usize = 1 << 20;
/// Maximum number of headers.
const HEADERS_LIMIT: usize = 64;
/// Maximum number of descriptors that are passed with a request. It exceeds the number of network interfaces of a
/// guest.
pub(super) const DESCRIPTORS_LIMIT: usize = 16;

/// HTTP request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
    pub(super) keep_alive: KeepAlive,
    /// Descriptors that were passed with the bytes of the request, in order.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Reasons why no request could be read.
#[derive(Debug)]
pub(super) enum RequestError {
    /// The client closed the connection, or was idle for too long.
    Closed,
    /// The request is invalid. The response must be sent, and the connection closed.
    Invalid(Response),
}

/// Source of the bytes of requests.
pub(super) trait RequestSource {
    /// Reads bytes like [`Read::read`]. `begun` says whether the first byte of the request was received, which selects
    /// the time limit.
    ///
    /// # Errors
    /// Returns the error of the system, and `TimedOut` if the client exceeded the time limit.
    fn read(&mut self, bytes: &mut [u8], begun: Begun) -> io::Result<usize>;

    /// Takes the descriptors that were passed with the bytes of the last read.
    fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        Vec::new()
    }
}

/// Bytes and descriptors that were received and are not part of a completed request yet.
#[derive(Debug, Default)]
pub(super) struct ReceiveBuffer {
    bytes: Vec<u8>,
    /// Each descriptor, with the offset in `bytes` after the bytes that it was passed with. A socket never merges bytes
    /// that carry descriptors with bytes that follow (unix(7)).
    descriptors: Vec<(usize, OwnedFd)>,
}

impl ReceiveBuffer {
    #[cfg(test)]
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Removes the first `count` bytes and the descriptors that were passed with them.
    ///
    /// # Errors
    /// Returns an error response if there are more than [`DESCRIPTORS_LIMIT`] descriptors.
    fn take(&mut self, count: usize) -> Result<(Vec<u8>, Vec<OwnedFd>), RequestError> {
        let rest = self.bytes.split_off(count);
        let bytes = std::mem::replace(&mut self.bytes, rest);
        let (with, later): (Vec<_>, Vec<_>) = std::mem::take(&mut self.descriptors)
            .into_iter()
            .partition(|(end, _)| *end <= count);
        self.descriptors = later
            .into_iter()
            .map(|(end, descriptor)| (end - count, descriptor))
            .collect();
        if with.len() > DESCRIPTORS_LIMIT {
            let why =
                format!("at most {DESCRIPTORS_LIMIT} descriptors can be passed with a request");
            return Err(refusal(400, why));
        }
        Ok((
            bytes,
            with.into_iter().map(|(_, descriptor)| descriptor).collect(),
        ))
    }
}

/// Whether the first byte of a request was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Begun {
    No,
    Yes,
}

impl RequestSource for &[u8] {
    fn read(&mut self, bytes: &mut [u8], _: Begun) -> io::Result<usize> {
        Read::read(self, bytes)
    }
}

/// Reads the next request. Bytes that the client sent after it stay in `received` for the next call.
///
/// # Errors
/// Returns [`RequestError::Closed`] if there is no further request, and [`RequestError::Invalid`] if the request is
/// malformed, too large or too slow.
pub(super) fn read_request(
    stream: &mut impl RequestSource,
    received: &mut ReceiveBuffer,
) -> Result<Request, RequestError> {
    loop {
        if let Some((mut request, head, length)) = parse(&received.bytes)? {
            while received.bytes.len() < head + length {
                fill(stream, received)?;
            }
            let (mut bytes, descriptors) = received.take(head + length)?;
            request.body = bytes.split_off(head);
            request.descriptors = descriptors;
            return Ok(request);
        }
        if received.bytes.len() > HEAD_LIMIT {
            return Err(refusal(
                413,
                format!("the head of the request has more than {HEAD_LIMIT} bytes"),
            ));
        }
        fill(stream, received)?;
    }
}

/// Reads more bytes and descriptors into `received`.
fn fill(stream: &mut impl RequestSource, received: &mut ReceiveBuffer) -> Result<(), RequestError> {
    let mut bytes = [0; 4096];
    let begun = if received.bytes.is_empty() {
        Begun::No
    } else {
        Begun::Yes
    };
    match stream.read(&mut bytes, begun) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut && begun == Begun::Yes => Err(
            refusal(408, "the rest of the request did not arrive in time"),
        ),
        Ok(0) | Err(_) => Err(RequestError::Closed),
        Ok(count) => {
            received.bytes.extend(&bytes[..count]);
            let end = received.bytes.len();
            // One more than the limit is kept, so that an excess is noticed.
            let room = (DESCRIPTORS_LIMIT + 1).saturating_sub(received.descriptors.len());
            let passed = stream.take_descriptors().into_iter().take(room);
            received
                .descriptors
                .extend(passed.map(|descriptor| (end, descriptor)));
            Ok(())
        }
    }
}

/// Returns the error for a request that is answered with `status` and `message`.
fn refusal(status: u16, message: impl ToString) -> RequestError {
    RequestError::Invalid(Response::error(status, message))
}

/// Parses the head of a request. Returns the request without its body, the length of the head and the length of the
/// body, or `None` if the head is not complete.
fn parse(buffer: &[u8]) -> Result<Option<(Request, usize, usize)>, RequestError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(refusal(400, format!("not an HTTP request: {error}"))),
    };
    let header = |name: &str| {
        parsed
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
    };
    if header("Transfer-Encoding").is_some() {
        return Err(refusal(
            501,
            "Transfer-Encoding is not supported: send a Content-Length",
        ));
    }
    let length = match header("Content-Length") {
        None => 0,
        Some(text) => text.parse().map_err(|_| {
            refusal(
                400,
                format!("Content-Length: {text:?} is not a number of bytes"),
            )
        })?,
    };
    if length > BODY_LIMIT {
        return Err(refusal(
            413,
            format!("the body has {length} bytes, but at most {BODY_LIMIT} are allowed"),
        ));
    }
    let close = header("Connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    let request = Request {
        method: parsed.method.unwrap_or_default().into(),
        path: parsed.path.unwrap_or_default().into(),
        body: Vec::new(),
        keep_alive: if close || parsed.version == Some(0) {
            KeepAlive::No
        } else {
            KeepAlive::Yes
        },
        descriptors: Vec::new(),
    };
    Ok(Some((request, head, length)))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Returns its bytes in reads of at most `self.1` bytes.
    struct Drip<'a>(&'a [u8], usize);

    impl RequestSource for Drip<'_> {
        fn read(&mut self, bytes: &mut [u8], _: Begun) -> io::Result<usize> {
            let count = self.1.min(self.0.len()).min(bytes.len());
            bytes[..count].copy_from_slice(&self.0[..count]);
            self.0 = &self.0[count..];
            Ok(count)
        }
    }

    #[test]
    fn requests_follow_each_other_on_one_connection() {
        let text = b"PUT /a HTTP/1.1\r\ncontent-length: 3\r\n\r\nxyzGET /b HTTP/1.1\r\nConnection: close\r\n\r\n";
        for step in [1, 7, 4096] {
            let (mut stream, mut received) = (Drip(text, step), ReceiveBuffer::default());
            let first = read_request(&mut stream, &mut received).unwrap();
            assert_eq!((first.method.as_str(), first.path.as_str()), ("PUT", "/a"));
            assert_eq!(
                (first.body.as_slice(), first.keep_alive),
                (&b"xyz"[..], KeepAlive::Yes)
            );
            let second = read_request(&mut stream, &mut received).unwrap();
            assert_eq!(
                (second.path.as_str(), second.keep_alive),
                ("/b", KeepAlive::No)
            );
            let end = read_request(&mut stream, &mut received).unwrap_err();
            assert!(matches!(end, RequestError::Closed));
        }
    }

    #[test]
    fn what_is_too_large_or_broken_is_answered() {
        let long = format!("GET /{} HTTP/1.1\r\n", "x".repeat(2 * HEAD_LIMIT));
        for (text, status) in [
            (long.as_str(), 413),
            ("PUT / HTTP/1.1\r\nContent-Length: 99999999\r\n\r\n", 413),
            ("PUT / HTTP/1.1\r\nContent-Length: -1\r\n\r\n", 400),
            ("PUT / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n", 501),
            ("\u{1}\u{2}\r\n\r\n", 400),
        ] {
            match read_request(
                &mut Drip(text.as_bytes(), 4096),
                &mut ReceiveBuffer::default(),
            ) {
                Err(RequestError::Invalid(response)) => assert_eq!(response.status, status),
                other => panic!("{text:.40}: {other:?}"),
            }
        }
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _answer = read_request(&mut Drip(&bytes, 16), &mut ReceiveBuffer::default());
        }
    }
}
