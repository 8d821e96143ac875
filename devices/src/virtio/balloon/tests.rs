//! A memory balloon and its driver, with a [`Discard`] that records the pages.

use std::sync::mpsc;
use std::time::Duration;

use super::super::testing::*;
use super::*;

type Ranges = Vec<Range<u64>>;

const PATIENCE: Duration = Duration::from_secs(20);

/// Records the discarded ranges. With a gate, each call waits until the test opens it.
struct Recorder {
    discarded: mpsc::Sender<Ranges>,
    gate: Option<mpsc::Receiver<()>>,
    fails: bool,
}

impl Discard for Recorder {
    fn discard(&mut self, ranges: &[Range<u64>], _: &dyn Fn() -> bool) -> io::Result<()> {
        self.discarded
            .send(ranges.to_vec())
            .map_err(io::Error::other)?;
        if let Some(gate) = &self.gate {
            gate.recv_timeout(PATIENCE).map_err(io::Error::other)?;
        }
        if self.fails {
            return Err(io::ErrorKind::OutOfMemory.into());
        }
        Ok(())
    }
}

const ALL: BalloonOptions = BalloonOptions {
    target_pages: 7,
    deflate_on_oom: true,
    free_page_reporting: true,
};

fn balloon(
    interrupt: Interrupt,
    gate: Option<mpsc::Receiver<()>>,
    fails: bool,
) -> (Balloon, BalloonControl, mpsc::Receiver<Ranges>) {
    let (sender, receiver) = mpsc::channel();
    let recorder = Recorder {
        discarded: sender,
        gate,
        fails,
    };
    let (balloon, control) = Balloon::new(ALL, Box::new(recorder), interrupt);
    (balloon, control, receiver)
}

fn started(
    gate: Option<mpsc::Receiver<()>>,
    fails: bool,
) -> (Driver, BalloonControl, mpsc::Receiver<Ranges>) {
    let mut parts = None;
    let mut driver = Driver::new(|interrupt| {
        let (balloon, control, discarded) = balloon(interrupt, gate, fails);
        parts = Some((control, discarded));
        Box::new(balloon)
    });
    driver.start(EVENT_INDEX | DEFLATE_ON_OOM | REPORTING);
    let (control, discarded) = parts.unwrap();
    (driver, control, discarded)
}

fn name_pages(driver: &Driver, pages: &[u32]) -> Part {
    let bytes: Vec<u8> = pages.iter().flat_map(|page| page.to_le_bytes()).collect();
    driver.write_memory(DATA, &bytes);
    Part::Out(DATA, u32::try_from(bytes.len()).unwrap())
}

#[test]
fn its_size_is_asked_for_and_told() {
    let (mut driver, control, _discarded) = started(None, false);
    assert_eq!(driver.get(8), 5);
    assert_eq!(driver.config::<8>(0), [7, 0, 0, 0, 0, 0, 0, 0]);
    driver.was_interrupted();
    control.set_target(0x1234);
    assert!(driver.was_interrupted());
    assert_eq!(driver.get(0x60), 2);
    assert_eq!(driver.config::<4>(0), [0x34, 0x12, 0, 0]);
    driver.set(0x104, 99);
    assert_eq!((control.target(), control.actual()), (0x1234, 99));
    // The driver cannot write the target.
    driver.set(0x100, 1);
    driver.set(0x108, 1);
    assert_eq!((control.target(), control.actual()), (0x1234, 99));
    driver.start(0);
    assert_eq!((control.target(), control.actual()), (0x1234, 0));
}

#[test]
fn neighbouring_pages_leave_as_one_range() {
    let (mut driver, _control, discarded) = started(None, false);
    let high = u32::try_from(HIGH / PAGE_BYTES).unwrap();
    let pages = name_pages(&driver, &[9, 3, 2, 4, high, 8, 3, 20]);
    assert_eq!(driver.request(0, &[pages]), 0);
    assert_eq!(
        discarded.try_recv().unwrap(),
        [
            0x2000..0x5000,
            0x8000..0xa000,
            0x1_4000..0x1_5000,
            HIGH..HIGH + 0x1000
        ]
    );
    let pages = name_pages(&driver, &[2, 3]);
    driver.request(1, &[pages]);
    assert!(discarded.try_recv().is_err());
    let counters = driver.device.counters();
    assert_eq!(
        counters[..2],
        [("inflated_pages", 7), ("deflated_pages", 2)]
    );
}

#[test]
fn reported_memory_leaves_in_whole_pages() {
    let (mut driver, _control, discarded) = started(None, false);
    let parts = [
        Part::In(0x30_0000, 0x4000),
        Part::In(0x20_0800, 0x3000),
        Part::In(0x30_4000, 0x1000),
        Part::In(0x40_0001, 0x1000),
        Part::In(0x30_2000, 0x1000),
    ];
    assert_eq!(driver.request(2, &parts), 0);
    assert_eq!(
        discarded.try_recv().unwrap(),
        [0x20_1000..0x20_3000, 0x30_0000..0x30_5000]
    );
    assert!(driver.device.counters().contains(&("reported_pages", 7)));
}

