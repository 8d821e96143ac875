//! Entropy device.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Rng::default()));
