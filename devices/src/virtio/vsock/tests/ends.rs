//! Ends of connections: by shutdown of each half, by reset, by a protocol error, and by a restore. Devices that cannot
//! be created.

use super::*;

#[test]
fn each_half_is_closed_by_itself() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    // The host shuts down its sending half, and still receives.
    host.write_all(b"request").unwrap();
    host.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(Op::Data, ports).1, b"request");
    assert_eq!(guest.expect(Op::Shutdown, ports).0.flags, spec::NO_SEND);
    guest.send(Op::Data, ports, 0, b"answer");
    assert_eq!(read_exactly(&mut host, 6), b"answer");
    // The guest shuts down its halves, too.
    guest.send(Op::Shutdown, ports, spec::NO_SEND, &[]);
    assert_eq!(read_to_end(&mut host), b"");
    guest.send(Op::Shutdown, ports, spec::NO_RECEIVE, &[]);
    let mut op = guest.receive().0.op;
    // The host's stream is closed in both directions now, so a shutdown may arrive first.
    if op == Op::Shutdown {
        op = guest.receive().0.op;
    }
    assert_eq!(op, Op::Reset);
}

#[test]
fn a_guest_that_says_all_first_still_hears_the_answer() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    guest.send(Op::Data, ports, 0, b"request");
    guest.send(Op::Shutdown, ports, spec::NO_SEND, &[]);
    assert_eq!(read_to_end(&mut host), b"request");
    host.write_all(b"answer").unwrap();
    assert_eq!(guest.expect(Op::Data, ports).1, b"answer");
    // The guest must not send after it has shut down its sending half.
    guest.send(Op::Data, ports, 0, b"more");
    guest.expect(Op::Reset, ports);
}

#[test]
fn a_guest_that_closes_is_answered_by_a_reset() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    guest.send(Op::Data, ports, 0, b"last words");
    guest.send(Op::Shutdown, ports, spec::NO_SEND | spec::NO_RECEIVE, &[]);
    guest.expect(Op::Reset, ports);
    assert_eq!(read_to_end(&mut host), b"last words");
}

