//! Reads requests from the socket of a client, with time limits and passed descriptors.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};

use super::request::{Begun, DESCRIPTORS_LIMIT, RequestSource};

/// Time after which an idle connection is closed.
const IDLE_LIMIT: Duration = Duration::from_secs(60);
/// Maximum time from the first to the last byte of a request, and for sending an answer.
pub(super) const REQUEST_LIMIT: Duration = Duration::from_secs(5);

/// Stream from which one request is read.
pub(super) struct RequestStream<'a> {
    stream: &'a UnixStream,
    /// Deadline for the rest of the request. It is set when the first byte was received.
    deadline: Option<Instant>,
    /// Descriptors that were passed with the bytes of the last read.
    descriptors: Vec<OwnedFd>,
}

impl<'a> RequestStream<'a> {
    /// Creates a reader for the next request on `stream`.
    pub(super) fn new(stream: &'a UnixStream) -> Self {
        Self {
            stream,
            deadline: None,
            descriptors: Vec::new(),
        }
    }

    /// Reads bytes and the descriptors that are passed with them.
    fn receive(&mut self, bytes: &mut [u8]) -> io::Result<usize> {
        const SPACE: usize = rustix::cmsg_space!(ScmRights(DESCRIPTORS_LIMIT + 1));
        let mut space = [MaybeUninit::uninit(); SPACE];
        let mut ancillary = RecvAncillaryBuffer::new(&mut space);
        let mut parts = [IoSliceMut::new(bytes)];
        let flags = RecvFlags::CMSG_CLOEXEC;
        let count = recvmsg(self.stream, &mut parts, &mut ancillary, flags)?.bytes;
        for message in ancillary.drain() {
            if let RecvAncillaryMessage::ScmRights(passed) = message {
                self.descriptors.extend(passed);
            }
        }
        Ok(count)
    }
}

impl RequestSource for RequestStream<'_> {
    fn read(&mut self, bytes: &mut [u8], begun: Begun) -> io::Result<usize> {
        let limit = match begun {
            Begun::No => IDLE_LIMIT,
            Begun::Yes => self
                .deadline
                .get_or_insert_with(|| Instant::now() + REQUEST_LIMIT)
                .saturating_duration_since(Instant::now()),
        };
        if limit.is_zero() {
            return Err(io::ErrorKind::TimedOut.into());
        }
        self.stream.set_read_timeout(Some(limit))?;
        self.receive(bytes).map_err(|error| match error.kind() {
            io::ErrorKind::WouldBlock => io::ErrorKind::TimedOut.into(),
            _ => error,
        })
    }

    fn take_descriptors(&mut self) -> Vec<OwnedFd> {
        std::mem::take(&mut self.descriptors)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{IoSlice, Write};
    use std::os::fd::AsFd;

    use rustix::io::{FdFlags, fcntl_getfd};
    use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

    use super::super::request::{ReceiveBuffer, RequestError, read_request};
    use super::*;

    #[test]
    fn a_request_that_does_not_end_is_answered_with_408() {
        let (near, mut far) = UnixStream::pair().unwrap();
        far.write_all(b"GET /half").unwrap();
        let mut stream = RequestStream {
            stream: &near,
            deadline: Some(Instant::now()),
            descriptors: Vec::new(),
        };
        let mut received = ReceiveBuffer::default();
        received.append(b"G");
        match read_request(&mut stream, &mut received) {
            Err(RequestError::Invalid(response)) => assert_eq!(response.status, 408),
            other => panic!("{other:?}"),
        }
    }

    /// Sends a complete request with `count` descriptors, and reads it.
    fn with_descriptors(count: usize) -> Result<Vec<OwnedFd>, RequestError> {
        let (near, far) = UnixStream::pair().unwrap();
        let files: Vec<_> = (0..count)
            .map(|_| File::open("/dev/null").unwrap())
            .collect();
        let files: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(64))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let head = IoSlice::new(b"PUT /x HTTP/1.1\r\nContent-Length: 2\r\n\r\n");
        let sent = sendmsg(&far, &[head], &mut ancillary, SendFlags::empty());
        assert_eq!(sent.unwrap(), head.len());
        (&far).write_all(b"{}").unwrap();
        let mut stream = RequestStream::new(&near);
        let request = read_request(&mut stream, &mut ReceiveBuffer::default())?;
        assert_eq!(request.body, b"{}");
        Ok(request.descriptors)
    }

    #[test]
    fn descriptors_come_with_a_request_up_to_a_limit() {
        for count in [1, 2, DESCRIPTORS_LIMIT] {
            let passed = with_descriptors(count).unwrap();
            assert_eq!(passed.len(), count);
            let info = fcntl_getfd(&passed[0]).unwrap();
            assert!(info.contains(FdFlags::CLOEXEC));
        }
        for count in [DESCRIPTORS_LIMIT + 1, 60] {
            match with_descriptors(count) {
                Err(RequestError::Invalid(response)) => assert_eq!(response.status, 400),
                other => panic!("{count}: {other:?}"),
            }
        }
    }

    #[test]
    fn descriptors_belong_to_the_request_that_they_came_with() {
        let (near, far) = UnixStream::pair().unwrap();
        (&far).write_all(b"PUT /first HTTP/1.1\r\n\r\n").unwrap();
        let file = File::open("/dev/null").unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut ancillary = SendAncillaryBuffer::new(&mut space);
        let files = [file.as_fd()];
        assert!(ancillary.push(SendAncillaryMessage::ScmRights(&files)));
        let head = IoSlice::new(b"PUT /second HTTP/1.1\r\n\r\n");
        sendmsg(&far, &[head], &mut ancillary, SendFlags::empty()).unwrap();
        (&far).write_all(b"PUT /third HTTP/1.1\r\n\r\n").unwrap();
        let mut received = ReceiveBuffer::default();
        for (path, count) in [("/first", 0), ("/second", 1), ("/third", 0)] {
            let mut stream = RequestStream::new(&near);
            let request = read_request(&mut stream, &mut received).unwrap();
            assert_eq!(
                (request.path.as_str(), request.descriptors.len()),
                (path, count)
            );
        }
    }
}
