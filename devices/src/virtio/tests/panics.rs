//! Device models that panic: the device needs a reset, the panic is reported, and nothing hangs.

use std::sync::mpsc::{Receiver, channel};
use std::time::Duration;

use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::*;

/// Method of [`Panicking`] that panics.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Method {
    Started,
    Notified,
    Ready,
    Reset,
    Save,
}

/// Device model that panics in one of its methods.
struct Panicking {
    method: Method,
    event: EventFd,
}

impl Panicking {
    fn new(method: Method) -> Self {
        let event = EventFd::new(EFD_NONBLOCK).unwrap();
        event.write(1).unwrap();
        Self { method, event }
    }

    fn reached(&self, method: Method) {
        assert!(self.method != method, "injected into {method:?}");
    }
}

impl<M: GuestAddressSpace> Device<M> for Panicking {
    fn identity(&self) -> Identity {
        Device::<M>::identity(&Echo::default())
    }
    fn register(&mut self, registry: &mut EventRegistry<'_, '_>) -> std::io::Result<()> {
        registry.add(&self.event, 0, event_manager::EventSet::IN)
    }
    fn started(
        &mut self,
        _: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        self.reached(Method::Started);
        Ok(())
    }
    fn notified(
        &mut self,
        _: usize,
        mut queues: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        if queues.pop(0)?.is_some() {
            self.reached(Method::Notified);
        }
        Ok(())
    }
    fn ready(
        &mut self,
        _: Token,
        _: event_manager::EventSet,
        _: ActiveQueues<'_, M>,
        _: &mut EventRegistry<'_, '_>,
    ) -> Result<(), DeviceError> {
        let _taken = self.event.read();
        self.reached(Method::Ready);
        Ok(())
    }
    fn reset(&mut self, _: &mut EventRegistry<'_, '_>) {
        self.reached(Method::Reset);
    }
    fn save(&self) -> DeviceState {
        self.reached(Method::Save);
        served(0)
    }
    fn restore(&mut self, _: &DeviceState) -> Result<(), DeviceStateError> {
        Ok(())
    }
}

/// Registers a callback that sends the reasons for which the worker is lost.
fn losses(device: &MmioTransport) -> Receiver<String> {
    let (sender, losses) = channel();
    device.on_failure(move |why| sender.send(why.to_owned()).unwrap());
    losses
}

fn first(losses: &Receiver<String>) -> String {
    losses.recv_timeout(Duration::from_secs(20)).unwrap()
}

/// Takes the driver to DRIVER_OK and makes one chain available. The device may panic at any step.
fn use_device(driver: &mut Driver) {
    driver.negotiate(VERSION_1);
    driver.set_up_queue(0, 16);
    driver.set_up_queue(1, 16);
    driver.set(0x70, RUNNING);
    driver.add(0, &[Part::Out(DATA, 1)]);
    driver.notify(0);
}

#[test]
fn a_panic_needs_a_reset_and_is_reported_once() {
    for method in [
        Method::Started,
        Method::Notified,
        Method::Ready,
        Method::Reset,
    ] {
        let mut driver = Driver::new(|_| Box::new(Panicking::new(method)));
        let losses = losses(&driver.device);
        use_device(&mut driver);
        let why = first(&losses);
        assert_eq!(
            why,
            format!("the device's worker thread panicked: injected into {method:?}")
        );
        driver.wait_needs_reset();
        assert_eq!(driver.device.failure(), Some(why.clone()));

        driver.device.pause();
        assert!(driver.device.save().unwrap().transport.needs_reset);
        driver.device.resume();
        // The reset succeeds, but the thread does not come back.
        driver.set(0x70, 0);
        assert_eq!(driver.get(0x70), 0);
        driver.device.pause();
        driver.device.resume();
        use_device(&mut driver);
        driver.wait_needs_reset();
        assert_eq!(driver.device.failure(), Some(why));
        drop(driver);
        assert!(losses.try_recv().is_err(), "the panic was reported twice");
    }
}

#[test]
fn a_device_on_the_same_memory_goes_on() {
    let mut broken = Driver::new(|_| Box::new(Panicking::new(Method::Notified)));
    let (interrupt, line) = interrupt();
    let memory = Arc::clone(&broken.memory);
    let device = Box::new(Echo::default());
    let healthy = MmioTransport::new("_echo1", device, Arc::clone(&memory), interrupt).unwrap();
    let mut healthy = Driver::over(healthy, memory, line);
    use_device(&mut broken);
    broken.wait_needs_reset();
    // Both drivers use the same addresses for their rings, and the broken device does not use them any more.
    healthy.start(0);
    for _ in 0..20 {
        echo_once(&mut healthy, 0);
        echo_once(&mut healthy, 1);
    }
    drop(broken);
    echo_once(&mut healthy, 0);
}

#[test]
fn a_late_listener_is_told_and_only_the_first_is_registered() {
    let mut driver = Driver::new(|_| Box::new(Panicking::new(Method::Notified)));
    use_device(&mut driver);
    driver.wait_needs_reset();
    let registered = losses(&driver.device);
    assert!(first(&registered).contains("injected"));
    let second = losses(&driver.device);
    assert!(second.try_recv().is_err());
    assert!(registered.try_recv().is_err());
}

#[test]
fn a_listener_that_panics_leaves_a_device_that_can_be_dropped() {
    let mut driver = Driver::new(|_| Box::new(Panicking::new(Method::Notified)));
    driver.device.on_failure(|why| panic!("told: {why}"));
    use_device(&mut driver);
    driver.wait_needs_reset();
    driver.device.pause();
    driver.device.save().unwrap();
}

#[test]
fn a_panic_while_saving_is_an_error_and_the_device_goes_on() {
    let mut driver = Driver::new(|_| Box::new(Panicking::new(Method::Save)));
    let losses = losses(&driver.device);
    use_device(&mut driver);
    driver.device.pause();
    let error = driver.device.save().unwrap_err().to_string();
    assert_eq!(
        error,
        "_test: cannot save: the device model panicked: injected into Save"
    );
    driver.device.resume();
    assert_eq!(driver.device.failure(), None);
    assert!(losses.try_recv().is_err());
}
