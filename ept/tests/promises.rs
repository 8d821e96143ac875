//! Checks the table of promises in the crate's documentation: it has a row for each of S1 to S21 and S24, and every test
//! that it names exists.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;

/// A row of the table: the numbers of its promises, and the tests that it names.
struct Row {
    numbers: Vec<u32>,
    tests: Vec<String>,
}

/// Parses the first cell of a row: `S8`, or `S10–S13`.
fn numbers(cell: &str) -> Vec<u32> {
    let number = |text: &str| text.trim().strip_prefix('S')?.parse().ok();
    match cell.split_once('–') {
        Some((first, last)) => match (number(first), number(last)) {
            (Some(first), Some(last)) => (first..=last).collect(),
            _ => Vec::new(),
        },
        None => number(cell).into_iter().collect(),
    }
}

fn rows(documentation: &str) -> Vec<Row> {
    let lines = documentation.lines();
    lines
        .filter_map(|line| line.strip_prefix("//! | S"))
        .map(|line| {
            let cells: Vec<&str> = line.split(" | ").collect();
            let [number, .., tests] = cells.as_slice() else {
                panic!("{line}: not a row")
            };
            let named = tests.split('`').skip(1).step_by(2);
            Row {
                numbers: numbers(&format!("S{number}")),
                tests: named.map(str::to_owned).collect(),
            }
        })
        .collect()
}

/// Returns whether `test` exists: a file with tests, or `file::function`, or `file::beginning_…`.
fn is_there(test: &str) -> bool {
    let (file, function) = test.split_once("::").unwrap_or((test, ""));
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("tests/{file}.rs"));
    let Ok(source) = fs::read_to_string(path) else {
        return false;
    };
    let wanted = match function.strip_suffix('…') {
        Some(beginning) => format!("fn {beginning}"),
        None if function.is_empty() => "fn ".to_owned(),
        None => format!("fn {function}("),
    };
    let after_mark = source.split("#[test]").skip(1);
    after_mark
        .filter_map(|text| text.lines().find(|line| line.contains("fn ")))
        .any(|line| line.contains(&wanted))
}

#[test]
fn every_promise_has_a_test() {
    let rows = rows(include_str!("../src/lib.rs"));
    let mut kept = BTreeSet::new();
    for row in rows {
        assert!(!row.tests.is_empty(), "S{:?} names no test", row.numbers);
        for test in &row.tests {
            assert!(is_there(test), "S{:?} names {test}", row.numbers);
        }
        kept.extend(row.numbers);
    }
    assert_eq!(kept, (1..=21).chain([24]).collect());
}
