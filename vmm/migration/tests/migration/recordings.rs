//! Guests that are recorded into files and played back: whole, cut, changed, and from earlier versions.

use std::fs::{self, File};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use migration::{
    Attempt, DigestCheck, Phase, Playback, ReceiveError, Received, Recording, STREAM_VERSION,
    SendError, SendOptions, receive, send,
};

use crate::guest::{EmptyGuest, Guest, World};
use crate::{Setup, assert_alive_and_whole, assert_stayed, running_guest};

const STAMPS: u64 = 10;

fn options() -> SendOptions {
    SendOptions {
        digest: DigestCheck::Skip,
        ..Setup::default().send
    }
}

/// A guest that does not run, and the bytes of its recording.
fn recorded(directory: &Path) -> Vec<u8> {
    let world = Arc::new(World::default());
    let mut guest = Guest::new(&world);
    (0..STAMPS).for_each(|_| guest.stamp());
    let path = directory.join("guest");
    let stream = Recording::new(File::create(&path).unwrap());
    let attempt = Attempt::new("file");
    send(&mut guest, stream, &options(), &attempt).unwrap();
    assert_eq!(attempt.report().phase, Phase::Completed);
    fs::read(path).unwrap()
}

fn play_back(path: &Path) -> (Result<Received, ReceiveError>, Option<Guest>) {
    let world = Arc::new(World::default());
    let mut empty = EmptyGuest::new(&world);
    let stream = Playback::new(File::open(path).unwrap());
    let options = Setup::default().receive;
    let received = receive(&mut empty, stream, &options, &Attempt::arriving("file"));
    (received, empty.take())
}

fn assert_plays_back(path: &Path) {
    let (received, arrived) = play_back(path);
    received.unwrap();
    let mut arrived = arrived.unwrap();
    assert!(arrived.stamps() >= STAMPS);
    assert_alive_and_whole(&mut arrived);
}

/// Offsets at which the header and each frame end.
fn ends(bytes: &[u8]) -> Vec<usize> {
    let word = |at: usize| u32::from_le_bytes(bytes[at..at + 4].try_into().unwrap()) as usize;
    let mut ends = vec![16 + word(12) + 4];
    while let Some(end) = ends.last().copied().filter(|end| *end < bytes.len()) {
        ends.push(end + 16 + word(end + 4));
    }
    ends
}

#[test]
fn a_guest_is_recorded_while_it_runs_and_played_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest");
    let (world, mut source) = running_guest();
    let stream = Recording::new(File::create(&path).unwrap());
    send(&mut source, stream, &options(), &Attempt::new("file")).unwrap();
    assert_eq!(world.running(), 0);
    let (received, arrived) = play_back(&path);
    received.unwrap();
    let mut arrived = arrived.unwrap();
    assert!(arrived.stamps() >= source.stamps());
    assert_alive_and_whole(&mut arrived);
}

#[test]
fn a_recording_that_is_cut_or_changed_anywhere_is_refused_before_the_guest_runs() {
    let directory = tempfile::tempdir().unwrap();
    let whole = recorded(directory.path());
    let path = directory.path().join("damaged");
    let refused = |bytes: &[u8], what: &str| {
        fs::write(&path, bytes).unwrap();
        let (received, arrived) = play_back(&path);
        let error = received.expect_err(what);
        assert!(matches!(error, ReceiveError::Wire(_)), "{what}: {error}");
        assert!(arrived.is_none(), "{what}");
    };
    let ends = ends(&whole);
    assert!(ends.len() > 5, "{ends:?}");
    assert_eq!(ends.last(), Some(&whole.len()));
    let mut start = 0;
    for end in ends {
        for cut in [start, start + 1, (start + 16).min(end - 1), end - 1] {
            refused(&whole[..cut], &format!("cut at {cut}"));
        }
        for at in [start, start + 4, start + 8, start + 12, end - 1] {
            let mut changed = whole.clone();
            changed[at] ^= 0x10;
            refused(&changed, &format!("changed at {at}"));
        }
        start = end;
    }
}

#[test]
fn a_digest_cannot_be_compared_with_a_recording() {
    let directory = tempfile::tempdir().unwrap();
    let (world, mut source) = running_guest();
    let stream = Recording::new(File::create(directory.path().join("guest")).unwrap());
    let options = Setup::default().send;
    match send(&mut source, stream, &options, &Attempt::new("file")) {
        Err(SendError::Refused(reason)) => {
            assert!(reason.contains("without the comparison"), "{reason}");
        }
        other => panic!("{other:?}"),
    }
    assert_stayed(&world, source);
}

#[test]
fn a_file_that_cannot_be_written_leaves_the_guest_running() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("guest");
    File::create(&path).unwrap();
    let (world, mut source) = running_guest();
    let stream = Recording::new(File::open(&path).unwrap());
    let error = send(&mut source, stream, &options(), &Attempt::new("file")).unwrap_err();
    assert!(error.to_string().contains("writing the header"), "{error}");
    assert_stayed(&world, source);
}

/// Streams in this folder are kept for ever: a guest that was recorded by an earlier version must arrive.
fn kept_streams() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/streams")
}

/// Reads the streams of all versions up to this one. If the folder has none of this version, the test writes it
/// and fails: commit the file.
#[test]
fn a_recording_of_an_earlier_version_is_still_read() {
    let current = kept_streams().join(format!("v{STREAM_VERSION}-stamps.bin"));
    if !current.exists() {
        let directory = tempfile::tempdir().unwrap();
        let bytes = recorded(directory.path());
        assert!(bytes.len() < 64 * 1024, "{} bytes", bytes.len());
        let mut file = File::create(&current).unwrap();
        file.write_all(&bytes).unwrap();
        panic!("{} has been written: commit it", current.display());
    }
    for kept in fs::read_dir(kept_streams()).unwrap() {
        let path = kept.unwrap().path();
        if cfg!(target_arch = "x86_64") {
            assert_plays_back(&path);
        } else {
            let error = play_back(&path).0.unwrap_err().to_string();
            assert!(error.contains("the guest is for x86_64"), "{error}");
        }
    }
}

#[test]
fn a_recording_of_this_version_is_read_again() {
    let directory = tempfile::tempdir().unwrap();
    recorded(directory.path());
    assert_plays_back(&directory.path().join("guest"));
}