#[test]
fn a_host_that_closes_is_heard_to_its_end() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    host.write_all(&[7; 10_000]).unwrap();
    drop(host);
    let mut seen = Vec::new();
    let flags = loop {
        let (header, data) = guest.receive();
        match header.op {
            Op::Data => seen.extend(data),
            Op::Shutdown => break header.flags,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(seen, [7; 10_000]);
    assert_eq!(flags, spec::NO_SEND | spec::NO_RECEIVE);
    guest.send(Op::Reset, ports, 0, &[]);
    // A reset is not answered, so the next packet answers the next request.
    guest.send(Op::Data, ports, 0, b"x");
    guest.expect(Op::Reset, ports);
}

#[test]
fn malformed_packets_and_buffers_need_a_reset_which_ends_connections() {
    let whole = Header {
        src_cid: CID,
        dst_cid: 2,
        src_port: 1,
        dst_port: 2,
        len: 100,
        kind: 1,
        op: Op::Data,
        flags: 0,
        buf_alloc: 0,
        fwd_cnt: 0,
    };
    for (queue, parts) in [
        (1, vec![Part::Out(DATA, 43)]),
        (1, vec![Part::Out(DATA, 143)]),
        (1, vec![Part::Out(DATA, 44), Part::In(DATA, 100)]),
        (0, vec![Part::In(DATA, 43)]),
        (0, vec![Part::Out(DATA, 44), Part::In(DATA, 100)]),
    ] {
        let mut guest = Guest::new();
        let (mut host, _) = guest.connected();
        guest.driver.write_memory(DATA, &whole.encode());
        guest.driver.add(queue, &parts);
        guest.driver.notify(queue);
        // The device pops a buffer only when it has a packet for it.
        host.write_all(&[1; 5 * 4096]).unwrap();
        guest.driver.wait_needs_reset();
        guest.driver.start(0);
        guest.post(4);
        let mut end = Vec::new();
        let _reset_or_end = host.read_to_end(&mut end);
        assert_eq!(end, b"");
        std::fs::remove_file(guest.folder.path().join("vsock_5000")).unwrap();
        guest.connected();
    }
}

#[test]
fn connections_are_limited() {
    // Each connection takes two descriptors.
    let wanted = 4096;
    let limit = getrlimit(Resource::Nofile);
    let current = limit.maximum.map_or(wanted, |maximum| maximum.min(wanted));
    setrlimit(
        Resource::Nofile,
        Rlimit {
            current: Some(current),
            maximum: limit.maximum,
        },
    )
    .unwrap();
    let mut guest = Guest::new();
    let mut hosts: Vec<UnixStream> = Vec::new();
    for _ in 0..hub::CONNECTIONS_MAX {
        hosts.push(guest.socket());
    }
    let mut late = guest.socket();
    assert_eq!(read_to_end(&mut late), b"");
    let _listener = guest.listen(5000);
    guest.send(Op::Request, (5000, 1), 0, &[]);
    guest.expect(Op::Reset, (5000, 1));
    // Connections below the limit still work.
    hosts[0].write_all(b"CONNECT 5\n").unwrap();
    assert_eq!(guest.receive().0.op, Op::Request);
}

#[test]
fn a_guest_that_moved_is_told_that_its_connections_are_gone() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    guest.driver.device.pause();
    let saved = guest.driver.device.save().unwrap();
    let Guest {
        driver,
        folder,
        inbox,
        posted,
    } = guest;
    let there = tempfile::tempdir().unwrap();
    let model = Vsock::new(VsockOptions {
        guest_cid: 77,
        path: there.path().join("vsock"),
    })
    .unwrap();
    let driver = driver.moved(&saved, |_| Box::new(model));
    assert_eq!(read_to_end(&mut host), b"");
    assert!(!folder.path().join("vsock").exists());
    let mut guest = Guest {
        driver,
        folder: there,
        inbox,
        posted,
    };
    assert_eq!(guest.driver.config::<8>(0), CID.to_le_bytes());
    guest.driver.write_memory(DATA + 0x8000, &[0xff; 4]);
    // The event waits until the guest adds a buffer.
    guest.driver.device.resume();
    assert_eq!(guest.driver.request(2, &[Part::In(DATA + 0x8000, 4)]), 4);
    assert_eq!(guest.driver.read_memory(DATA + 0x8000, 4), [0; 4]);
    guest.send(Op::Data, ports, 0, b"x");
    guest.expect(Op::Reset, ports);
    guest.connected();

    let mut broken = saved;
    broken.device = DeviceState::new(&VsockSnapshot { guest_cid: 2 });
    let elsewhere = tempfile::tempdir().unwrap();
    let model = Box::new(device(elsewhere.path()));
    let (interrupt, _line) = interrupt();
    let result = MmioTransport::restore("_vsock0", model, memory(), interrupt, &broken);
    assert!(
        result
            .err()
            .unwrap()
            .to_string()
            .contains("cannot be the address")
    );
}

#[test]
fn a_device_that_cannot_be_says_why() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("vsock");
    for guest_cid in [0, 2, u64::from(u32::MAX), 1 << 40] {
        let config = VsockOptions {
            guest_cid,
            path: path.clone(),
        };
        let error = Vsock::new(config).err().unwrap().to_string();
        assert!(error.contains(&guest_cid.to_string()), "{error}");
    }
    let first = device(folder.path());
    let config = VsockOptions {
        guest_cid: CID,
        path: path.clone(),
    };
    let error = Vsock::new(config.clone()).err().unwrap().to_string();
    assert!(error.contains("another guest uses the socket"), "{error}");
    drop(first);
    Vsock::new(config.clone()).unwrap();
    assert!(!path.exists());
    std::fs::write(&path, "no socket").unwrap();
    let error = Vsock::new(config).err().unwrap().to_string();
    assert!(error.contains("something else exists"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"no socket");
    let config = VsockOptions {
        guest_cid: CID,
        path: folder.path().join("x".repeat(108)),
    };
    let error = Vsock::new(config).err().unwrap().to_string();
    assert!(error.contains("at most 107 bytes"), "{error}");
}
