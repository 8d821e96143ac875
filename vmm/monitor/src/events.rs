//! Events of a monitor and its guest as JSON lines, in the format and with the names of Cloud Hypervisor's event
//! monitor:
//!
//! ```text
//! {"event":"booted","properties":null,"source":"vm","timestamp":{"nanos":1843211,"secs":0}}
//! ```
//!
//! `timestamp` is the time since the monitor started. Emitting an event never blocks: lines go through a bounded queue
//! to a thread that writes them. If the reader stalls, events are dropped, and an event `events-lost` reports their
//! number when the reader continues. A reader that disconnects is not an error, and may connect again.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

use serde::Serialize;
use serde_json::{Value, json};

/// Capacity of the queue in lines.
const QUEUE_LINES: usize = 1024;
/// Maximum time that [`Events::flush`] waits for the queue to empty.
const FLUSH_LIMIT: Duration = Duration::from_secs(1);

/// Subject of an event.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum EventSource {
    /// The guest.
    Vm,
    /// The monitor.
    Vmm,
}

/// Sink of events. Clones share the same sink.
#[derive(Clone, Default)]
pub struct Events(Option<Arc<Queue>>);

/// Queue to the thread that writes the lines.
struct Queue {
    /// Start of the monitor: time 0 of the timestamps.
    began: Instant,
    lines: SyncSender<String>,
    counters: Arc<QueueCounters>,
}

/// Numbers of lines that are waiting in the queue and that were lost.
#[derive(Default)]
struct QueueCounters {
    waiting: AtomicUsize,
    lost: AtomicU64,
}

impl Events {
    /// Returns a sink that drops all events.
    #[must_use]
    pub fn nowhere() -> Self {
        Self(None)
    }

    /// Returns a sink that writes to `file` from a thread of its own.
    ///
    /// # Errors
    /// Returns the error of the system if the thread cannot be started.
    pub fn to(file: File) -> io::Result<Self> {
        let (lines, queue) = sync_channel(QUEUE_LINES);
        let began = Instant::now();
        let counters = Arc::new(QueueCounters::default());
        let written = Arc::clone(&counters);
        thread::Builder::new()
            .name("_event-monitor".into())
            .spawn(move || write_out(file, &queue, began, &written))?;
        Ok(Self(Some(Arc::new(Queue {
            began,
            lines,
            counters,
        }))))
    }

    /// Returns a sink that appends to the file at `path`, which is created if it does not exist, or to a FIFO.
    ///
    /// # Errors
    /// Returns the error of the system if the file cannot be opened. For a FIFO without a reader this is `ENXIO`
    /// (fifo(7)).
    pub fn append_to(path: &Path) -> io::Result<Self> {
        // O_NONBLOCK keeps open(2) from waiting for a reader of a FIFO. It is cleared again, because the writing thread
        // may block.
        let file = OpenOptions::new()
            .create(true)
            .append(true)
            .custom_flags(libc::O_NONBLOCK)
            .open(path)?;
        let flags = rustix::fs::fcntl_getfl(&file)?;
        rustix::fs::fcntl_setfl(&file, flags - rustix::fs::OFlags::NONBLOCK)?;
        Self::to(file)
    }

    /// Emits the event named `event`. `properties` is null if there are no details.
    pub fn tell(&self, source: EventSource, event: &str, properties: Value) {
        let Some(queue) = &self.0 else {
            return;
        };
        let line = line(queue.began, source, event, properties);
        queue.counters.waiting.fetch_add(1, Ordering::SeqCst);
        if queue.lines.try_send(line).is_err() {
            queue.counters.line_lost();
        }
    }

    /// Emits an event of the guest without properties.
    pub fn vm(&self, event: &str) {
        self.tell(EventSource::Vm, event, Value::Null);
    }

    /// Emits an event of the guest with the property `reason`.
    pub fn vm_because(&self, event: &str, reason: &str) {
        self.tell(EventSource::Vm, event, json!({ "reason": reason }));
    }

    /// Returns the number of events that were dropped because the reader stalled or disconnected.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.0
            .as_ref()
            .map_or(0, |queue| queue.counters.lost.load(Ordering::Relaxed))
    }

    /// Waits until all queued events are written, for one second at most.
    pub fn flush(&self) {
        let Some(queue) = &self.0 else {
            return;
        };
        let began = Instant::now();
        while queue.counters.waiting.load(Ordering::SeqCst) > 0 && began.elapsed() < FLUSH_LIMIT {
            thread::sleep(Duration::from_millis(1));
        }
    }
}

