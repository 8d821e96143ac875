//! Any marks, protections and harvests of a tracker, against sets of pages.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: fuzz::tracker::Script| input.run());
