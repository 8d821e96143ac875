//! Tests of the program `dirtier`: its audit passes if memory is intact, and it detects corruption.

use crate::machine::{Accelerator, Ended, Guest, everywhere};
use guest_images::dirtier::{Config, Fault, GuestReport, Pattern, Selftest, Size, Totals};
use guest_images::interface::{EXIT_BAD_REQUEST, EXIT_CRASH, EXIT_MEMORY_FAULT, EXIT_SUCCESS};

const MEMORY_MIB: u32 = 64;

fn mib(number: u32) -> Option<Size> {
    Some(Size::from_mib(number))
}

fn run(accelerator: Accelerator, config: &Config) -> Ended {
    Guest::dirtier(accelerator, MEMORY_MIB, &config.command_line().unwrap()).end()
}

fn reports(ended: &Ended) -> Vec<GuestReport> {
    let read =
        |line: &String| GuestReport::parse(line).unwrap_or_else(|| panic!("odd line: {line}"));
    ended.lines.iter().map(read).collect()
}

fn passed(passes: u64, pages: u64) -> GuestReport {
    GuestReport::AuditPassed(Totals {
        passes,
        pages,
        lost: 0,
        torn: 0,
    })
}

#[test]
fn every_pattern_passes_its_audit() {
    let hot = Config {
        hot: mib(1),
        cold: mib(2),
        ..Config::default()
    };
    let paced = Config {
        rate: Some(1_000_000),
        tsc_khz: Some(1_000_000),
        ..Config::default()
    };
    for (pattern, config, pages) in [
        (Pattern::Sequential, Config::default(), 8 * 256 * 40),
        (Pattern::Random, Config::default(), 8 * 256 * 40),
        // Page writes: 1 MiB in 40 passes, 5 MiB in the first pass and 39 strips of it, 2 MiB in the first pass.
        (
            Pattern::Hot,
            hot,
            256 * 40 + 5 * 256 + 5 * 16 * 39 + 2 * 256,
        ),
        (Pattern::Rate, paced, 8 * 256 * 40),
    ] {
        let config = Config {
            pattern,
            memory: mib(8),
            passes: Some(40),
            ..config
        };
        everywhere(|accelerator| {
            let ended = run(accelerator, &config);
            let ready = GuestReport::Ready {
                cpus: 1,
                area_mib: 8,
                pattern,
            };
            assert_eq!(reports(&ended), [ready, passed(40, pages)]);
            assert_eq!(ended.status, EXIT_SUCCESS);
        });
    }
}

#[test]
fn one_pass_one_page_and_all_memory_work() {
    everywhere(|accelerator| {
        for line in [
            "passes=1 memory=4K",
            "passes=2 memory=4K pattern=random",
            "passes=3",
        ] {
            let ended = Guest::dirtier(accelerator, MEMORY_MIB, line).end();
            assert_eq!(ended.status, EXIT_SUCCESS, "for {line}: {ended:?}");
        }
    });
}

#[test]
fn memory_on_both_sides_of_the_hole_below_4_gib_is_one_area() {
    // The machine has 3 GiB of RAM below the hole, and the area is at the end of RAM.
    for line in ["passes=3 memory=40M", "passes=3 memory=40M pattern=random"] {
        everywhere(|accelerator| {
            let ended = Guest::dirtier(accelerator, 3 * 1024 + 20, line).end();
            assert_eq!(reports(&ended)[1], passed(3, 3 * 40 * 256));
        });
    }
}

#[test]
fn a_working_set_limit_leaves_the_rest_cold() {
    let config = Config {
        memory: mib(8),
        hot: mib(2),
        passes: Some(11),
        ..Config::default()
    };
    everywhere(|accelerator| {
        let ended = run(accelerator, &config);
        assert_eq!(
            reports(&ended).last(),
            Some(&passed(11, 256 * (8 + 10 * 2)))
        );
    });
}

