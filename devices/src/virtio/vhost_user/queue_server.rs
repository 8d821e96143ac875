//! The front end as the transport sees it: as a server of the queues, and as a configuration space.

use vm_memory::GuestAddressSpace;
use vmm_sys_util::eventfd::EventFd;

use super::spec::{CONFIG_WRITE_BACK, WRITE_BACK};
use super::state::VhostUserSnapshot;
use super::{Inner, ReadyDriver, VhostUser};
use crate::virtio::device::{ConfigSpace, read_config};
use crate::virtio::queue::{QueueError, QueueSnapshot, in_use};
use crate::virtio::queue_server::{OnFailure, QueueServer};
use crate::virtio::state::DeviceState;

impl<M: GuestAddressSpace + Send + Sync + 'static> QueueServer for VhostUser<M> {
    fn notifiers(&self) -> &[EventFd] {
        &self.0.kicks
    }

    fn activate(
        &self,
        queues: &[QueueSnapshot],
        features: u64,
    ) -> std::result::Result<(), QueueError> {
        let inner = &self.0;
        in_use(queues, features, &*inner.memory.memory())?;
        for queue in queues.iter().filter(|queue| queue.ready) {
            inner.table.rings(queue)?;
        }
        let mut state = inner.state();
        // If the back end was lost before the driver set DRIVER_OK, the front end reconnects.
        state.failure = None;
        state.driver = Some(ReadyDriver {
            features,
            queues: queues.to_vec(),
        });
        match state.paused {
            true => inner.prepare(&mut state),
            false => inner.start(&mut state),
        }
        Ok(())
    }

    fn stop_queue(&self, index: usize) {
        let mut state = self.0.state();
        // There is only one queue, so the whole back end can be stopped.
        self.0.stop(&mut state);
        let queues = state.driver.as_mut().map(|driver| &mut driver.queues);
        if let Some(queue) = queues.and_then(|queues| queues.get_mut(index)) {
            queue.ready = false;
        }
    }

    fn reset(&self) {
        let mut state = self.0.state();
        self.0.stop(&mut state);
        state.driver = None;
        state.failure = None;
        state.write_back = self.0.offer.config[WRITE_BACK];
        self.0.interrupt.reset();
    }

    fn pause(&self) {
        let mut state = self.0.state();
        state.paused = true;
        self.0.stop(&mut state);
    }

    fn resume(&self) {
        let mut state = self.0.state();
        state.paused = false;
        self.0.start(&mut state);
        drop(state);
        self.0.interrupt.raise_pending();
    }

    fn is_paused(&self) -> bool {
        self.0.state().paused
    }

    fn queues(&self) -> Vec<QueueSnapshot> {
        let state = self.0.state();
        let driver = state.driver.as_ref();
        driver
            .map(|driver| driver.queues.clone())
            .unwrap_or_default()
    }

    fn save(&self) -> std::result::Result<DeviceState, String> {
        Ok(DeviceState::new(&VhostUserSnapshot {
            sectors: self.sectors(),
            write_back: self.0.state().write_back != 0,
        }))
    }

    fn fail(&self, error: &QueueError) {
        self.0.state().failure = Some(error.to_string());
        self.0.interrupt.needs_reset();
    }

    fn failure(&self) -> Option<String> {
        self.0.state().failure.clone()
    }

    fn on_failure(&self, tell: OnFailure) {
        self.0.on_loss.get_or_init(|| tell);
    }
}

impl<M: GuestAddressSpace + Send + Sync + 'static> ConfigSpace for Inner<M> {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut config = self.offer.config;
        config[WRITE_BACK] = self.state().write_back;
        read_config(&config, offset, data);
    }

    /// The only field that a driver can write is `writeback`, which is 0 or 1 (virtio 1.2, 5.2.5.1).
    fn write(&self, offset: u64, data: &[u8]) {
        let [value @ (0 | 1)] = *data else {
            return;
        };
        if offset != WRITE_BACK as u64 || self.offer.features & CONFIG_WRITE_BACK == 0 {
            return;
        }
        let mut state = self.state();
        state.write_back = value;
        // A back end that is not running gets the value at its start.
        let started = state.started;
        let switched = match &mut state.link {
            Some(link) if started => link.set_write_back(value),
            _ => Ok(()),
        };
        if let Err(error) = switched {
            self.lose(&mut state, &error);
        }
    }
}
