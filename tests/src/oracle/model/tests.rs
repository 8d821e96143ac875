use super::*;

const READ_WRITE: Permissions = Permissions::READ.union(Permissions::WRITE);

/// Three levels, the root one of 1 GiB entries.
const SHAPE: Shape = Shape {
    root_level: 2,
    root_entries: 4,
    largest_leaf: 2,
    hpa_bits: 40,
    permissions: &[Permissions::READ, READ_WRITE],
    memory: &[MemoryType::WriteBack],
    no_memory: MemoryType::Other(7),
    breaks: false,
    caches_faults: false,
};

const MIB2: u64 = 512;
const GIB: u64 = 512 * 512;

fn map(range: Pages, hpa: u64, largest: u32) -> Operation {
    let attributes = Attributes {
        permissions: READ_WRITE,
        memory: MemoryType::WriteBack,
        largest,
    };
    Operation::Map {
        range,
        hpa,
        attributes,
    }
}

fn with(operations: &[Operation]) -> Model {
    let mut model = Model::new(SHAPE, 10);
    for operation in operations {
        assert_eq!(model.perform(operation).result, Ok(()), "{operation:?}");
    }
    model
}

/// First pages and levels.
fn leaves(model: &Model) -> Vec<(u64, u32)> {
    let all = model.leaves(0..SHAPE.end());
    all.map(|(first, leaf)| (first, leaf.level)).collect()
}

#[test]
fn leaves_are_as_large_as_fits() {
    let model = with(&[map(GIB - MIB2 - 1..2 * GIB, (GIB - MIB2 - 1) * PAGE, 2)]);
    let expected = [(GIB - MIB2 - 1, 0), (GIB - MIB2, 1), (GIB, 2)];
    assert_eq!(leaves(&model), expected);
    assert_eq!(model.free(), 8);
    let misaligned = with(&[map(0..MIB2, PAGE, 2)]);
    assert_eq!(misaligned.leaves(0..MIB2).count(), 512);
    let capped = with(&[map(0..GIB, 0, 1)]);
    assert_eq!(capped.leaves(0..GIB).count(), 512);
}

#[test]
fn an_empty_table_keeps_large_leaves_out() {
    let unmap = |range| Operation::Unmap { range };
    let mut model = with(&[
        map(0..2, 0, 0),
        unmap(0..1),
        unmap(1..2),
        map(0..MIB2, 0, 2),
    ]);
    assert_eq!(model.leaves(0..MIB2).count(), 512);
    let report = model.perform(&unmap(0..MIB2));
    assert_eq!((report.entries, report.tables), (1, 1));
    assert_eq!(model.perform(&map(0..MIB2, 0, 2)).result, Ok(()));
    assert_eq!(leaves(&model), [(0, 1)]);
}

#[test]
fn an_edge_splits() {
    let mut model = with(&[map(0..GIB, 0, 2)]);
    let report = model.perform(&Operation::Unmap { range: 1..GIB });
    let expected = Report {
        interval: Some(0..GIB),
        // 511 of 2 MiB, and 511 of 4 KiB.
        entries: 1022,
        splits: 2,
        ..Report::new(Ok(()))
    };
    assert_eq!(report, expected);
    assert_eq!(leaves(&model), [(0, 0)]);
}

#[test]
fn failures_name_their_page() {
    let mut model = with(&[map(5..6, 0, 0)]);
    let report = model.perform(&map(3..8, 0, 0));
    assert_eq!(report.result, Err(Failure::Occupied(5)));
    assert_eq!(leaves(&model), [(3, 0), (4, 0), (5, 0)]);

    let mut model = with(&[map(GIB..2 * GIB, 0, 2)]);
    model.free = 1;
    let report = model.perform(&Operation::Unmap {
        range: GIB..2 * GIB - 1,
    });
    assert_eq!(report.result, Err(Failure::Exhausted(2 * GIB - MIB2)));
    assert_eq!((report.splits, report.entries), (1, 511));
    assert_eq!(leaves(&model), [(2 * GIB - MIB2, 1)]);
}

