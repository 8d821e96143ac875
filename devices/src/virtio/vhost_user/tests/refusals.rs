//! Back ends to which the front end refuses to connect.

use std::os::unix::net::UnixListener;

use super::*;

/// Connects to a back end that is refused, and returns the error.
fn refusal(behavior: Behavior) -> String {
    let back_end = BackEnd::start(behavior);
    let (interrupt, _line) = interrupt();
    let refused = try_connect(&back_end, &shared_memory(), &interrupt);
    let error = refused
        .err()
        .expect("the back end was accepted")
        .to_string();
    assert!(
        error.starts_with(&back_end.socket().display().to_string()),
        "{error}"
    );
    error
}

#[test]
fn a_back_end_that_is_not_there_or_is_none_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let socket = folder.path().join("socket");
    let error = |memory: Memory| {
        let (interrupt, _line) = interrupt();
        let socket = socket.clone();
        let connected = VhostUser::connect(VhostUserOptions {
            socket,
            memory,
            interrupt,
        });
        connected.err().unwrap().to_string()
    };
    let absent = error(shared_memory());
    assert!(
        absent.contains("start the vhost-user back end first"),
        "{absent}"
    );
    let listener = UnixListener::bind(&socket).unwrap();
    assert!(error(memory()).contains("use shared guest memory"));
    drop(listener);
    let nobody = error(shared_memory());
    assert!(
        nobody.contains("start the vhost-user back end first"),
        "{nobody}"
    );
}

#[test]
fn a_back_end_that_lacks_what_a_disk_needs_is_refused() {
    for (features, protocol, lacks) in [
        (FEATURES & !(1 << 32), PROTOCOL, "VIRTIO_F_VERSION_1"),
        (
            FEATURES & !(1 << 30),
            PROTOCOL,
            "VHOST_USER_F_PROTOCOL_FEATURES",
        ),
        (
            FEATURES,
            PROTOCOL & !(1 << 9),
            "VHOST_USER_PROTOCOL_F_CONFIG",
        ),
    ] {
        let error = refusal(Behavior {
            features,
            protocol,
            ..Behavior::default()
        });
        assert!(error.contains("lacks") && error.contains(lacks), "{error}");
    }
}

#[test]
fn a_back_end_that_answers_nonsense_is_refused() {
    let text = b"HTTP/1.1 400 Bad Request\r\n\r\n".to_vec();
    for (request, reaction, why) in [
        (GET_FEATURES, Reaction::Bytes(text.clone()), "invalid reply"),
        (
            GET_PROTOCOL_FEATURES,
            Reaction::Bytes(text),
            "invalid reply",
        ),
        (GET_FEATURES, Reaction::Close, "closed the connection"),
        (
            SET_PROTOCOL_FEATURES,
            Reaction::Close,
            "closed the connection",
        ),
        (GET_CONFIG, Reaction::Close, "closed the connection"),
        // Reply of libvhost-user if it has no configuration space: a header without payload.
        (
            GET_CONFIG,
            Reaction::Bytes(
                [24_u32, 5, 0]
                    .iter()
                    .flat_map(|w| w.to_ne_bytes())
                    .collect(),
            ),
            "no answer within 5 s",
        ),
        (GET_FEATURES, Reaction::Silent, "no answer within 5 s"),
    ] {
        let error = refusal(Behavior::with(request, reaction.clone()));
        assert!(error.contains(why), "{request} {reaction:?}: {error}");
    }
}
