//! Notifier ranges (S10 to S14).

mod common;

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread;

use common::{config, pages};
use ept::{GpaRange, Notifier, OpenError, OpenRange, Subscriber, Unresponsive};
use proptest::prelude::*;

/// Writes down what it is told.
#[derive(Default)]
struct Witness {
    name: &'static str,
    heard: Mutex<Vec<(&'static str, GpaRange)>>,
    deaf: AtomicBool,
    busy: AtomicBool,
    panics: AtomicBool,
}

impl Witness {
    fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            ..Self::default()
        })
    }

    fn hear(&self, what: &'static str, range: GpaRange) {
        self.heard.lock().unwrap().push((what, range));
    }

    fn heard(&self) -> Vec<&'static str> {
        self.heard
            .lock()
            .unwrap()
            .iter()
            .map(|(what, _)| *what)
            .collect()
    }
}

impl Subscriber for Witness {
    fn start(&self, range: GpaRange) {
        self.hear("start", range);
        assert!(!self.panics.load(Ordering::SeqCst), "asked to");
    }

    fn wait(&self, range: GpaRange) -> Result<(), Unresponsive> {
        self.hear("wait", range);
        if self.deaf.load(Ordering::SeqCst) {
            return Err(Unresponsive::new(self.name));
        }
        Ok(())
    }

    fn stopped(&self, _: GpaRange) -> bool {
        !self.busy.load(Ordering::SeqCst)
    }

    fn end(&self, range: GpaRange) {
        self.hear("end", range);
    }
}

/// S12: two passes, so that the kicks overlap; then the end.
#[test]
fn s12_all_start_before_any_is_waited_for() {
    let notifier = Notifier::new();
    let order = Arc::new(Mutex::new(Vec::new()));

    struct Ordered(usize, Arc<Mutex<Vec<(&'static str, usize)>>>);
    impl Subscriber for Ordered {
        fn start(&self, _: GpaRange) {
            self.1.lock().unwrap().push(("start", self.0));
        }
        fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
            self.1.lock().unwrap().push(("wait", self.0));
            Ok(())
        }
        fn stopped(&self, _: GpaRange) -> bool {
            true
        }
        fn end(&self, _: GpaRange) {
            self.1.lock().unwrap().push(("end", self.0));
        }
    }

    let subscribe = |number| {
        notifier
            .subscribe(Arc::new(Ordered(number, order.clone())))
            .unwrap()
    };
    let _subscriptions = [0, 1, 2].map(subscribe);
    drop(notifier.open(pages(0, 1)).unwrap());
    let heard: Vec<&str> = order
        .lock()
        .unwrap()
        .iter()
        .map(|(what, _)| *what)
        .collect();
    assert_eq!(
        heard,
        [
            "start", "start", "start", "wait", "wait", "wait", "end", "end", "end"
        ]
    );
}

/// S10: ranges nest and overlap, and each ends once.
#[test]
fn s10_ranges_nest_and_overlap() {
    let notifier = Notifier::new();
    let vcpu = Witness::new("vcpu0");
    let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
    let outer = notifier.open(pages(0, 100)).unwrap();
    let inner = notifier.open(pages(10, 20)).unwrap();
    let across = notifier.open(pages(90, 200)).unwrap();
    assert_eq!(notifier.open_count(), 3);
    drop(outer);
    drop(across);
    drop(inner);
    assert_eq!(notifier.open_count(), 0);
    let ends = vcpu.heard().iter().filter(|what| **what == "end").count();
    assert_eq!(ends, 3);
}

/// S10: a panic inside closes the range.
#[test]
fn s10_a_panic_closes_the_range() {
    let notifier = Notifier::new();
    let vcpu = Witness::new("vcpu0");
    let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _open = notifier.open(pages(0, 1)).unwrap();
        panic!("half-way through");
    }));
    assert!(unwound.is_err());
    assert_eq!(notifier.open_count(), 0);
    assert_eq!(vcpu.heard(), ["start", "wait", "end"]);
}

/// S10: a subscriber that panics leaves nothing open, and who was told is told the end.
#[test]
fn s10_a_panicking_subscriber_leaves_nothing_open() {
    let notifier = Notifier::new();
    let (first, second, third) = (Witness::new("a"), Witness::new("b"), Witness::new("c"));
    let _subscriptions =
        [&first, &second, &third].map(|one| notifier.subscribe(one.clone()).unwrap());
    second.panics.store(true, Ordering::SeqCst);
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _open = notifier.open(pages(0, 1));
    }));
    assert!(unwound.is_err());
    assert_eq!(notifier.open_count(), 0);
    assert_eq!(first.heard(), ["start", "end"]);
    assert_eq!(second.heard(), ["start", "end"]);
    assert!(third.heard().is_empty());
}

