//! Migrations leave no descriptor and no thread behind. The test counts those of its process, so it has one of its own.
#![allow(
    dead_code,
    reason = "the modules of the tests of states are used in part"
)]

#[path = "../states/guest.rs"]
mod guest;
#[path = "../states/peers.rs"]
mod peers;

use std::sync::Arc;
use std::thread;
use std::time::Duration;

use vmm::config::{BalloonConfig, DevicesConfig, SerialConfig};
use vmm::events::Events;
use vmm::migrate::{Admission, Url};
use vmm::monitor::{Monitor, Reception, SendMigrationData};

use guest::{Image, TestSerial, host, launching_monitor};
use peers::Sockets;

fn booted(image: &Image, monitor: &Monitor, serial: &TestSerial) {
    monitor.create(image.config(), Vec::new()).unwrap();
    monitor.boot().unwrap();
    serial.wait_for("ready");
}

fn wish(url: String) -> SendMigrationData {
    let json = serde_json::json!({ "destination_url": url });
    serde_json::from_value(json).unwrap()
}

/// Forty migrations to and fro between two monitors of one process leave nothing open.
#[test]
fn migrations_to_and_fro_leave_no_descriptor_and_no_thread() {
    let count = |what: &str| {
        std::fs::read_dir(format!("/proc/self/{what}"))
            .unwrap()
            .count()
    };
    let resident = || {
        let text = std::fs::read_to_string("/proc/self/statm").unwrap();
        text.split(' ').nth(1).unwrap().parse::<u64>().unwrap() * 4
    };
    let (image, sockets, serial) = (Image::new(), Sockets::new(), TestSerial::default());
    let first = launching_monitor(serial.clone());
    booted(&image, &first, &serial);
    let mut here = first;
    let mut there = Monitor::new(None, Events::nowhere());
    let mut figures = Vec::new();
    for round in 0..40 {
        let name = format!("p{round}");
        let url: Url = sockets.url(&name).parse().unwrap();
        let reception = Reception {
            host: host(),
            listener: Arc::new(url.listen().unwrap()),
            admission: Admission {
                memory_limit: None,
                backing: vmm::memory::Backing::Memfd,
                devices: DevicesConfig {
                    balloon: Some(BalloonConfig::default()),
                    ..DevicesConfig::default()
                },
            },
            serial: SerialConfig::default(),
            serial_backend: Arc::new(serial.clone()),
        };
        let receiving = thread::spawn({
            let there = Arc::clone(&there);
            move || there.receive_guest(&reception)
        });
        here.send_migration(&wish(sockets.url(&name))).unwrap();
        here.release();
        receiving.join().unwrap();
        std::mem::swap(&mut here, &mut there);
        thread::sleep(Duration::from_millis(20));
        figures.push((count("fd"), count("task"), resident()));
    }
    println!("{:?} {:?} {:?}", figures[1], figures[19], figures[39]);
    assert_eq!(figures[1].0, figures[39].0, "descriptors: {figures:?}");
    assert_eq!(figures[1].1, figures[39].1, "threads: {figures:?}");
}
