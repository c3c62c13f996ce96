//! Rows to try things on.

use jiff::Timestamp;
use machine::plan::Take;
use machine::request::{Job, JobState};
use machine::table::Table;
use machine::tree::{
    Accel, Boot, Bus, Config, Disk, DiskId, Firmware, JobId, LayerFormat, LayerId, LayerKind, LayerRow, Machine,
    MachineId, Net, NetMode, Now, Policy, SnapshotId, SnapshotState, State,
};
use memory::stream::{Block, DeviceState, Emitter, PAGE};
use std::collections::BTreeMap;

/// A machine with this many disks, off, never snapped.
pub(crate) fn machine(disks: u32) -> Machine {
    let mut machine = Machine {
        id: MachineId::new(),
        name: "lab".to_owned(),
        note: "for trying things".to_owned(),
        created: Timestamp::UNIX_EPOCH,
        policy: Policy::default(),
        next_disk: disks,
        now: Now {
            parent: None,
            under: None,
            state: State::Off,
            config: config(disks),
            disks: BTreeMap::new(),
            memory: None,
            memory_base: None,
            restoring: None,
            touched: false,
            generation: uuid::Uuid::nil(),
            run: None,
        },
        snapshots: Table::default(),
        trash: Table::default(),
        layers: Table::default(),
    };
    for disk in machine.now.config.disks.clone() {
        let row = layer(LayerKind::Disk, None);
        machine.now.disks.insert(disk.id, row.id);
        machine.layers.insert(row.id, row);
    }
    machine
}

fn config(disks: u32) -> Config {
    let disk = |n| Disk { id: DiskId(format!("disk{n}")), bus: Bus::Virtio, size: 1 << 30 };
    Config {
        memory: 512 << 20,
        cpus: 2,
        machine_type: Some("pc-q35-7.2".to_owned()),
        cpu_model: Some("qemu64".to_owned()),
        hpet: false,
        agent: true,
        accel: Accel::Auto,
        boot: Boot::Disk,
        firmware: Firmware::Bios,
        kernel: None,
        cdrom: None,
        net: Net { mode: NetMode::User, mac: "52:54:00:12:34:56".to_owned(), publish: Vec::new() },
        disks: (0..disks).map(disk).collect(),
        borrowed: None,
    }
}

/// A new layer's row.
pub(crate) fn layer(kind: LayerKind, parent: Option<LayerId>) -> LayerRow {
    let id = LayerId::new();
    let file = if kind == LayerKind::Disk { format!("disks/{id}.avhdx") } else { format!("memory/{id}.avhdx") };
    LayerRow {
        id,
        kind,
        file,
        in_place: false,
        format: LayerFormat::Vhdx,
        parent,
        created: Timestamp::UNIX_EPOCH,
        folded: None,
        taken_on: None,
    }
}

/// Fresh leaves over these layers.
pub(crate) fn leaves(disks: &BTreeMap<DiskId, LayerId>) -> Vec<(DiskId, LayerRow)> {
    disks.iter().map(|(disk, id)| (disk.clone(), layer(LayerKind::Disk, Some(*id)))).collect()
}

/// A snapshot to be taken of a machine that is off.
pub(crate) fn take(name: &str) -> Take {
    Take {
        id: SnapshotId::new(),
        name: name.to_owned(),
        note: String::new(),
        created: Timestamp::UNIX_EPOCH,
        vm_state: State::Off,
        memory: None,
        state: SnapshotState::Ready,
    }
}

/// A job that was started at this second.
pub(crate) fn job(second: i64, state: JobState) -> Job {
    Job {
        id: JobId::new(),
        vm: "lab".to_owned(),
        kind: "snapshot".to_owned(),
        state,
        percent: 0,
        bytes_done: 0,
        bytes_total: 0,
        eta: None,
        reason: None,
        warnings: Vec::new(),
        error: None,
        result: None,
        started: Timestamp::from_second(second).expect("a time"),
        ended: None,
    }
}

/// A guest's memory as QEMU would send it: a number for each page, 0 for zeros.
pub(crate) fn ram(ram: &[u32]) -> Vec<u8> {
    let blocks = [Block { name: "pc.ram".to_owned(), len: (ram.len() * PAGE) as u64 }];
    let (mut emitter, mut out) = (Emitter::new(2, &blocks), Vec::new());
    Emitter::prelude(&mut out, "pc-q35-7.2");
    emitter.start(&mut out);
    emitter.open_end(&mut out);
    for (page, version) in ram.iter().enumerate() {
        match version {
            0 => emitter.zero_page(&mut out, 0, (page * PAGE) as u64),
            version => emitter.page(&mut out, 0, (page * PAGE) as u64, &version.to_le_bytes().repeat(PAGE / 4)),
        }
    }
    emitter.close(&mut out);
    Emitter::finish(&mut out, &DeviceState { state: vec![4, 1, 2, 3], description: br#"{"devices":[]}"#.to_vec() });
    out
}