/// S12: who does not answer is named, and everybody is told the end.
#[test]
fn s12_who_does_not_answer_is_named() {
    let notifier = Notifier::new();
    let (good, bad) = (Witness::new("vcpu0"), Witness::new("vcpu3"));
    let _subscriptions = [&good, &bad].map(|one| notifier.subscribe(one.clone()).unwrap());
    bad.deaf.store(true, Ordering::SeqCst);
    let error = notifier.open(pages(0, 1)).unwrap_err();
    assert_eq!(
        error,
        OpenError::Unresponsive(vec![Unresponsive::new("vcpu3")])
    );
    assert_eq!(error.to_string(), "vcpu3 did not stop in time");
    assert_eq!(notifier.open_count(), 0);
    assert_eq!(good.heard(), ["start", "wait", "end"]);
    assert_eq!(bad.heard(), ["start", "wait", "end"]);
}

/// S10: who must not block is refused instead.
#[test]
fn s10_try_open_refuses_instead_of_waiting() {
    let notifier = Notifier::new();
    let vcpu = Witness::new("vcpu0");
    let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
    vcpu.busy.store(true, Ordering::SeqCst);
    assert_eq!(
        notifier.try_open(pages(0, 1)).unwrap_err(),
        OpenError::WouldBlock(1)
    );
    assert_eq!(vcpu.heard(), ["start", "end"]);
    vcpu.busy.store(false, Ordering::SeqCst);
    drop(notifier.try_open(pages(0, 1)).unwrap());
    assert_eq!(vcpu.heard(), ["start", "end", "start", "end"]);
}

/// S13: who comes while a range is open hears its start and its end; who goes is not waited for
/// and still hears the end.
#[test]
fn s13_subscribers_come_and_go_while_ranges_are_open() {
    let notifier = Notifier::new();
    let open = notifier.open(pages(0, 10)).unwrap();
    let late = Witness::new("late");
    let subscription = notifier.subscribe(late.clone()).unwrap();
    assert_eq!(late.heard(), ["start"]);
    drop(open);
    assert_eq!(late.heard(), ["start", "end"]);

    let open = notifier.open(pages(0, 10)).unwrap();
    drop(subscription);
    drop(open);
    assert_eq!(late.heard(), ["start", "end", "start", "wait", "end"]);
    drop(notifier.open(pages(0, 10)).unwrap());
    assert_eq!(late.heard().len(), 5);
    assert_eq!(Arc::strong_count(&late), 1);
}

/// S13: a subscriber that panics while it joins hears the end of what it was told, and of no more.
#[test]
fn s13_who_panics_while_joining_hears_no_end_too_many() {
    let notifier = Notifier::new();
    let open = [pages(0, 10), pages(5, 20)].map(|range| notifier.open(range).unwrap());
    let late = Witness::new("late");
    late.panics.store(true, Ordering::SeqCst);
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let _subscription = notifier.subscribe(late.clone());
    }));
    assert!(unwound.is_err());
    drop(open);
    assert_eq!(late.heard(), ["start", "end"]);
    assert_eq!(Arc::strong_count(&late), 1);
}

/// S11: exactly the ranges that overlap a reader's make it retry, open before or after it began.
#[test]
fn s11_only_overlapping_ranges_cause_a_retry() {
    let notifier = Notifier::new();
    let ticket = notifier.begin_read(pages(10, 20));
    drop(notifier.open(pages(0, 10)).unwrap());
    drop(notifier.open(pages(20, 30)).unwrap());
    assert!(!notifier.retry(&ticket));
    let open = notifier.open(pages(19, 30)).unwrap();
    assert!(notifier.retry(&ticket));
    let during = notifier.begin_read(pages(0, 25));
    let beside = notifier.begin_read(pages(0, 19));
    drop(open);
    assert!(notifier.retry(&ticket) && notifier.retry(&during));
    assert!(!notifier.retry(&beside));
    assert!(!notifier.retry(&notifier.begin_read(pages(10, 20))));
}

#[derive(Clone, Debug)]
enum Step {
    Open(u64, u64),
    Close(usize),
    Read(u64, u64),
}

