//! Just as much HTTP/1.1 as a local API needs: a request with a bounded head and body, a response.

use std::io::{self, Read, Write};
use std::os::fd::OwnedFd;

/// Bytes of a request's line and headers, at most.
const HEAD_LIMIT: usize = 16 * 1024;
/// Bytes of a request's body, at most.
const BODY_LIMIT: usize = 1 << 20;
const HEADERS_LIMIT: usize = 64;
/// Descriptors that come with a request, at most: more than a guest can have interfaces.
pub(super) const DESCRIPTORS_LIMIT: usize = 16;

/// What a request wants to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// To read.
    Get,
    /// To change.
    Put,
}

impl Method {
    /// Its name in a request line.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Get => "GET",
            Self::Put => "PUT",
        }
    }
}

/// A request.
#[derive(Debug)]
pub(super) struct Request {
    pub(super) method: String,
    pub(super) path: String,
    pub(super) body: Vec<u8>,
    pub(super) keep_alive: KeepAlive,
    /// What came with its bytes, in order.
    pub(super) descriptors: Vec<OwnedFd>,
}

/// Whether the client wants to send another request over the same connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KeepAlive {
    Yes,
    No,
}

const JSON: &str = "application/json";

/// A response.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Response {
    pub(super) status: u16,
    content_type: &'static str,
    /// How the call is made, for whoever made it in another way (RFC 9110, 15.5.6).
    allow: Option<Method>,
    pub(super) body: String,
}

impl Response {
    pub(super) fn empty() -> Self {
        Self::json(204, String::new())
    }

    pub(super) fn json(status: u16, body: String) -> Self {
        Self {
            status,
            content_type: JSON,
            allow: None,
            body,
        }
    }

    pub(super) fn text(content_type: &'static str, body: String) -> Self {
        Self {
            content_type,
            ..Self::json(200, body)
        }
    }

    /// As Cloud Hypervisor writes them: an array of messages.
    pub(super) fn error(status: u16, message: impl ToString) -> Self {
        let messages = serde_json::json!([message.to_string()]);
        Self::json(status, messages.to_string())
    }

    /// The call is made in another way.
    pub(super) fn allow(method: Method, message: impl ToString) -> Self {
        Self {
            allow: Some(method),
            ..Self::error(405, message)
        }
    }

    pub(super) fn write_to(
        &self,
        stream: &mut impl Write,
        keep_alive: KeepAlive,
    ) -> io::Result<()> {
        let connection = match keep_alive {
            KeepAlive::Yes => "keep-alive",
            KeepAlive::No => "close",
        };
        let mut text = format!(
            "HTTP/1.1 {} {}\r\nServer: ferry\r\nConnection: {connection}\r\n",
            self.status,
            reason(self.status)
        );
        if let Some(method) = self.allow {
            text += &format!("Allow: {}\r\n", method.name());
        }
        if self.status != 204 {
            text += &format!(
                "Content-Type: {}\r\nContent-Length: {}\r\n",
                self.content_type,
                self.body.len()
            );
        }
        text += "\r\n";
        text += &self.body;
        stream.write_all(text.as_bytes())?;
        stream.flush()
    }
}

fn reason(status: u16) -> &'static str {
    match status {
        200 => "OK",
        204 => "No Content",
        400 => "Bad Request",
        404 => "Not Found",
        405 => "Method Not Allowed",
        408 => "Request Timeout",
        409 => "Conflict",
        413 => "Content Too Large",
        501 => "Not Implemented",
        503 => "Service Unavailable",
        _ => "Internal Server Error",
    }
}

/// Why there was no request.
#[derive(Debug)]
pub(super) enum RequestError {
    /// The client is done, or gone.
    Closed,
    /// What it sent is answered with this, and the connection closed.
    Invalid(Response),
}

/// What a connection reads from.
pub(super) trait RequestSource {
    /// As [`Read::read`], for a request of which `begun` says whether its first byte has come.
    ///
    /// # Errors
    /// The system's; `TimedOut` when the client took too long.
    fn read(&mut self, bytes: &mut [u8], begun: Begun) -> io::Result<usize>;