#[test]
fn what_cannot_be_is_refused() {
    let mut model = with(&[]);
    let mut refuse = |operation: Operation, failure| {
        let report = model.perform(&operation);
        assert_eq!(report, Report::new(Err(failure)), "{operation:?}");
    };
    refuse(map(0..4 * GIB + 1, 0, 2), Failure::Beyond);
    refuse(map(0..1, 1, 2), Failure::Address);
    refuse(map(0..2, (1 << 40) - PAGE, 2), Failure::Address);
    let protect = Operation::Protect {
        range: 0..1,
        permissions: Permissions::NONE,
    };
    refuse(protect, Failure::Permissions);
}

#[test]
fn parts_become_one_again() {
    let mut model = with(&[map(0..MIB2, 0, 0)]);
    let Verdict::Allowed { first_write, .. } = model.access(7, Access::Write) else {
        panic!("refused");
    };
    assert!(first_write);
    let collapse = |range| Operation::Collapse { range, to: 2 };
    assert_eq!(model.perform(&collapse(0..MIB2 - 1)).entries, 0);
    assert_eq!(model.perform(&collapse(0..MIB2)).entries, 1);
    let (_, leaf) = model.at(511).unwrap();
    assert_eq!((leaf.level, leaf.accessed, leaf.dirty), (1, true, true));
}

#[test]
fn flags_are_taken_from_whole_leaves() {
    let mut model = with(&[map(0..2 * MIB2, 0, 1), map(3 * MIB2..3 * MIB2 + 1, 0, 0)]);
    for page in [1, MIB2, 3 * MIB2] {
        model.access(page, Access::Write);
    }
    let report = model.perform(&Operation::Clean {
        range: 5..SHAPE.end(),
    });
    assert_eq!(report.recorded, [0..2 * MIB2, 3 * MIB2..3 * MIB2 + 1]);
    assert_eq!(report.entries, 3);
    let again = model.perform(&Operation::Clean {
        range: 0..SHAPE.end(),
    });
    assert_eq!(again, Report::new(Ok(())));
    let aged = model.perform(&Operation::Age { range: 0..1 });
    assert_eq!(aged.recorded.first(), Some(&(0..MIB2)));
}

#[test]
fn accesses_end_where_the_walk_does() {
    let mut model = with(&[map(0..1, PAGE, 0), map(GIB..2 * GIB, 0, 2)]);
    let refused = |level, permissions| {
        Verdict::Refused(Refusal {
            level,
            permissions,
            withheld: false,
        })
    };
    assert_eq!(model.access(1, Access::Read), refused(0, None));
    assert_eq!(model.access(MIB2, Access::Read), refused(1, None));
    assert_eq!(model.access(2 * GIB, Access::Read), refused(2, None));
    let execute = model.access(GIB, Access::Execute);
    assert_eq!(execute, refused(2, Some(READ_WRITE)));
    let allowed = Verdict::Allowed {
        hpa: 9 * PAGE,
        level: 2,
        first_write: false,
    };
    assert_eq!(model.access(GIB + 9, Access::Read), allowed);
}

const TRACK: fn(Pages) -> Operation = |range| Operation::TrackWrites { range };
const UNTRACK: fn(Pages) -> Operation = |range| Operation::UntrackWrites { range };

fn write_fault(model: &mut Model, page: u64) -> Report {
    model.perform(&Operation::WriteFault {
        range: page..page + 1,
    })
}

/// What becomes of a write, once more than it is asked for.
fn may_write(model: &Model, page: u64) -> bool {
    let verdict = model.clone().access(page, Access::Write);
    matches!(verdict, Verdict::Allowed { .. })
}