fn any_step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0..20_u64, 1..6_u64).prop_map(|(first, count)| Step::Open(first, first + count)),
        (0..8_usize).prop_map(Step::Close),
        (0..20_u64, 1..6_u64).prop_map(|(first, count)| Step::Read(first, first + count)),
    ]
}

proptest! {
    #![proptest_config(config(200))]

    /// S10, S11: tickets are stale exactly if an overlapping range was open after they were given;
    /// starts and ends balance.
    #[test]
    fn s11_tickets_match_a_naive_list(steps in prop::collection::vec(any_step(), 1..40)) {
        let notifier = Notifier::new();
        let vcpu = Witness::new("vcpu0");
        let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
        let mut open: Vec<OpenRange> = Vec::new();
        let mut readers = Vec::new();
        for step in steps {
            match step {
                Step::Open(first, end) => {
                    let range = pages(first, end);
                    open.push(notifier.open(range).unwrap());
                    readers.iter_mut().for_each(|(_, stale, other): &mut (_, bool, GpaRange)| {
                        *stale |= other.overlaps(&range);
                    });
                }
                Step::Close(index) if index < open.len() => drop(open.swap_remove(index)),
                Step::Close(_) => {}
                Step::Read(first, end) => {
                    let range = pages(first, end);
                    let stale = open.iter().any(|one| one.range().overlaps(&range));
                    readers.push((notifier.begin_read(range), stale, range));
                }
            }
            prop_assert_eq!(notifier.open_count(), open.len());
            for (ticket, stale, _) in &readers {
                prop_assert_eq!(notifier.retry(ticket), *stale);
            }
        }
        drop(open);
        let count = |wanted| vcpu.heard().iter().filter(|what| **what == wanted).count();
        prop_assert_eq!(count("start"), count("end"));
    }
}

/// A vCPU that may use a translation only while no range is open for it.
#[derive(Default)]
struct Vcpu {
    stops: AtomicU64,
    inside: AtomicBool,
}

impl Subscriber for Vcpu {
    fn start(&self, _: GpaRange) {
        self.stops.fetch_add(1, Ordering::SeqCst);
    }

    fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
        while self.inside.load(Ordering::SeqCst) {
            thread::yield_now();
        }
        Ok(())
    }

    fn stopped(&self, _: GpaRange) -> bool {
        !self.inside.load(Ordering::SeqCst)
    }

    fn end(&self, _: GpaRange) {
        self.stops.fetch_sub(1, Ordering::SeqCst);
    }
}

/// S12, S13: with vCPUs that come, run and go, nobody is inside while a change is made.
#[test]
fn s12_nobody_runs_inside_an_open_range() {
    let notifier = Notifier::new();
    let changing = AtomicBool::new(false);
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !done.load(Ordering::SeqCst) {
                    let vcpu = Arc::new(Vcpu::default());
                    let _subscription = notifier.subscribe(vcpu.clone()).unwrap();
                    for _ in 0..200 {
                        vcpu.inside.store(true, Ordering::SeqCst);
                        if vcpu.stops.load(Ordering::SeqCst) == 0 {
                            assert!(!changing.load(Ordering::SeqCst));
                        }
                        vcpu.inside.store(false, Ordering::SeqCst);
                    }
                }
            });
        }
        for _ in 0..2000 {
            let open = notifier.open(pages(0, 512)).unwrap();
            changing.store(true, Ordering::SeqCst);
            changing.store(false, Ordering::SeqCst);
            drop(open);
        }
        done.store(true, Ordering::SeqCst);
    });
    assert_eq!(notifier.open_count(), 0);
}

/// S10: whoever panics at the end keeps the end from nobody else.
#[test]
fn s10_a_panic_at_the_end_leaves_nobody_stopped() {
    struct Fails;
    impl Subscriber for Fails {
        fn start(&self, _: GpaRange) {}
        fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
            Ok(())
        }
        fn stopped(&self, _: GpaRange) -> bool {
            true
        }
        fn end(&self, _: GpaRange) {
            panic!("at the end");
        }
    }
    let notifier = Notifier::new();
    let (first, last) = (Witness::new("first"), Witness::new("last"));
    let _first = notifier.subscribe(first.clone()).unwrap();
    let _fails = notifier.subscribe(Arc::new(Fails)).unwrap();
    let _last = notifier.subscribe(last.clone()).unwrap();
    let open = notifier.open(pages(1, 3)).unwrap();
    let unwound = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| drop(open)));
    assert!(unwound.is_err());
    for witness in [first, last] {
        assert_eq!(witness.heard(), ["start", "wait", "end"]);
    }
}
