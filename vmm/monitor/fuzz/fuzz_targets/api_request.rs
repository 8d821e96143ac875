//! Fuzz target for the input that the API reads from clients: HTTP requests as raw bytes, and the JSON bodies of the
//! calls that take one.
//!
//! The first byte of the input selects between the two. For any input, the output must be complete HTTP responses with
//! a known status, an error must carry its reason in an array of messages, and no guest may be created.
#![no_main]

use std::sync::{Arc, LazyLock};

use libfuzzer_sys::fuzz_target;
use vmm::api::answer_bytes;
use vmm::events::Events;
use vmm::monitor::{Monitor, MonitorError, Refusal};

/// Monitor without a guest and without a launcher, so that no request can change its state.
static MONITOR: LazyLock<Arc<Monitor>> = LazyLock::new(|| Monitor::new(None, Events::nowhere()));

const CALLS: [&str; 5] = [
    "vm.create",
    "vm.dirty-rate",
    "vm.send-migration",
    "vm.migration-resolve",
    "vm.resize",
];
const STATUSES: [u16; 10] = [200, 204, 400, 404, 405, 408, 409, 413, 500, 501];

fuzz_target!(|bytes: &[u8]| {
    let Some((choice, rest)) = bytes.split_first() else {
        return;
    };
    match CALLS.get(usize::from(choice % 8)) {
        Some(call) => {
            let head = format!(
                "PUT /api/v1/{call} HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                rest.len()
            );
            let answers = parse_answers(&answer_bytes(&MONITOR, &[head.as_bytes(), rest].concat()));
            assert!(matches!(answers[..], [400 | 404 | 409]), "{answers:?}");
        }
        None => {
            parse_answers(&answer_bytes(&MONITOR, rest));
        }
    }
    assert!(matches!(
        MONITOR.info(),
        Err(MonitorError::Refused {
            refusal: Refusal::NoGuest,
            ..
        })
    ));
});

/// Parses `answers` as complete HTTP responses and returns their statuses.
fn parse_answers(mut answers: &[u8]) -> Vec<u16> {
    let mut statuses = Vec::new();
    while !answers.is_empty() {
        let mut headers = [httparse::EMPTY_HEADER; 16];
        let mut response = httparse::Response::new(&mut headers);
        let head = response.parse(answers).unwrap().unwrap();
        let status = response.code.unwrap();
        assert!(STATUSES.contains(&status), "{status}");
        let length = response
            .headers
            .iter()
            .find(|header| header.name == "Content-Length");
        let length = length.map_or(0, |header| {
            std::str::from_utf8(header.value).unwrap().parse().unwrap()
        });
        let body = &answers[head..head + length];
        if status >= 400 {
            let messages: Vec<String> = serde_json::from_slice(body).unwrap();
            assert!(messages.len() == 1 && !messages[0].is_empty());
        }
        statuses.push(status);
        answers = &answers[head + length..];
    }
    statuses
}
