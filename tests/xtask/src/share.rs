//! Runs steps side by side: lanes of builds, and jobs that keep one processor busy each.

use std::num::NonZero;
use std::sync::{Mutex, PoisonError};
use std::thread;

/// Runs two functions at the same time and returns both results.
pub(crate) fn both<A: Send, B>(
    one: impl FnOnce() -> A + Send,
    other: impl FnOnce() -> B,
) -> (A, B) {
    thread::scope(|scope| {
        let one = scope.spawn(one);
        let other = other();
        match one.join() {
            Ok(one) => (one, other),
            Err(panic) => std::panic::resume_unwind(panic),
        }
    })
}

/// Work for one processor.
pub(crate) struct Job<'a> {
    /// About how long it takes on an idle processor, which decides the order only.
    seconds: u32,
    run: Box<dyn FnOnce() + Send + 'a>,
}

impl<'a> Job<'a> {
    pub(crate) fn new(seconds: u32, run: impl FnOnce() + Send + 'a) -> Self {
        let run = Box::new(run);
        Self { seconds, run }
    }
}

/// Runs all jobs, as many at a time as there are processors, the longest first.
pub(crate) fn jobs(mut jobs: Vec<Job<'_>>) {
    jobs.sort_by_key(|job| job.seconds);
    let queue = Mutex::new(jobs);
    let next = || queue.lock().unwrap_or_else(PoisonError::into_inner).pop();
    thread::scope(|scope| {
        for _ in 0..thread::available_parallelism().map_or(1, NonZero::get) {
            scope.spawn(|| {
                while let Some(job) = next() {
                    (job.run)();
                }
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_job_runs_once() {
        let ran = Mutex::new(Vec::new());
        let job = |seconds| {
            let ran = &ran;
            Job::new(seconds, move || ran.lock().unwrap().push(seconds))
        };
        jobs((0..50).map(job).collect());
        let mut ran = ran.into_inner().unwrap();
        ran.sort_unstable();
        assert!(ran.into_iter().eq(0..50));
    }
}
