//! The sequence protocol: who works from a translation notices that it changed.

use alloc::sync::Arc;

use super::small::pages;
use super::{explore, spawn};
use crate::addr::GpaRange;
use crate::notify::{Notifier, Subscriber, Unresponsive};
use crate::sync::SpinLock;
use crate::sync::atomic::{AtomicU64, Ordering};

/// S11: a reader that is told "not stale", under the lock that changes are made under, has used what is there still.
#[test]
fn a_reader_notices_a_change() {
    explore("notifier against reader", 20, || {
        let notifier = Notifier::new();
        let translation = Arc::new(AtomicU64::new(1));
        let lock = Arc::new(SpinLock::new(()));
        let changer = {
            let (notifier, translation, lock) =
                (notifier.clone(), translation.clone(), lock.clone());
            spawn(move || {
                let open = notifier.open(pages(0, 4)).unwrap();
                let guard = lock.lock();
                translation.store(2, Ordering::Relaxed);
                drop(guard);
                drop(open);
            })
        };
        let ticket = notifier.begin_read(pages(3, 1));
        let used = translation.load(Ordering::Relaxed);
        let guard = lock.lock();
        if !notifier.retry(&ticket) {
            assert_eq!(used, translation.load(Ordering::Relaxed));
        }
        drop(guard);
        drop(ticket);
        changer.join().unwrap();
    });
}

/// S11: changes elsewhere cause no retry.
#[test]
fn a_change_elsewhere_disturbs_nobody() {
    explore("notifier against a reader elsewhere", 10, || {
        let notifier = Notifier::new();
        let changer = {
            let notifier = notifier.clone();
            spawn(move || drop(notifier.open(pages(4, 4)).unwrap()))
        };
        let ticket = notifier.begin_read(pages(3, 1));
        assert!(!notifier.retry(&ticket));
        drop(ticket);
        changer.join().unwrap();
    });
}

/// A vCPU that may be in the guest.
struct Vcpu {
    /// Starts without their ends.
    held: AtomicU64,
    starts: AtomicU64,
}

impl Subscriber for Vcpu {
    fn start(&self, _: GpaRange) {
        self.held.fetch_add(1, Ordering::SeqCst);
        self.starts.fetch_add(1, Ordering::SeqCst);
    }

    fn wait(&self, _: GpaRange) -> Result<(), Unresponsive> {
        Ok(())
    }

    fn stopped(&self, _: GpaRange) -> bool {
        true
    }

    fn end(&self, _: GpaRange) {
        let before = self.held.fetch_sub(1, Ordering::SeqCst);
        assert!(before > 0, "an end without a start");
    }
}

/// S13: who subscribes while ranges open and close is told of each as a pair, or not at all; and never runs when told
/// that it must not.
#[test]
fn starts_and_ends_are_pairs() {
    explore("notifier against subscriber", 10, || {
        let notifier = Notifier::new();
        let vcpu = Arc::new(Vcpu {
            held: AtomicU64::new(0),
            starts: AtomicU64::new(0),
        });
        let changer = {
            let notifier = notifier.clone();
            spawn(move || drop(notifier.open(pages(0, 4)).unwrap()))
        };
        let subscription = notifier.subscribe(vcpu.clone() as _).unwrap();
        changer.join().unwrap();
        assert_eq!(vcpu.held.load(Ordering::SeqCst), 0);
        assert!(vcpu.starts.load(Ordering::SeqCst) <= 1);
        drop(notifier.open(pages(0, 1)).unwrap());
        assert!(
            vcpu.starts.load(Ordering::SeqCst) >= 1,
            "it is subscribed now"
        );
        drop(subscription);
        let starts = vcpu.starts.load(Ordering::SeqCst);
        drop(notifier.open(pages(0, 1)).unwrap());
        assert_eq!(vcpu.starts.load(Ordering::SeqCst), starts);
    });
}
