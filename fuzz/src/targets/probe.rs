//! Files of no format and of others': signatures, and raw disks.

use super::disk::{Look, disk, misuse, scribble, to_read};
use super::{outcome, store_of};
use crate::run::MEMORY;
use crate::{File, Input, Random, Target, mutate};
use image::{Format, open};
use store::Mode;

pub(super) const TARGET: Target = Target {
    name: "probe",
    about: "signatures of image formats, and raw files",
    quick: 5000,
    memory: MEMORY,
    seeds,
    mutate: change,
    run,
};

const SIGNATURES: [(u64, &[u8]); 7] = [
    (0, b"vhdxfile"),
    (0, b"QFI\xfb"),
    (0, b"conectix"),
    (0, b"KDMV"),
    (0, b"# Disk DescriptorFile"),
    (64, b"\x7f\x10\xda\xbe"),
    (0, b"conectix"),
];

fn seeds() -> Vec<Input> {
    [0, 1, 511, 512, 513, 5000, 70_000]
        .map(|len: u64| {
            let mut file = File::of(&[3; 600][..len.min(600) as usize]);
            file.set_len(len);
            Input(vec![file])
        })
        .to_vec()
}

fn change(input: &mut Input, random: &mut Random, _: &[Input]) {
    let file = &mut input.0[0];
    for _ in 0..=random.below(3) {
        match random.below(4) {
            0 => {
                let (at, signature) = *random.pick(&SIGNATURES);
                let from_end = file.len().saturating_sub(*random.pick(&[512, 511]));
                let at = if random.one_in(2) { at } else { from_end };
                let part = if random.one_in(6) { random.index(signature.len()) } else { signature.len() };
                file.write(at, &signature[..part]);
            }
            1 => mutate::resize(file, random),
            2 => file.set_len(random.below(1200)),
            _ => mutate::change_bytes(file, random),
        }
    }
}

fn run(input: &Input) -> String {
    let file = &input.0[0];
    let mut words = Vec::new();
    let made = image::raw::create(store_of(&disk(&File::default())), file.len());
    assert_eq!(made.is_ok(), !file.is_empty() && file.len().is_multiple_of(512), "a raw disk of {} bytes", file.len());
    assert!(image::raw::create(store_of(&disk(file)), 512).is_err() || file.is_empty(), "there is something already");
    for format in [None, Some(Format::Raw), Some(Format::Vhdx)] {
        let read = open(store_of(&to_read(file)), format, Mode::Read);
        words.push(outcome(&read));
        let Ok(read) = read else { continue };
        let seen = Look::at(&*read).expect("a raw file is read");
        misuse(&*read);
        let written = open(store_of(&disk(file)), format, Mode::Write).expect("what is read is written");
        assert_eq!(Look::at(&*written).expect("a raw file is read"), seen, "reading and writing see the same");
        scribble(&*written).expect("a raw file takes anything");
        let (size, sector) = (written.info().size, u64::from(written.info().sector_size));
        for size in [0, size + 1, size + sector, sector] {
            assert_eq!(written.resize(size, 0).is_ok(), size != 0 && size.is_multiple_of(sector), "{size} bytes");
        }
        written.close().expect("nothing fails here");
    }
    words.join("; ")
}
