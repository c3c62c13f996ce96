//! What a QEMU has said of itself, in a file: each worker is a process of its own, and would ask it anew.
//!
//! A note is of one program, as its file was, in one life of the host. What is not just that is none: it is asked again, and noted again.

use super::{Installed, Stamped, machine_version};
use rustix::fs::{Mode, OFlags, open};
use serde::{Deserialize, Serialize};
use std::io::{Read, Result, Write};
use std::path::{Path, PathBuf};

/// No note is longer, bytes.
const LONGEST: u64 = 1 << 16;

/// What programs begin with; a script runs another program, and does not change when that does.
const ELF: [u8; 4] = *b"\x7fELF";

#[derive(Serialize, Deserialize)]
struct Note {
    /// The host's, from its start to its end.
    life: String,
    stamp: Stamped,
    binary: PathBuf,
    version: String,
    machine_types: Vec<String>,
}

/// What `file` says of this program, if it says anything that can be trusted.
pub(super) fn read(file: &Path, binary: &Path, stamp: Stamped) -> Option<Installed> {
    let note: Note = serde_json::from_slice(&read_own(file)?).ok()?;
    let is_of_it = note.life == life()? && note.stamp == stamp && note.binary == binary;
    let makes_sense = note.version.starts_with(|c: char| c.is_ascii_digit())
        && note.machine_types.iter().all(|name| machine_version(name).is_some());
    let Note { binary, version, machine_types, .. } = note;
    (is_of_it && makes_sense).then_some(Installed { binary, version, machine_types })
}

/// Notes what a program has said. Nobody needs it: it only saves time.
pub(super) fn write(file: &Path, installed: &Installed, stamp: Stamped) {
    let Installed { binary, version, machine_types } = installed.clone();
    let Some(life) = life().filter(|_| is_program(&binary)) else { return };
    let note = Note { life, stamp, binary, version, machine_types };
    let noted = serde_json::to_vec(&note).map_err(Into::into).and_then(|text| put(file, &text));
    if let Err(error) = noted {
        tracing::debug!("{}: {error}", file.display());
    }
}

/// Nobody sees it half-written. Workers that are started side by side write it at the same time: each a file of its own, and the last one stays.
fn put(file: &Path, text: &[u8]) -> Result<()> {
    let new = file.with_extension(format!("{}.new", std::process::id()));
    // Left by a process of the same number.
    let _ = std::fs::remove_file(&new);
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let mut store = std::fs::File::from(open(&new, flags, Mode::RUSR | Mode::WUSR)?);
    store.write_all(text)?;
    std::fs::rename(new, file)
}

/// A file that nobody else could have written.
fn read_own(file: &Path) -> Option<Vec<u8>> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file = open(file, flags, Mode::empty()).ok()?;
    let stat = rustix::fs::fstat(&file).ok()?;
    let others = Mode::from_raw_mode(stat.st_mode) & (Mode::WGRP | Mode::WOTH);
    if stat.st_uid != rustix::process::geteuid().as_raw() || !others.is_empty() {
        return None;
    }
    let mut text = Vec::new();
    std::fs::File::from(file).take(LONGEST).read_to_end(&mut text).ok()?;
    Some(text)
}

fn is_program(binary: &Path) -> bool {
    let mut start = [0; ELF.len()];
    std::fs::File::open(binary).and_then(|mut file| file.read_exact(&mut start)).is_ok() && start == ELF
}

fn life() -> Option<String> {
    super::read("/proc/sys/kernel/random/boot_id", 64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt;

    /// A note of this very test, which is a program, as if it were a QEMU.
    fn noted() -> (tempfile::TempDir, PathBuf, Installed, Stamped) {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let (file, binary) = (folder.path().join("qemu"), std::env::current_exe().expect("a program"));
        let stamp = Stamped::of(&binary).expect("it is there");
        let types = vec!["pc-q35-10.0".to_owned(), "pc-q35-9.2".to_owned()];
        let installed = Installed { binary, version: "10.0.2".into(), machine_types: types };
        write(&file, &installed, stamp);
        assert_eq!(read(&file, &installed.binary, stamp).as_ref(), Some(&installed));
        (folder, file, installed, stamp)
    }

    #[test]
    fn a_note_of_another_program_is_none() {
        let (_folder, file, Installed { binary, .. }, stamp) = noted();
        assert_eq!(read(&file, Path::new("/usr/bin/other"), stamp), None);
        let others = [
            Stamped { inode: (stamp.inode.0, stamp.inode.1 + 1), ..stamp },
            Stamped { len: stamp.len + 1, ..stamp },
            Stamped { modified: (stamp.modified.0, stamp.modified.1 + 1), ..stamp },
        ];
        for other in others {
            assert_eq!(read(&file, &binary, other), None, "{other:?}");
        }
        let text = std::fs::read_to_string(&file).expect("the note");
        let life = life().expect("this life");
        let before = text.replace(life.trim(), "00000000-0000-0000-0000-000000000000");
        assert_ne!(before, text);
        std::fs::write(&file, before).expect("an earlier life");
        assert_eq!(read(&file, &binary, stamp), None);
    }

    #[test]
    fn a_damaged_note_is_none() {
        let (_folder, file, installed, stamp) = noted();
        let text = std::fs::read(&file).expect("the note");
        for cut in 0..text.len() {
            std::fs::write(&file, &text[..cut]).expect("a note cut off");
            assert_eq!(read(&file, &installed.binary, stamp), None, "after {cut} bytes");
        }
        let text = String::from_utf8(text).expect("text");
        for (from, to) in [("10.0.2", ""), ("pc-q35-9.2", "pc-q35-nine"), ("pc-q35-9.2", "microvm"), ("}", "}}")] {
            std::fs::write(&file, text.replacen(from, to, 1)).expect("another note");
            assert_eq!(read(&file, &installed.binary, stamp), None, "{to}");
        }
        // It is mended by the next that asks.
        write(&file, &installed, stamp);
        assert_eq!(read(&file, &installed.binary, stamp), Some(installed));
    }

    #[test]
    fn a_note_that_others_could_have_written_is_none() {
        let (folder, file, Installed { binary, .. }, stamp) = noted();
        let mode = |mode| std::fs::set_permissions(&file, PermissionsExt::from_mode(mode)).expect("it is ours");
        assert_eq!(std::fs::metadata(&file).expect("it is there").permissions().mode() & 0o777, 0o600);
        mode(0o620);
        assert_eq!(read(&file, &binary, stamp), None);
        mode(0o600);
        let link = folder.path().join("link");
        std::os::unix::fs::symlink(&file, &link).expect("a link");
        assert_eq!(read(&link, &binary, stamp), None);
        assert!(read(&file, &binary, stamp).is_some());
    }

    #[test]
    fn a_script_is_asked_each_time() {
        let (folder, file, mut installed, _) = noted();
        installed.binary = folder.path().join("script");
        std::fs::write(&installed.binary, "#!/bin/sh\nexec qemu-system-x86_64 \"$@\"\n").expect("a script");
        let stamp = Stamped::of(&installed.binary).expect("it is there");
        write(&file, &installed, stamp);
        assert_eq!(read(&file, &installed.binary, stamp), None);
    }
}