#[test]
fn pages_that_cannot_leave_are_counted() {
    let (mut driver, _control, discarded) = started(None, true);
    let pages = name_pages(&driver, &[1]);
    driver.request(0, &[pages]);
    driver.request(2, &[Part::In(0x30_0000, 0x1000)]);
    assert_eq!(discarded.try_iter().count(), 2);
    assert!(driver.device.counters().contains(&("errors", 2)));
    assert_eq!(driver.device.failure(), None);
}

#[test]
fn pages_that_are_not_the_guests_need_a_reset_and_nothing_leaves() {
    let hole = u32::try_from(LOW_END / PAGE_BYTES).unwrap();
    for (queue, pages) in [(0, vec![1, hole]), (0, vec![u32::MAX]), (0, vec![0, 1, 2])] {
        let (mut driver, _control, discarded) = started(None, false);
        let mut part = name_pages(&driver, &pages);
        if pages == [0, 1, 2] {
            part = Part::Out(DATA, 11);
        }
        driver.add(queue, &[part]);
        driver.notify(queue);
        driver.wait_needs_reset();
        assert!(discarded.try_recv().is_err());
        driver.start(0);
        let good = name_pages(&driver, &[1]);
        driver.request(0, &[good]);
        assert_eq!(discarded.try_iter().count(), 1);
    }
    for (queue, part) in [
        (0, Part::In(DATA, 4)),
        (1, Part::In(DATA, 4)),
        (2, Part::Out(DATA, 4096)),
        (0, Part::Out(DATA, 16_385 * 4)),
    ] {
        let (mut driver, _control, discarded) = started(None, false);
        driver.add(queue, &[part]);
        driver.notify(queue);
        driver.wait_needs_reset();
        assert!(discarded.try_recv().is_err());
    }
}

#[test]
fn a_reset_does_not_wait_for_pages_on_their_way() {
    let (open, gate) = mpsc::channel();
    let (mut driver, _control, discarded) = started(Some(gate), false);
    let pages = name_pages(&driver, &[1]);
    driver.add(0, &[pages]);
    driver.notify(0);
    discarded.recv_timeout(PATIENCE).unwrap();
    // The worker is in `discard` now, which may wait for this vCPU.
    driver.set(0x70, 0);
    let used = driver.rings[0].used();
    assert_eq!(driver.get(0x70), 0);
    driver.start(0);
    open.send(()).unwrap();
    open.send(()).unwrap();
    let pages = name_pages(&driver, &[2]);
    driver.request(0, &[pages]);
    // The request from before the reset must not appear in the used ring.
    assert_eq!(driver.read_memory(used + 2, 2), [1, 0]);
}

#[test]
fn a_pause_waits_for_pages_on_their_way() {
    let (open, gate) = mpsc::channel();
    let (mut driver, _control, discarded) = started(Some(gate), false);
    let pages = name_pages(&driver, &[1]);
    let head = driver.add(0, &[pages]);
    driver.notify(0);
    discarded.recv_timeout(PATIENCE).unwrap();
    std::thread::scope(|scope| {
        let device = &driver.device;
        let paused = scope.spawn(|| device.pause());
        open.send(()).unwrap();
        paused.join().unwrap();
    });
    assert_eq!(driver.used(0), Some((head, 0)));
    assert_eq!(
        driver.device.save().unwrap().transport.queues[0].next_used,
        1
    );
}

#[test]
fn a_guest_moves_with_its_balloon() {
    let (mut driver, control, _discarded) = started(None, false);
    control.set_target(50);
    driver.set(0x104, 40);
    driver.device.pause();
    let saved = driver.device.save().unwrap();
    let mut there = None;
    let mut driver = driver.moved(&saved, |interrupt| {
        let (balloon, control, discarded) = balloon(interrupt, None, false);
        there = Some((control, discarded));
        Box::new(balloon)
    });
    driver.device.resume();
    let (control, discarded) = there.unwrap();
    assert_eq!((control.target(), control.actual()), (50, 40));
    let pages = name_pages(&driver, &[5]);
    driver.request(0, &[pages]);
    assert_eq!(
        discarded.try_recv().unwrap().first(),
        Some(&(0x5000..0x6000))
    );
}

#[test]
fn features_are_offered_as_configured() {
    let mut driver = Driver::new(|interrupt| {
        let (sender, _) = mpsc::channel();
        let recorder = Recorder {
            discarded: sender,
            gate: None,
            fails: false,
        };
        Box::new(Balloon::new(BalloonOptions::default(), Box::new(recorder), interrupt).0)
    });
    assert_eq!(driver.offered() & 0xff, 0);
    assert_eq!(driver.device.notifiers().len(), 2);
}
