//! Long runs, which the everyday subset leaves out: many migrations in a row by the demo, which verifies each of them.

use std::time::Duration;

use ferry_tests::ferry;
use serde_json::Value;

/// Migrations for each of the two transports.
const MIGRATIONS: u32 = 50;
const LIMIT: Duration = Duration::from_secs(60);

fn verified_demo(transport: &str) -> Value {
    let memory = ["--memory", "256M", "--hot", "64M", "--cpus", "2"];
    let arguments: Vec<&str> = ["demo", "--json", "--transport", transport]
        .into_iter()
        .chain(memory)
        .collect();
    let ended = ferry::invoke(&arguments, LIMIT).unwrap();
    assert!(ended.status.success(), "{ended:?}");
    let last: Value = serde_json::from_str(ended.stdout.lines().last().unwrap()).unwrap();
    assert_eq!(last["event"], "demo/finished", "{last}");
    assert_eq!(
        (&last["verified"], &last["digest_equal"]),
        (&Value::Bool(true), &Value::Bool(true))
    );
    assert_eq!(last["lost_writes"], 0, "{last}");
    last
}

fn in_a_row(transport: &str) {
    let downtimes: Vec<f64> = (0..MIGRATIONS)
        .map(|_| verified_demo(transport)["downtime_ms"].as_f64().unwrap())
        .collect();
    println!("downtimes over {transport}, ms: {downtimes:?}");
}

#[test]
fn fifty_migrations_in_a_row_over_tcp() {
    in_a_row("tcp");
}

#[test]
fn fifty_migrations_in_a_row_over_a_unix_socket() {
    in_a_row("unix");
}
