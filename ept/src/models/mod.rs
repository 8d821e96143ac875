//! Models: small programs of two or three threads. The model checker `loom` runs them in every order with at most three
//! preemptions, and with every value that a load may return.
//!
//!     RUSTFLAGS="--cfg loom" cargo test --release -p ferry-ept --lib models
//!

extern crate std;

mod blocks;
mod harvest;
mod hotplug;
mod notifier;
mod reclaim;
mod small;
mod tracker;
mod turns;
mod walker;

use alloc::sync::Arc;
use core::sync::atomic::{AtomicUsize, Ordering};
use std::println;

use loom::model::Builder;
use loom::thread::JoinHandle;

/// Maximum number of preemptions in one order: switches away from a thread that could run on.
const PREEMPTIONS: usize = 3;

/// Stack of a thread, in words. Tables are built on it.
const STACK: usize = 1 << 17;

/// Starts a thread of a model.
fn spawn<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> JoinHandle<T> {
    let builder = loom::thread::Builder::new().stack_size(STACK);
    builder.spawn(work).expect("a model has few threads")
}

/// Runs `model` in every order, and panics if there are fewer than `least` orders: the model would prove nothing then.
fn explore(name: &str, least: usize, model: impl Fn() + Send + Sync + 'static) {
    let orders = Arc::new(AtomicUsize::new(0));
    let counted = Arc::clone(&orders);
    let mut builder = Builder::new();
    builder.preemption_bound = Some(PREEMPTIONS);
    builder.max_branches = 100_000;
    let model = Arc::new(model);
    builder.check(move || {
        counted.fetch_add(1, Ordering::Relaxed);
        let model = Arc::clone(&model);
        // A thread of its own, for its stack.
        spawn(move || model()).join().unwrap();
    });
    let orders = orders.load(Ordering::Relaxed);
    println!("{name}: {orders} orders");
    assert!(orders >= least, "{name}: only {orders} orders");
}
