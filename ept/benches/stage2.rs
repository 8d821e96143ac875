//! P1 to P5 under criterion: hardware tables, beside the plain loop and other people's crates.
//!
//!     cargo bench -p ferry-ept --bench stage2
//!
//! The table of ratios is another program's: `cargo bench -p ferry-ept --bench ratios`.
#![allow(missing_docs, reason = "the macro makes a public function")]

mod contest;
mod criterion_run;
mod peers;

use criterion::{Criterion, criterion_group, criterion_main};

fn tables(criterion: &mut Criterion) {
    criterion_run::figures(criterion, &contest::table_figures());
}

criterion_group! {
    name = benches;
    config = criterion_run::config();
    targets = tables
}
criterion_main!(benches);
