//! Tests of the program `hello`.

use crate::machine::{Guest, everywhere};

#[test]
fn it_prints_its_line_and_exits() {
    everywhere(|accelerator| {
        let ended = Guest::hello(accelerator, 128, "cpus=1 greeting=\"x\"").end();
        // The first MiB has a hole from 640 KiB on.
        let line =
            "hello from ferry guest: cpus=1 memory=127 MiB cmdline=\"cpus=1 greeting=\"x\"\"";
        assert_eq!(ended.lines, [line]);
        assert_eq!(ended.status, 0);
    });
}

#[test]
fn it_counts_the_vcpus_that_started() {
    everywhere(|accelerator| {
        let ended = Guest::hello(accelerator, 64, "cpus=2").end();
        assert_eq!(
            ended.lines,
            ["hello from ferry guest: cpus=1 memory=63 MiB cmdline=\"cpus=2\""]
        );
    });
}

#[test]
fn it_counts_memory_above_4_gib() {
    everywhere(|accelerator| {
        let ended = Guest::hello(accelerator, 5000, "").end();
        assert_eq!(
            ended.lines,
            ["hello from ferry guest: cpus=1 memory=4999 MiB cmdline=\"\""]
        );
    });
}

#[test]
fn unprintable_bytes_do_not_split_its_line() {
    everywhere(|accelerator| {
        let ended = Guest::hello(accelerator, 64, "a\nb\tc\u{7f}\u{e9}").end();
        assert_eq!(
            ended.lines,
            ["hello from ferry guest: cpus=1 memory=63 MiB cmdline=\"a?b?c???\""]
        );
    });
}