    /// Takes the descriptors that came with the last of the bytes that were read.
    fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        Vec::new()
    }
}

/// What a client sent received of the request that is looked at.
#[derive(Debug, Default)]
pub(super) struct ReceiveBuffer {
    bytes: Vec<u8>,
    /// Each with the place in `bytes` behind those that it came with. A socket never joins the bytes that descriptors
    /// come with and those behind them (unix(7)).
    descriptors: Vec<(usize, OwnedFd)>,
}

impl ReceiveBuffer {
    #[cfg(test)]
    pub(super) fn append(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Takes the first `count` bytes, and what came with them.
    ///
    /// # Errors
    /// More descriptors than a request may have.
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
            let why = format!("at most {DESCRIPTORS_LIMIT} descriptors come with a request");
            return Err(refusal(400, why));
        }
        Ok((
            bytes,
            with.into_iter().map(|(_, descriptor)| descriptor).collect(),
        ))
    }
}

/// Whether the first byte of a request has come.
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

/// Reads the next request. `received` keeps what a client sends received.
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
                format!("the request's head has more than {HEAD_LIMIT} bytes"),
            ));
        }
        fill(stream, received)?;
    }
}

fn fill(stream: &mut impl RequestSource, received: &mut ReceiveBuffer) -> Result<(), RequestError> {
    let mut bytes = [0; 4096];
    let begun = if received.bytes.is_empty() {
        Begun::No
    } else {
        Begun::Yes
    };
    match stream.read(&mut bytes, begun) {
        Err(error) if error.kind() == io::ErrorKind::TimedOut && begun == Begun::Yes => {
            Err(refusal(408, "the rest of the request did not come in time"))
        }
        Ok(0) | Err(_) => Err(RequestError::Closed),
        Ok(count) => {
            received.bytes.extend(&bytes[..count]);
            let end = received.bytes.len();
            // One more than a request may have says that there were too many.
            let room = (DESCRIPTORS_LIMIT + 1).saturating_sub(received.descriptors.len());
            let came = stream.take_descriptors().into_iter().take(room);
            received
                .descriptors
                .extend(came.map(|descriptor| (end, descriptor)));
            Ok(())
        }
    }
}

fn refusal(status: u16, message: impl ToString) -> RequestError {
    RequestError::Invalid(Response::error(status, message))
}

/// A request without its body, the length of its head, and the length of its body; none while the head is
/// not whole.
fn parse(buffer: &[u8]) -> Result<Option<(Request, usize, usize)>, RequestError> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_LIMIT];
    let mut parsed = httparse::Request::new(&mut headers);
    let head = match parsed.parse(buffer) {
        Ok(httparse::Status::Complete(head)) => head,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(error) => return Err(refusal(400, format!("no HTTP request: {error}"))),
    };
    let header = |name: &str| {
        parsed
            .headers
            .iter()
            .find(|header| header.name.eq_ignore_ascii_case(name))
            .map(|header| String::from_utf8_lossy(header.value).trim().to_owned())
    };
    if header("Transfer-Encoding").is_some() {
        return Err(refusal(501, "Transfer-Encoding: send a Content-Length"));
    }
    let length = match header("Content-Length") {
        None => 0,
        Some(text) => text
            .parse()
            .map_err(|_| refusal(400, format!("Content-Length: {text:?}")))?,
    };
    if length > BODY_LIMIT {
        return Err(refusal(
            413,
            format!("a body of {length} bytes, at most {BODY_LIMIT} are allowed"),
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

    /// Gives its bytes out in pieces of `step`.
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
            let (mut stream, mut buffer) = (Drip(text, step), ReceiveBuffer::default());
            let first = read_request(&mut stream, &mut buffer).unwrap();
            assert_eq!((first.method.as_str(), first.path.as_str()), ("PUT", "/a"));
            assert_eq!(
                (first.body.as_slice(), first.keep_alive),
                (&b"xyz"[..], KeepAlive::Yes)
            );
            let second = read_request(&mut stream, &mut buffer).unwrap();
            assert_eq!(
                (second.path.as_str(), second.keep_alive),
                ("/b", KeepAlive::No)
            );
            let end = read_request(&mut stream, &mut buffer).unwrap_err();
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
