//! Memory balloon, whose discarded pages must be guest memory.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Balloon::default()));
