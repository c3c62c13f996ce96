//! What files say of names, numbers and paths, checked as if somebody had typed it.
//!
//! A configuration becomes QEMU's command line: what is taken over from a file must not be more than what a user could ask for, and a path
//! in it is never opened (invariant 8).

use crate::plan::check_name;
use crate::root::{check_hardware, mac_of};
use crate::tree::{
    Accel, Boot, Bus, Config, Disk, DiskId, Firmware, Kernel, Machine, Net, NetMode, Publish, Snapshot, State,
};
use std::net::IpAddr;

/// What a machine has of which nothing is known.
pub(super) fn plain() -> Config {
    Config {
        memory: 1 << 30,
        cpus: 1,
        machine_type: None,
        cpu_model: None,
        hpet: false,
        agent: false,
        accel: Accel::default(),
        boot: Boot::default(),
        firmware: Firmware::default(),
        kernel: None,
        cdrom: None,
        net: Net { mode: NetMode::default(), mac: String::new(), publish: Vec::new() },
        disks: Vec::new(),
        borrowed: None,
    }
}

/// A disk of which nothing but its files is known.
pub(super) fn disk(id: &DiskId, size: u64) -> Disk {
    Disk { id: id.clone(), bus: Bus::default(), size }
}

/// `disk0`, `disk1`, …
pub(super) fn is_disk(id: &DiskId) -> bool {
    let number = id.0.strip_prefix("disk").filter(|n| n.len() <= 9 && n.bytes().all(|b| b.is_ascii_digit()));
    number.is_some_and(|n| n == "0" || (!n.is_empty() && !n.starts_with('0')))
}

/// The same, or the firmware's.
pub(super) fn is_known(id: &DiskId) -> bool {
    is_disk(id) || *id == DiskId::firmware()
}

/// A name, or another one.
pub(super) fn name(name: &str, other: &str) -> String {
    let clean: String = name.chars().map(|c| if c == '/' || c == '@' { '-' } else { c }).collect();
    if check_name(&clean).is_ok() { clean } else { other.to_owned() }
}

/// Takes what makes no sense out of a configuration, but for the path in it.
pub(super) fn config(config: &mut Config) {
    if check_hardware(config.memory, config.cpus).is_err() {
        (config.memory, config.cpus) = (plain().memory, plain().cpus);
    }
    let word = |word: &String| {
        word.len() <= 64 && word.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '-' | '.' | '_' | '+'))
    };
    config.machine_type = config.machine_type.take().filter(word);
    config.cpu_model = config.cpu_model.take().filter(word);
    config.kernel = config.kernel.take().filter(in_boot);
    config.net.publish.retain(is_port);
    config.borrowed = config.borrowed.take().filter(|borrowed| is_mac(&borrowed.mac));
    config.disks.retain(|disk| is_disk(&disk.id));
    let mut seen = Vec::new();
    config.disks.retain(|disk| {
        !seen.contains(&disk.id) && {
            seen.push(disk.id.clone());
            true
        }
    });
}

fn is_hex(text: &str) -> bool {
    text.len() == 8 && text.bytes().all(|b| b.is_ascii_hexdigit())
}

/// The names under which a kernel is copied in, and no others.
fn in_boot(kernel: &Kernel) -> bool {
    let is = |name: &str, base: &str| {
        let rest = name.strip_prefix(base);
        rest.is_some_and(|rest| rest.is_empty() || rest.strip_prefix('-').is_some_and(is_hex))
    };
    is(&kernel.kernel, "kernel") && kernel.initrd.as_deref().is_none_or(|initrd| is(initrd, "initrd"))
}

fn is_port(port: &Publish) -> bool {
    port.address.parse::<IpAddr>().is_ok() && port.host != 0 && port.guest != 0
}

/// Takes what makes no sense out of a snapshot's row, but for its configuration.
pub(super) fn snapshot(snapshot: &mut Snapshot) {
    snapshot.name = name(&snapshot.name, "a snapshot");
    snapshot.disks.retain(|disk, _| is_known(disk));
    if !matches!(snapshot.vm_state, State::Off | State::Running | State::Paused | State::Saved) {
        snapshot.vm_state = State::Off;
    }
}

/// Gives the network cards whose address is not known that of the machine.
pub(super) fn network(machine: &mut Machine) {
    let own = mac_of(machine.id);
    let configs = machine.snapshots.values_mut().map(|snapshot| &mut snapshot.config);
    for config in configs.chain(std::iter::once(&mut machine.now.config)).filter(|config| !is_mac(&config.net.mac)) {
        config.net.mac.clone_from(&own);
    }
}

fn is_mac(text: &str) -> bool {
    let parts: Vec<&str> = text.split(':').collect();
    parts.len() == 6 && parts.iter().all(|part| part.len() == 2 && part.bytes().all(|b| b.is_ascii_hexdigit()))
}
