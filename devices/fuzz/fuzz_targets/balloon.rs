//! A balloon, and pages that must be the guest's.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Balloon::default()));
