//! Saves and restores the state that KVM keeps: vCPUs, interrupt controllers and clocks.

use super::{EmptyMachine, MachineError, Paused, Result, sections};
use crate::kvm::state::{self, KvmStateError, MachineState, Restored, VcpuState};
use crate::kvm::time::MachineTime;
use migration::Section;

impl Paused {
    /// Saves the state of vCPUs, controllers and clocks, one section each.
    pub(super) fn save_kvm(&self) -> Result<Vec<Section>> {
        let msr_indices =
            state::msr_indices(self.host.kvm()).map_err(state_error(sections::MACHINE))?;
        let mut saved = Vec::new();
        for (index, gate) in self.gates().enumerate() {
            let name = sections::of_vcpu(index);
            let state = VcpuState::save(&gate.fd(), &msr_indices).map_err(state_error(&name))?;
            saved.push(sections::encode(&name, &state));
        }
        let machine = MachineState::save(&self.vm).map_err(state_error(sections::MACHINE))?;
        saved.push(sections::encode(sections::MACHINE, &machine));
        let vcpus: Vec<_> = self.gates().map(|gate| gate.fd()).collect();
        let time = MachineTime::save(&self.vm, &vcpus).map_err(state_error(sections::TIME))?;
        saved.push(sections::encode(sections::TIME, &time));
        Ok(saved)
    }
}

impl EmptyMachine {
    /// Restores vCPUs, controllers and clocks: first the CPUID, then the clocks, then the state that depends on both.
    /// Returns the names of the model-specific registers that KVM refused.
    pub(super) fn restore_kvm(&self, saved: &[Section]) -> Result<Vec<String>> {
        let names: Vec<String> = (0..self.vcpus.len()).map(sections::of_vcpu).collect();
        let states = names
            .iter()
            .map(|name| sections::decode(saved, name))
            .collect::<Result<Vec<VcpuState>>>()?;
        for ((name, state), vcpu) in names.iter().zip(&states).zip(&self.vcpus) {
            state.prepare(vcpu).map_err(state_error(name))?;
        }
        let time: MachineTime = sections::decode(saved, sections::TIME)?;
        if time.tsc.len() != self.vcpus.len() {
            return Err(MachineError::Section {
                section: sections::TIME.into(),
                why: format!("{} counters for {} vCPUs", time.tsc.len(), self.vcpus.len()),
            });
        }
        let restored = time.restore(&self.vm, &self.vcpus);
        let mut left_out = refused(
            sections::TIME,
            &restored.map_err(state_error(sections::TIME))?,
        );
        let machine: MachineState = sections::decode(saved, sections::MACHINE)?;
        machine
            .restore(&self.vm)
            .map_err(state_error(sections::MACHINE))?;
        for ((name, state), vcpu) in names.iter().zip(&states).zip(&self.vcpus) {
            let restored = state.restore(vcpu).map_err(state_error(name))?;
            left_out.extend(refused(name, &restored));
        }
        Ok(left_out)
    }
}

fn state_error(section: &str) -> impl Fn(KvmStateError) -> MachineError {
    let section = section.to_owned();
    move |source| MachineError::State {
        section: section.clone(),
        source,
    }
}

/// Returns the names of the registers that KVM refused.
fn refused(section: &str, restored: &Restored) -> Vec<String> {
    let refused = restored.refused_msrs.iter();
    refused
        .map(|msr| format!("{section} MSR {msr:#x}"))
        .collect()
}
