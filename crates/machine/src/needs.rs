//! What a guest's memory needs of the host that it is to go on upon, beside what is here.
//!
//! A captured guest goes on as the machine that it was: of one machine type, on a processor that runs as its own did and can do all that it
//! could. What is certain to be missing is said before anything is done. Whether this QEMU can load what another version has written, it
//! alone knows; it says so before the old machine is given up.

use crate::tree::{Accel, Config, Now, TakenOn};
use qemu::Installed;
use std::collections::BTreeSet;

/// The CPU model that is whatever the host's is.
const HOST_MODEL: &str = "host";

/// What is here.
#[derive(Debug)]
pub(crate) struct Here<'a> {
    installed: &'a Installed,
    /// Whether KVM can be used, or why not.
    kvm: Result<(), String>,
    features: BTreeSet<String>,
}

impl<'a> Here<'a> {
    /// Looks.
    pub(crate) fn look(installed: &'a Installed) -> Self {
        Self { installed, kvm: qemu::kvm(), features: qemu::processor_features() }
    }

    /// What a memory needs that is not here, in words that follow on what it is called; `None` if all is.
    pub(crate) fn lacks(&self, config: &Config, taken_on: Option<&TakenOn>) -> Option<String> {
        let writer = taken_on.map(|on| format!("; QEMU {} has written it", on.qemu)).unwrap_or_default();
        let kind = config.machine_type.as_deref().filter(|kind| self.installed.check_machine_type(kind).is_err());
        if let Some(kind) = kind {
            let (version, binary) = (&self.installed.version, self.installed.binary.display());
            return Some(format!("is of a {kind}, which QEMU {version} ({binary}) does not have{writer}"));
        }
        if accel(config, taken_on) != Some(Accel::Kvm) {
            return None;
        }
        if let Err(why) = &self.kvm {
            return Some(format!("was taken with KVM, which cannot be used here: {why}"));
        }
        let missing: Vec<&str> = taken_on?.features.difference(&self.features).map(String::as_str).collect();
        (!missing.is_empty())
            .then(|| format!("was taken on a processor with {}, which this host's has not", missing.join(", ")))
    }
}

/// By what a memory's guest ran, if that is known.
pub(crate) fn accel(config: &Config, taken_on: Option<&TakenOn>) -> Option<Accel> {
    let by_model = || (config.cpu_model.as_deref() == Some(HOST_MODEL)).then_some(Accel::Kvm);
    taken_on.map(|on| on.accel).or_else(by_model)
}

/// The CPU model under this accelerator: the pinned one, but that of the host is only to be had with KVM.
pub(crate) fn cpu_model(config: &Config, accel: qemu::Accel) -> &str {
    let pinned = config.cpu_model.as_deref();
    pinned.filter(|model| *model != HOST_MODEL || accel == qemu::Accel::Kvm).unwrap_or(qemu::cpu_model(accel))
}

/// On what the guest of Now runs, at this moment.
pub(crate) fn taken_on(now: &Now, qemu: &qemu::Version, kvm: bool) -> TakenOn {
    let config = &now.config;
    let as_it_is = kvm && config.cpu_model.as_deref() == Some(HOST_MODEL);
    TakenOn {
        qemu: qemu.to_string(),
        accel: if kvm { Accel::Kvm } else { Accel::Tcg },
        features: if as_it_is { qemu::processor_features() } else { BTreeSet::new() },
        at: jiff::Timestamp::now(),
        behind_ms: now.run.as_ref().and_then(|run| run.clock.as_ref()).map_or(0, |clock| clock.behind_ms),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::tree::{Boot, Firmware, Net, NetMode};

    fn config(machine_type: &str, cpu_model: &str) -> Config {
        Config {
            memory: 1 << 30,
            cpus: 1,
            machine_type: Some(machine_type.to_owned()),
            cpu_model: Some(cpu_model.to_owned()),
            hpet: false,
            agent: true,
            accel: Accel::Auto,
            boot: Boot::Disk,
            firmware: Firmware::Bios,
            kernel: None,
            cdrom: None,
            net: Net { mode: NetMode::None, mac: String::new(), publish: Vec::new() },
            disks: Vec::new(),
            borrowed: None,
        }
    }

    /// A row that is older than the question does not say what its memory holds.
    #[test]
    fn an_older_machine_has_an_hpet_and_no_port_for_an_agent() {
        let new = config("pc-q35-7.2", "Nehalem");
        let mut row = serde_json::to_value(&new).expect("a row");
        assert_eq!(serde_json::from_value::<Config>(row.clone()).expect("it is read"), new);
        row.as_object_mut().expect("a row").retain(|name, _| name != "hpet" && name != "agent");
        let old: Config = serde_json::from_value(row).expect("it is read");
        assert_eq!(old, Config { hpet: true, agent: false, ..new });
    }

    fn on(accel: Accel, features: &[&str]) -> TakenOn {
        let features = features.iter().map(|&feature| feature.to_owned()).collect();
        TakenOn { qemu: "10.0.2".to_owned(), accel, features, at: jiff::Timestamp::UNIX_EPOCH, behind_ms: 0 }
    }

    #[test]
    fn what_differs_is_named() {
        let installed = Installed {
            binary: "/usr/bin/qemu".into(),
            version: "7.2.22".to_owned(),
            machine_types: vec!["pc-q35-7.2".to_owned()],
        };
        let here = |kvm: Result<(), &str>| Here {
            installed: &installed,
            kvm: kvm.map_err(str::to_owned),
            features: ["avx2", "fpu"].map(str::to_owned).into(),
        };
        let lacks = |kvm, kind, model, on: Option<TakenOn>| here(kvm).lacks(&config(kind, model), on.as_ref());
        let none: Result<(), &str> = Err("no vmx");

        assert_eq!(lacks(none, "pc-q35-7.2", "Nehalem", Some(on(Accel::Tcg, &[]))), None);
        assert_eq!(lacks(Ok(()), "pc-q35-7.2", "host", Some(on(Accel::Kvm, &["fpu"]))), None);
        // What is not known is not refused.
        assert_eq!(lacks(none, "pc-q35-7.2", "Nehalem", None), None);
        assert_eq!(
            lacks(none, "pc-q35-10.0", "Nehalem", Some(on(Accel::Tcg, &[]))).as_deref(),
            Some("is of a pc-q35-10.0, which QEMU 7.2.22 (/usr/bin/qemu) does not have; QEMU 10.0.2 has written it")
        );
        let by_kvm = Some("was taken with KVM, which cannot be used here: no vmx");
        assert_eq!(lacks(none, "pc-q35-7.2", "Nehalem", Some(on(Accel::Kvm, &[]))).as_deref(), by_kvm);
        assert_eq!(lacks(none, "pc-q35-7.2", "host", None).as_deref(), by_kvm);
        assert_eq!(
            lacks(Ok(()), "pc-q35-7.2", "host", Some(on(Accel::Kvm, &["fpu", "sha_ni", "avx512f"]))).as_deref(),
            Some("was taken on a processor with avx512f, sha_ni, which this host's has not")
        );
    }

    #[test]
    fn the_hosts_own_model_is_kvms() {
        let model = |pinned, accel| cpu_model(&config("pc-q35-7.2", pinned), accel).to_owned();
        assert_eq!(model("host", qemu::Accel::Kvm), "host");
        assert_eq!(model("host", qemu::Accel::Tcg), qemu::cpu_model(qemu::Accel::Tcg));
        assert_eq!(model("Nehalem", qemu::Accel::Kvm), "Nehalem");
    }
}
