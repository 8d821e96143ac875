//! Flow control by credit, in both directions.

use super::*;

#[test]
fn a_guest_gets_no_more_than_it_has_room_for() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    let sent: Vec<u8> = (0..=250).cycle().take(200_000).collect();
    let writer = {
        let sent = sent.clone();
        thread::spawn(move || {
            host.write_all(&sent).unwrap();
            host
        })
    };
    let mut seen = Vec::new();
    let mut forwarded = 0;
    while seen.len() < sent.len() {
        let (header, data) = guest.receive();
        seen.extend(data);
        assert!(seen.len() - forwarded <= GUEST_BUFFER as usize);
        if header.op == Op::CreditRequest {
            assert_eq!(seen.len() - forwarded, GUEST_BUFFER as usize);
            forwarded = seen.len();
            let update = Header {
                src_cid: CID,
                dst_cid: 2,
                src_port: ports.1,
                dst_port: ports.0,
                len: 0,
                kind: 1,
                op: Op::CreditUpdate,
                flags: 0,
                buf_alloc: GUEST_BUFFER,
                fwd_cnt: u32::try_from(forwarded).unwrap(),
            };
            guest.send_as(update, &[]);
        }
    }
    assert_eq!(seen, sent);
    drop(writer.join().unwrap());
}

#[test]
fn a_host_that_does_not_read_holds_the_guest_back() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    let piece: Vec<u8> = (0..=250).cycle().take(32 * 1024).collect();
    let credit = |guest: &mut Guest| {
        guest.send(Op::CreditRequest, ports, 0, &[]);
        // A pause waits for the worker, which has answered the packet then.
        guest.driver.device.pause();
        guest.driver.device.resume();
        let mut forwarded = None;
        while let Some(used) = guest.driver.used(0) {
            let (header, _) = guest.taken(used);
            assert_eq!(header.op, Op::CreditUpdate);
            forwarded = Some(header.fwd_cnt);
        }
        forwarded.expect("no credit update")
    };
    // Sends until the credit is used up, which fills the socket's buffer and the device's buffer.
    let mut sent: u32 = 0;
    let mut forwarded = 0;
    loop {
        if sent - forwarded + 32 * 1024 > 256 * 1024 {
            forwarded = credit(&mut guest);
            if sent - forwarded + 32 * 1024 > 256 * 1024 {
                break;
            }
        }
        guest.send(Op::Data, ports, 0, &piece);
        sent += 32 * 1024;
    }
    assert!(sent - forwarded > 224 * 1024);
    // When the host reads, the guest gets a credit update without a request.
    let expected: Vec<u8> = piece.repeat(sent as usize / piece.len());
    assert!(read_exactly(&mut host, sent as usize) == expected);
    while forwarded < sent - 64 * 1024 {
        forwarded = guest.expect(Op::CreditUpdate, ports).0.fwd_cnt;
    }
    // A guest that sends more than its credit is disconnected.
    for _ in 0..64 {
        guest.send(Op::Data, ports, 0, &piece);
        if guest.driver.device.counters().contains(&("connections", 0)) {
            break;
        }
    }
    loop {
        if guest.receive().0.op == Op::Reset {
            break;
        }
    }
}

#[test]
fn a_mebibyte_comes_back_as_it_was_sent() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    let echo = thread::spawn(move || {
        let mut piece = [0; 5000];
        let mut total = 0;
        while total < 1 << 20 {
            let len = host.read(&mut piece).unwrap();
            host.write_all(&piece[..len]).unwrap();
            total += len;
        }
        host
    });
    let sent: Vec<u8> = (0..=252).cycle().take(1 << 20).collect();
    let mut back = Vec::new();
    for piece in sent.chunks(3000) {
        let header = Header {
            src_cid: CID,
            dst_cid: 2,
            src_port: ports.1,
            dst_port: ports.0,
            len: u32::try_from(piece.len()).unwrap(),
            kind: 1,
            op: Op::Data,
            flags: 0,
            buf_alloc: GUEST_BUFFER,
            fwd_cnt: u32::try_from(back.len()).unwrap(),
        };
        guest.send_as(header, piece);
        let goal = back.len() + piece.len();
        while back.len() < goal {
            back.extend(guest.receive().1);
        }
    }
    assert!(back == sent);
    drop(echo.join().unwrap());
}

#[test]
fn a_guest_that_takes_nothing_is_taken_nothing_from() {
    let mut guest = Guest::new();
    let mut sent = 0;
    // Each packet is answered by a reset, for which the guest has four buffers.
    while sent < 4 + 1024 {
        guest.send(Op::Data, (7, 8), 0, &[]);
        sent += 1;
    }
    let held = guest.driver.add(1, &[Part::Out(DATA, 44)]);
    guest.driver.notify(1);
    guest.driver.device.pause();
    guest.driver.device.resume();
    assert_eq!(guest.driver.used(1), None);
    for _ in 0..=sent {
        guest.expect(Op::Reset, (7, 8));
    }
    assert_eq!(guest.driver.wait_used(1), (held, 0));
}

#[test]
fn a_buffer_without_room_for_data_takes_an_update_and_the_next_takes_the_data() {
    let mut guest = Guest::new();
    let (mut host, ports) = guest.connected();
    // These buffers follow those that were posted before.
    let at = DATA + 0x20_0000;
    guest.driver.add(0, &[Part::In(at, 44)]);
    guest.post(1);
    for number in 0..4 {
        host.write_all(&[number]).unwrap();
        assert_eq!(guest.expect(Op::Data, ports).1, [number]);
    }
    host.write_all(b"behind").unwrap();
    guest.expect(Op::CreditUpdate, ports);
    assert_eq!(guest.expect(Op::Data, ports).1, b"behind");
}