#[test]
fn a_write_that_is_tracked_is_refused_until_it_is_told() {
    let mut model = with(&[map(0..MIB2, 0, 1), TRACK(0..MIB2)]);
    let refused = Verdict::Refused(Refusal {
        level: 1,
        permissions: Some(Permissions::READ),
        withheld: true,
    });
    assert_eq!(model.access(7, Access::Write), refused);
    let (_, leaf) = model.at(7).unwrap();
    assert!(!leaf.accessed && !leaf.dirty);
    let report = write_fault(&mut model, 7);
    let mut expected = Report {
        splits: 1,
        fault: Some(Fault::Released(7..8)),
        ..Report::new(Ok(()))
    };
    expected.record(&(7..8));
    assert_eq!(report, expected);
    assert!(may_write(&model, 7) && !may_write(&model, 6) && !may_write(&model, 8));
    assert_eq!(write_fault(&mut model, 7).fault, Some(Fault::Writable));
    assert_eq!(write_fault(&mut model, MIB2).fault, Some(Fault::Absent));
}

#[test]
fn without_tables_a_leaf_is_released_whole() {
    let mut model = with(&[map(GIB..2 * GIB, 0, 2), TRACK(GIB..2 * GIB)]);
    model.free = 1;
    let report = write_fault(&mut model, GIB + 7);
    let whole = GIB..GIB + MIB2;
    assert_eq!(report.fault, Some(Fault::Released(whole.clone())));
    assert_eq!((report.splits, report.recorded), (1, vec![whole]));
    assert!(may_write(&model, GIB + 8) && !may_write(&model, GIB + MIB2));
}

#[test]
fn a_split_for_a_fault_is_flushed_only_where_it_breaks() {
    for (breaks, interval) in [(false, None), (true, Some(0..MIB2))] {
        let mut model = with(&[map(0..MIB2, 0, 1), TRACK(0..MIB2)]);
        model.shape.breaks = breaks;
        assert_eq!(write_fault(&mut model, 0).interval, interval);
    }
}

#[test]
fn tracking_counts_what_it_changes() {
    let mut model = with(&[map(0..2 * MIB2, 0, 1)]);
    let protect = |range, permissions| Operation::Protect { range, permissions };
    model.perform(&protect(0..4, Permissions::READ));
    let report = model.perform(&TRACK(2..MIB2 + 1));
    assert_eq!((report.entries, report.splits), (MIB2 - 4 + 1, 1));
    assert_eq!(report.interval, Some(4..2 * MIB2));
    assert_eq!(model.perform(&TRACK(2..MIB2)), Report::new(Ok(())));
    assert_eq!(write_fault(&mut model, 3).fault, Some(Fault::Denied));
    let report = model.perform(&UNTRACK(0..2 * MIB2));
    assert_eq!(
        (report.entries, report.interval),
        (MIB2 - 3, Some(4..MIB2 + 1))
    );
}

#[test]
fn protection_keeps_tracking_while_there_is_something_to_withhold() {
    let mut model = with(&[map(0..2, 0, 0), TRACK(0..2)]);
    let protect = |permissions| Operation::Protect {
        range: 0..1,
        permissions,
    };
    assert_eq!(model.perform(&protect(READ_WRITE)).entries, 0);
    assert!(!may_write(&model, 0));
    assert_eq!(model.perform(&protect(Permissions::READ)).entries, 1);
    assert_eq!(write_fault(&mut model, 0).fault, Some(Fault::Denied));
    assert_eq!(model.perform(&protect(READ_WRITE)).entries, 1);
    assert!(may_write(&model, 0) && !may_write(&model, 1));
}

#[test]
fn what_is_not_tracked_alike_stays_apart() {
    let mut model = with(&[map(0..MIB2, 0, 0), TRACK(0..MIB2)]);
    write_fault(&mut model, 9);
    let collapse = Operation::Collapse {
        range: 0..MIB2,
        to: 1,
    };
    assert_eq!(model.perform(&collapse).entries, 0);
    model.perform(&TRACK(9..10));
    assert_eq!(model.perform(&collapse).entries, 1);
    assert!(!may_write(&model, 9));
    model.perform(&UNTRACK(0..MIB2));
    assert!(may_write(&model, 9));
}