impl QueueCounters {
    /// Counts a line that was not written.
    fn line_lost(&self) {
        self.lost.fetch_add(1, Ordering::Relaxed);
        self.waiting.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Formats an event that happens now as a line without a line feed.
fn line(began: Instant, source: EventSource, event: &str, properties: Value) -> String {
    let age = began.elapsed();
    json!({
        "timestamp": { "secs": age.as_secs(), "nanos": age.subsec_nanos() },
        "source": source,
        "event": event,
        "properties": properties,
    })
    .to_string()
}

/// Writes the queued lines to `file`. Each line is one write, so that lines of several writers to one file do not mix.
fn write_out(mut file: File, queue: &Receiver<String>, began: Instant, counters: &QueueCounters) {
    let mut reported = 0;
    while let Ok(next) = queue.recv() {
        let mut text = next;
        let lost = counters.lost.load(Ordering::Relaxed);
        if lost > reported {
            let count = json!({ "count": lost - reported });
            text = format!(
                "{}\n{text}",
                line(began, EventSource::Vmm, "events-lost", count)
            );
        }
        text.push('\n');
        match file.write_all(text.as_bytes()) {
            Ok(()) => {
                reported = lost;
                counters.waiting.fetch_sub(1, Ordering::SeqCst);
            }
            Err(_) => counters.line_lost(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader};
    use std::os::fd::OwnedFd;

    use super::*;

    fn pipe() -> (File, File) {
        let (reader, writer) = io::pipe().unwrap();
        (
            File::from(OwnedFd::from(reader)),
            File::from(OwnedFd::from(writer)),
        )
    }

    #[test]
    fn an_event_is_one_line_in_the_known_shape() {
        let (reader, writer) = pipe();
        let events = Events::to(writer).unwrap();
        events.vm("booting");
        events.vm_because("failed", "a \"reason\"\nof two lines");
        events.flush();
        drop(events);
        let lines: Vec<Value> = BufReader::new(reader)
            .lines()
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect();
        assert_eq!(lines.len(), 2);
        assert_eq!(lines[0]["source"], "vm");
        assert_eq!(lines[0]["event"], "booting");
        assert_eq!(lines[0]["properties"], Value::Null);
        assert!(lines[0]["timestamp"]["secs"].is_u64() && lines[0]["timestamp"]["nanos"].is_u64());
        assert_eq!(
            lines[1]["properties"]["reason"],
            "a \"reason\"\nof two lines"
        );
    }

    #[test]
    fn a_reader_that_stalls_holds_nobody_up_and_is_told_what_it_lost() {
        let (reader, writer) = pipe();
        let events = Events::to(writer).unwrap();
        // More than the pipe and the queue can hold together.
        let text = "x".repeat(4096);
        let count = 2 * QUEUE_LINES;
        (0..count).for_each(|_| events.vm_because("failed", &text));
        let lost = events.lost();
        assert!(lost > 0);
        drop(events);
        let lines: Vec<Value> = BufReader::new(reader)
            .lines()
            .map(|line| serde_json::from_str(&line.unwrap()).unwrap())
            .collect();
        let reported: u64 = lines
            .iter()
            .filter(|line| line["event"] == "events-lost")
            .filter_map(|line| line["properties"]["count"].as_u64())
            .sum();
        assert_eq!(reported, lost);
        let written = lines
            .iter()
            .filter(|line| line["event"] == "failed")
            .count();
        assert_eq!(written as u64 + lost, count as u64);
    }

    #[test]
    fn a_reader_that_goes_away_is_no_failure_and_may_come_back() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("events");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            &path,
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR,
            0,
        )
        .unwrap();
        let nobody = Events::append_to(&path).err().unwrap();
        assert_eq!(nobody.raw_os_error(), Some(libc::ENXIO));
        let open = || {
            OpenOptions::new()
                .read(true)
                .custom_flags(libc::O_NONBLOCK)
                .open(&path)
                .unwrap()
        };
        let first = open();
        let events = Events::append_to(&path).unwrap();
        drop(first);
        events.vm("paused");
        events.flush();
        assert_eq!(events.lost(), 1);
        let second = open();
        rustix::fs::fcntl_setfl(&second, rustix::fs::OFlags::empty()).unwrap();
        events.vm("resumed");
        events.flush();
        drop(events);
        let text = io::read_to_string(second).unwrap();
        assert!(text.contains(r#""event":"events-lost""#), "{text}");
        assert!(text.contains(r#""event":"resumed""#), "{text}");
    }
}
