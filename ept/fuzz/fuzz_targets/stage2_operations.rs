//! Any operations on tables of any format, against a list of pages and a reader of the raw words.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: fuzz::stage2::Script| input.run());
