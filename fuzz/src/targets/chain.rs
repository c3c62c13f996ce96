//! A child that names its parent: the gate that says which file may be opened, and the ids that say whether it is the one.
//!
//! Rule beside the limits: no name leads out of the folder (the folder itself checks it).

use super::disk::Look;
use super::{base, firsts, vhd};
use crate::file::{Disk, Shelf};
use crate::run::{MEMORY, words};
use crate::vhdx::settle_ids;
use crate::{File, Input, Random, Target};
use image::gate::{self, Gate};
use image::reconnect::reconnect;
use image::vhdx::Options;
use image::{Format, Layer};
use std::sync::Arc;
use store::{Folder, Mode};

pub(super) const TARGET: Target = Target {
    name: "chain",
    about: "a chain of VHDX files: parent locators, names of parents, ids",
    quick: 3000,
    memory: MEMORY,
    seeds,
    mutate,
    run,
};

/// What the files of an input are called.
const NAMES: [&str; 4] = ["disk.avhdx", "base.vhdx", "other.vhdx", "raw.img"];

fn seeds() -> Vec<Input> {
    let mut all = Vec::new();
    for (size, sector) in [(5 << 20, 512), (5 << 20, 4096), (3 << 20, 512)] {
        let (disk, parent) = base(size, sector);
        let store = Disk::new("disk.avhdx", File::default());
        let options = Options::differencing(&*parent, "base.vhdx").expect("a name");
        let child = image::vhdx::create(Arc::<Disk>::clone(&store), &options).expect("a sound image");
        parent.close().expect("a sound image");
        child.close().expect("a sound image");
        let (mut child, mut parent) = (store.file(), disk.file());
        settle_ids(&mut [&mut child]);
        // Its content's id is settled already, and is in its child.
        let id = parent.array::<16>(0x1_0000 + 32);
        settle_ids(&mut [&mut parent]);
        for at in [0x1_0000, 0x2_0000] {
            parent.write(at + 32, &id);
        }
        crate::vhdx::mend_unless(&mut parent, || false);
        all.push(Input(vec![child.clone(), parent, child, File::of(&[0; 8192])]));
    }
    // A VHD over the same.
    let parent = all[0].0[1].clone();
    let child = vhd::images().into_iter().rfind(|file| file.len() > 4096).expect("a child");
    all.push(Input(vec![child.clone(), parent, child, File::of(&[0; 8192])]));
    all
}

fn mutate(input: &mut Input, random: &mut Random, pool: &[Input]) {
    // Mostly the child's locator.
    let which = if random.one_in(4) { random.index(3) } else { 0 };
    if !crate::vhdx::is_one(&input.0[which]) {
        vhd::change(&mut input.0[which], random, &firsts(pool));
    } else if random.one_in(3) {
        crate::vhdx::mutate(&mut input.0[which], random, &firsts(pool));
    } else {
        crate::vhdx::rename_parent(&mut input.0[which], random);
    }
}

/// The child's parents in a folder that the user has named; then the child told where its parent is, whatever its id says.
fn named(input: &Input) -> String {
    let disks: Vec<_> = input.0.iter().zip(NAMES).map(|(file, name)| Disk::new(name, file.clone())).collect();
    let (first, others) = disks.split_first().expect("a child");
    let folder: Arc<dyn Folder> = Arc::new(Shelf::new([Arc::clone(first)]));
    let gate = Gate::new(vec![Arc::new(Shelf::new(others.iter().map(Arc::clone)))]);
    let _ = gate.has_room(&folder, NAMES[0]);
    let merged = gate.open_to_merge(&folder, NAMES[0], None);
    let found = super::outcome(&merged);
    drop(merged);
    let open = |disk: &Arc<Disk>, mode| image::open(super::store_of(disk), None, mode);
    let (Ok(child), Ok(parent)) = (open(first, Mode::Write), open(&others[0], Mode::Read)) else { return found };
    match reconnect(&*child, &*parent, NAMES[1], true) {
        Ok(before) => {
            gate::check_link(&*child, &*parent).expect("it was told that this is its parent");
            // A VHD has no place for it.
            let seen = child.info().format != Format::Vhdx || child.forced().is_some();
            assert!(before.fits || seen, "that it was forced is not to be seen");
            assert_eq!(gate::parent_name(&child.info().parent.expect("it has one")).as_deref(), Ok(NAMES[1]));
            format!("{found}; fits {}", before.fits)
        }
        Err(error) => format!("{found}; {}", words(&error.to_string())),
    }
}

fn run(input: &Input) -> String {
    format!("{} | {}", beside(input), named(input))
}

/// All files in one folder.
fn beside(input: &Input) -> String {
    let disks = input.0.iter().zip(NAMES).map(|(file, name)| Disk::to_read(name, file.clone()));
    let folder: Arc<dyn Folder> = Arc::new(Shelf::new(disks));
    match gate::open_chain(&folder, NAMES[0], Mode::Read) {
        Ok(layers) => {
            let looks: Vec<_> = layers.iter().map(|layer| Look::at(&**layer).is_ok()).collect();
            format!("{} layers {looks:?}", layers.len())
        }
        Err(error) => words(&error.to_string()),
    }
}
