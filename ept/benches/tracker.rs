//! P6 to P8 under criterion: the tracker, beside other people's bitmaps.
//!
//!     cargo bench -p ferry-ept --bench tracker
//!
//! The table of ratios is another program's: `cargo bench -p ferry-ept --bench ratios`.
#![allow(missing_docs, reason = "the macro makes a public function")]

mod contest;
mod criterion_run;
mod peers;

use criterion::{Criterion, criterion_group, criterion_main};

fn tracker(criterion: &mut Criterion) {
    criterion_run::figures(criterion, &contest::tracker_figures());
}

criterion_group! {
    name = benches;
    config = criterion_run::config();
    targets = tracker
}
criterion_main!(benches);
