//! The dirty rate and the metrics.

use std::thread;
use std::time::Instant;

use ferry_tests::api::Answer;
use ferry_tests::dirtier::{LIMIT, PATIENT, assert_ends, audit};
use ferry_tests::endpoint::Endpoint;
use ferry_tests::ferry::Ferry;
use ferry_tests::{api, dirtier};
use serde_json::{Value, json};

use super::{PAGES_MOST, booted, call, get, put, sample};

fn dirty_rate(ferry: &Ferry, interval_ms: u64) -> Value {
    let wish = json!({ "interval_ms": interval_ms }).to_string();
    let answer = call(ferry, "PUT", "vm.dirty-rate", &wish);
    assert_eq!(answer.status, 200, "{answer:?}");
    serde_json::from_str(&answer.body).unwrap()
}

#[test]
fn the_dirty_rate_is_what_the_guest_writes_and_costs_it_nothing_it_wrote() {
    for log in ["get", "get-clear", "initially-set"] {
        let mut ferry = Ferry::empty(&["--dirty-log", log]).unwrap();
        booted(&ferry, 1);
        let rate = dirty_rate(&ferry, 300);
        let pages = rate["pages"].as_u64().unwrap();
        assert!(pages > 0 && pages < PAGES_MOST, "{log}: {rate}");
        assert!(
            rate["sources"]["vcpu"].as_f64().unwrap() > 0.0,
            "{log}: {rate}"
        );
        // A paused guest writes nothing, and its earlier writes are not counted again.
        ferry.ctl(&["pause"]).unwrap();
        let still = dirty_rate(&ferry, 50);
        assert_eq!(still["pages"], 0, "{log}: {still}");
        ferry.ctl(&["resume"]).unwrap();
        let printed = ferry
            .ctl_json(&["dirty-rate", "--interval-ms", "100"])
            .unwrap();
        assert!(printed["pages"].as_u64().unwrap() > 0, "{log}: {printed}");
        // The measurement leaves the dirty log intact for a migration.
        let endpoint = Endpoint::free_tcp().unwrap();
        let mut destination = Ferry::receive(&endpoint).unwrap();
        ferry.send_migration(&endpoint, &PATIENT).unwrap();
        assert_ends(&mut ferry);
        audit(&mut destination);
    }
}

#[test]
fn a_measurement_gives_way_to_a_migration_and_to_the_guests_end() {
    let mut ferry = dirtier::start(2);
    let measuring = |ferry: &Ferry| {
        let socket = ferry.api_socket();
        let began = Instant::now();
        let measuring = thread::spawn(move || {
            let body = r#"{"interval_ms":60000}"#;
            let ask = || api::request(&socket, "PUT", "/api/v1/vm.dirty-rate", body).unwrap();
            // A request that checks whether the measurement has begun can be a measurement itself.
            let mut answer = ask();
            while answer.body.contains("another measurement") {
                answer = ask();
            }
            answer
        });
        // The measurement has begun when another one is refused.
        while call(ferry, "PUT", "vm.dirty-rate", r#"{"interval_ms":10}"#).status != 409 {
            assert!(began.elapsed() < LIMIT);
        }
        measuring
    };
    let interrupted = |measuring: thread::JoinHandle<Answer>| {
        let answer = measuring.join().unwrap();
        assert_eq!(answer.status, 409, "{answer:?}");
        assert!(answer.body.contains("came between"), "{answer:?}");
    };
    let first = measuring(&ferry);
    put(&ferry, "vm.reboot", "");
    interrupted(first);
    dirtier::assert_runs(&mut ferry);
    let second = measuring(&ferry);
    let endpoint = Endpoint::free_tcp().unwrap();
    let mut destination = Ferry::receive(&endpoint).unwrap();
    ferry.send_migration(&endpoint, &PATIENT).unwrap();
    interrupted(second);
    assert_ends(&mut ferry);
    audit(&mut destination);
}

#[test]
fn the_metrics_are_those_of_the_calls() {
    let mut ferry = dirtier::start(2);
    ferry.ctl(&["pause"]).unwrap();
    dirty_rate(&ferry, 10);
    let counters = get(&ferry, "vm.counters");
    let answer = api::request(&ferry.api_socket(), "GET", "/metrics", "").unwrap();
    assert_eq!(answer.status, 200);
    let text = answer.body;
    assert_eq!(sample(&text, r#"ferry_vm_state{state="paused"}"#), 1.0);
    assert_eq!(sample(&text, r#"ferry_vm_state{state="running"}"#), 0.0);
    assert_eq!(sample(&text, "ferry_vm_vcpus"), 2.0);
    assert_eq!(sample(&text, "ferry_vm_memory_bytes"), f64::from(128 << 20));
    for source in ["vcpu", "monitor", "device"] {
        let pages = sample(
            &text,
            &format!("ferry_dirtied_pages_total{{source=\"{source}\"}}"),
        );
        let counted = &counters["tracker"][format!("dirtied_by_{source}_pages")];
        assert_eq!(Some(pages), counted.as_f64(), "{source}");
    }
    let stops = sample(&text, r#"ferry_vcpu_stops_total{vcpu="1"}"#);
    assert_eq!(Some(stops), counters["vcpu1"]["stops"].as_f64());
    assert_eq!(
        ferry.ctl(&["metrics"]).unwrap().lines().count(),
        text.lines().count()
    );
    ferry.ctl(&["shutdown-vmm"]).unwrap();
    assert_ends(&mut ferry);
}