#[test]
fn commands_are_answered() {
    let config = Config {
        memory: mib(8),
        pattern: Pattern::Random,
        ..Config::default()
    };
    everywhere(|accelerator| {
        let line = config.command_line().unwrap();
        let mut guest = Guest::dirtier(accelerator, MEMORY_MIB, &line);
        assert!(matches!(
            guest.line().as_deref().and_then(GuestReport::parse),
            Some(GuestReport::Ready { .. })
        ));
        let mut earlier = 0;
        for _ in 0..3 {
            guest.send(b"\ns");
            let status = guest.line().as_deref().and_then(GuestReport::parse);
            let Some(GuestReport::Status(totals)) = status else {
                panic!("{status:?}")
            };
            assert!(totals.pages > earlier, "it works on");
            assert_eq!((totals.lost, totals.torn), (0, 0));
            earlier = totals.pages;
        }
        guest.send(b"q");
        let ended = guest.end();
        let Some(GuestReport::AuditPassed(totals)) = reports(&ended).last().copied() else {
            panic!("{ended:?}")
        };
        assert!(totals.pages >= earlier);
        assert_eq!(ended.status, EXIT_SUCCESS);
    });
}

#[test]
fn a_guest_that_is_stopped_early_audits_the_pages_that_it_has_written() {
    everywhere(|accelerator| {
        let mut guest = Guest::dirtier(accelerator, 512, "cold=200M");
        guest.send(b"q");
        let ended = guest.end();
        assert!(
            matches!(reports(&ended).last(), Some(GuestReport::AuditPassed(_))),
            "{ended:?}"
        );
        assert_eq!(ended.status, EXIT_SUCCESS);
    });
}

#[test]
fn quiet_prints_the_verdict_only() {
    let config = Config {
        memory: mib(1),
        passes: Some(2),
        quiet: true,
        ..Config::default()
    };
    everywhere(|accelerator| assert_eq!(reports(&run(accelerator, &config)), [passed(2, 512)]));
}

/// Runs a self-test. Returns the reports after `ready` and the exit status.
fn spoilt(accelerator: Accelerator, kind: Selftest, config: Config) -> (Vec<GuestReport>, u8) {
    let ended = run(
        accelerator,
        &Config {
            memory: mib(4),
            selftest: Some(kind),
            ..config
        },
    );
    let reports = reports(&ended);
    assert!(matches!(reports[0], GuestReport::Ready { .. }), "{ended:?}");
    (reports[1..].to_vec(), ended.status)
}

#[test]
fn a_lost_write_is_noticed_at_the_next_visit() {
    for pattern in [Pattern::Sequential, Pattern::Random, Pattern::Hot] {
        everywhere(|accelerator| {
            let config = Config {
                pattern,
                ..Config::default()
            };
            let (reports, status) = spoilt(accelerator, Selftest::Lost, config);
            assert!(
                matches!(
                    reports[..],
                    [GuestReport::LostWrite(
                        Fault {
                            cpu: 0,
                            expected: 3,
                            ..
                        },
                        2
                    )]
                ),
                "{reports:?}"
            );
            assert_eq!(status, EXIT_MEMORY_FAULT);
        });
    }
}

#[test]
fn a_torn_write_is_noticed_at_the_next_visit() {
    everywhere(|accelerator| {
        let (reports, status) = spoilt(accelerator, Selftest::Torn, Config::default());
        assert!(
            matches!(
                reports[..],
                [GuestReport::TornWrite(Fault { expected: 3, .. }, [3, 3, 2])]
            ),
            "{reports:?}"
        );
        assert_eq!(status, EXIT_MEMORY_FAULT);
    });
}

