//! Random sequences of calls, migrations and faults, against a model of the states.

use std::os::unix::net::UnixListener;
use std::sync::Arc;
use std::thread;

use proptest::prelude::*;
use vmm::monitor::{Call, Monitor, Resolution, StateKind, refusal};

use crate::guest::{Image, TestSerial, launching_monitor, wait_for_state};
use crate::peers::{Destination, Sockets, lose_confirmation};
use crate::walk::{follows, wish};

/// One step of a sequence.
#[derive(Clone, Copy, Debug)]
enum Step {
    Call(Call),
    /// The guest is sent, and arrives at another monitor.
    Arrives,
    /// The destination ends the connection at once.
    CutAtOnce,
    /// The destination's confirmation is lost, and a person resolves so.
    Unconfirmed(Resolution),
    /// The guest ends by itself.
    EndsItself,
}

fn step() -> impl Strategy<Value = Step> {
    let calls = vec![
        Call::Create,
        Call::Boot,
        Call::ShutDown,
        Call::Delete,
        Call::Reboot,
        Call::Pause,
        Call::Resume,
        Call::PowerButton,
        Call::Info,
        Call::Counters,
        Call::CancelMigration,
        Call::ResolveMigration,
    ];
    prop_oneof![
        8 => prop::sample::select(calls).prop_map(Step::Call),
        2 => Just(Step::CutAtOnce),
        1 => Just(Step::Arrives),
        1 => Just(Step::Unconfirmed(Resolution::Resume)),
        1 => Just(Step::Unconfirmed(Resolution::Discard)),
        1 => Just(Step::EndsItself),
    ]
}

/// The monitor that has the guest, and the state that the model expects.
struct World {
    image: Image,
    sockets: Sockets,
    monitor: Arc<Monitor>,
    serial: TestSerial,
    expected: StateKind,
    /// The guest was launched by this monitor, and can be booted again.
    launched_here: bool,
    next_socket: u32,
}

impl World {
    fn new() -> Self {
        let serial = TestSerial::default();
        Self {
            image: Image::new(),
            sockets: Sockets::new(),
            monitor: launching_monitor(serial.clone()),
            serial,
            expected: StateKind::Empty,
            launched_here: true,
            next_socket: 0,
        }
    }

    fn take(&mut self, step: Step) {
        match step {
            Step::Call(call) => self.call(call),
            Step::Arrives => self.arrives(),
            Step::CutAtOnce => self.cut_at_once(),
            Step::Unconfirmed(resolution) => self.unconfirmed(resolution),
            Step::EndsItself => self.ends_itself(),
        }
        assert_eq!(self.monitor.state_kind(), self.expected, "after {step:?}");
    }

    fn call(&mut self, call: Call) {
        let result = match call {
            Call::Create => self.monitor.create(self.image.config(), Vec::new()),
            Call::Boot => self.monitor.boot(),
            Call::ShutDown => self.monitor.shut_down(),
            Call::Delete => self.monitor.delete(),
            Call::Reboot => self.monitor.reboot(),
            Call::Pause => self.monitor.pause(),
            Call::Resume => self.monitor.resume(),
            Call::PowerButton => self.monitor.power_button(),
            Call::Info => self.monitor.info().map(drop),
            Call::Counters => self.monitor.counters().map(drop),
            Call::CancelMigration => self.monitor.cancel_migration(),
            Call::ResolveMigration => self.monitor.resolve_migration(Resolution::Resume),
            other => unreachable!("{other:?} is not drawn"),
        };
        let makes_a_machine = matches!(call, Call::Create | Call::Boot | Call::Reboot);
        let allowed =
            refusal(call, self.expected).is_none() && (self.launched_here || !makes_a_machine);
        assert_eq!(
            result.is_ok(),
            allowed,
            "{call:?} in {:?}: {result:?}",
            self.expected
        );
        if allowed {
            self.expected = follows(call, self.expected);
        }
        if allowed && matches!(call, Call::Boot | Call::Reboot) {
            self.serial.wait_for("ready");
        }
    }

    fn socket(&mut self) -> String {
        self.next_socket += 1;
        format!("s{}", self.next_socket)
    }

    fn can_be_sent(&self) -> bool {
        refusal(Call::SendMigration, self.expected).is_none()
    }

    fn arrives(&mut self) {
        if !self.can_be_sent() {
            return;
        }
        let name = self.socket();
        let destination = Destination::start(&self.sockets, &name);
        self.monitor
            .send_migration(&wish(self.sockets.url(&name)))
            .unwrap();
        assert_eq!(self.monitor.state_kind(), StateKind::Vacated);
        self.monitor.release();
        (self.monitor, self.serial) = destination.arrived();
        self.launched_here = false;
    }

    fn cut_at_once(&mut self) {
        if !self.can_be_sent() {
            return;
        }
        let name = self.socket();
        let listener = UnixListener::bind(self.sockets.path(&name)).unwrap();
        let cutting = thread::spawn(move || drop(listener.accept().unwrap()));
        self.monitor
            .send_migration(&wish(self.sockets.url(&name)))
            .unwrap_err();
        cutting.join().unwrap();
    }

    fn unconfirmed(&mut self, resolution: Resolution) {
        if !self.can_be_sent() {
            return;
        }
        let name = self.socket();
        let losing = lose_confirmation(&self.sockets, &name);
        self.monitor
            .send_migration(&wish(self.sockets.url(&name)))
            .unwrap_err();
        losing.join().unwrap();
        assert_eq!(self.monitor.state_kind(), StateKind::Unconfirmed);
        self.monitor.resume().unwrap_err();
        self.monitor.resolve_migration(resolution).unwrap();
        if resolution == Resolution::Discard {
            self.expected = StateKind::Vacated;
        }
    }

    fn ends_itself(&mut self) {
        if self.expected == StateKind::Running {
            self.serial.type_in(b"q");
            wait_for_state(&self.monitor, StateKind::Ended);
            self.expected = StateKind::Ended;
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, max_shrink_iters: 200, ..ProptestConfig::default() })]

    #[test]
    fn random_sequences_go_through_the_states_of_the_model(
        steps in prop::collection::vec(step(), 1..30)
    ) {
        let mut world = World::new();
        // Most sequences are about a guest that runs.
        world.take(Step::Call(Call::Create));
        world.take(Step::Call(Call::Boot));
        for step in steps {
            world.take(step);
        }
    }
}
