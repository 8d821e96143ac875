//! Socket device, with a host that connects and one that listens.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Vsock::default()));