#[test]
fn the_audit_detects_damage_that_no_visit_has_seen() {
    let ends = Config {
        passes: Some(3),
        ..Config::default()
    };
    let cold = Config {
        passes: Some(5),
        cold: mib(1),
        ..Config::default()
    };
    everywhere(|accelerator| {
        for (kind, config, expected, found) in
            [(Selftest::Lost, &ends, 3, 2), (Selftest::Cold, &cold, 1, 0)]
        {
            let (reports, status) = spoilt(accelerator, kind, config.clone());
            let [
                GuestReport::LostWrite(fault, held),
                GuestReport::AuditFailed(totals),
            ] = reports[..]
            else {
                panic!("{reports:?}")
            };
            assert_eq!((fault.expected, held), (expected, found));
            assert_eq!((totals.lost, totals.torn), (1, 0));
            assert_eq!(status, EXIT_MEMORY_FAULT);
        }
        let (reports, _) = spoilt(accelerator, Selftest::Torn, ends.clone());
        assert!(
            matches!(
                reports[1],
                GuestReport::AuditFailed(Totals {
                    lost: 0,
                    torn: 1,
                    ..
                })
            ),
            "{reports:?}"
        );
    });
}

#[test]
fn the_loss_of_its_own_state_is_noticed() {
    everywhere(|accelerator| {
        let (reports, status) = spoilt(accelerator, Selftest::State, Config::default());
        assert!(
            matches!(
                reports[..],
                [GuestReport::LostWrite(Fault { expected: 4, .. }, 3)]
            ),
            "{reports:?}"
        );
        assert_eq!(status, EXIT_MEMORY_FAULT);
    });
}

#[test]
fn an_exception_says_where() {
    everywhere(|accelerator| {
        let ended = Guest::dirtier(accelerator, MEMORY_MIB, "memory=1M selftest=crash").end();
        let last = ended.lines.last().unwrap();
        assert!(
            last.starts_with("dirtier: EXCEPTION vector=6 error=0x0 rip=0x1"),
            "{last}"
        );
        assert_eq!(ended.status, EXIT_CRASH);
    });
}

#[test]
fn bad_command_lines_are_refused_by_name() {
    let long = "virtio_mmio.device=x ".repeat(100);
    for (line, complaint) in [
        ("cpus=0", "cpus: must be 1 to 16"),
        (
            "memory=7",
            "memory: must be a multiple of 4K such as 64M, 4K or 1G, found \"7\"",
        ),
        (
            "pattern=odd",
            "pattern: must be sequential, random, hot or rate, found \"odd\"",
        ),
        ("colour=red", "colour: unknown key"),
        ("pattern=rate", "rate: must be given with pattern=rate"),
        (
            "hot=1M memory=512K",
            "hot: more than the 512K that there is",
        ),
        (
            &long,
            "command line of more than 2047 bytes, or above 4 GiB",
        ),
    ] {
        everywhere(|accelerator| {
            let ended = Guest::dirtier(accelerator, MEMORY_MIB, line).end();
            assert_eq!(ended.lines, [format!("dirtier: cannot start: {complaint}")]);
            assert_eq!(ended.status, EXIT_BAD_REQUEST);
        });
    }
}

#[test]
fn too_much_memory_is_refused_with_the_usable_size() {
    everywhere(|accelerator| {
        let ended = Guest::dirtier(accelerator, MEMORY_MIB, "memory=65M").end();
        let line = &ended.lines[0];
        assert!(
            line.starts_with("dirtier: cannot start: memory: more than the 6"),
            "{line}"
        );
        assert_eq!(ended.status, EXIT_BAD_REQUEST);
    });
}

#[test]
fn vcpus_that_never_start_are_reported() {
    everywhere(|accelerator| {
        let mut guest = Guest::dirtier(accelerator, MEMORY_MIB, "cpus=2 memory=1M passes=2");
        let line = guest.line().unwrap();
        assert!(
            line.starts_with("dirtier: waiting, 1 of cpus=2 started"),
            "{line}"
        );
        // After `q` it no longer waits for them.
        guest.send(b"q");
        let ended = guest.end();
        assert_eq!(reports_after(&ended, 1), [passed(0, 128)]);
        assert_eq!(ended.status, EXIT_SUCCESS);
    });
}

fn reports_after(ended: &Ended, skipped: usize) -> Vec<GuestReport> {
    ended.lines[skipped..]
        .iter()
        .filter_map(|line| GuestReport::parse(line))
        .collect()
}
