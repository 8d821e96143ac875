//! Any word at any level of any format: what it is decoded to, and what the format promises of it.
#![no_main]

libfuzzer_sys::fuzz_target!(|input: fuzz::decode::Raw| input.run());
