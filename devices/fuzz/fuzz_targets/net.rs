//! Network device, whose tap is a pair of sockets.
#![no_main]

libfuzzer_sys::fuzz_target!(|script: fuzz::Script| script.run(&mut fuzz::hosts::Net::default()));
