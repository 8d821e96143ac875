//! Disk of 64 KiB.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Block::default()));
