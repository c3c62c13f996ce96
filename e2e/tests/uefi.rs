//! What a machine's UEFI keeps is snapped and brought back with the rest.

use e2e::{BASE, Lab, Witness, qemu_10, qemu_72, wait_for};
use std::path::PathBuf;

/// A boot entry that no firmware makes by itself.
const ENTRY: &str = "/sys/firmware/efi/efivars/Boot0042-8be4df61-93ca-11d2-aa0d-00e098032b8c";

/// A boot entry as the guest's kernel takes it: what kind of variable it is, and a load option that is called like this and leads nowhere.
fn entry(name: &str) -> Vec<u8> {
    const LASTING: [u8; 4] = [7, 0, 0, 0];
    const ACTIVE: [u8; 4] = [1, 0, 0, 0];
    const END: [u8; 4] = [0x7f, 0xff, 4, 0];
    let description: Vec<u8> = name.encode_utf16().chain([0]).flat_map(u16::to_le_bytes).collect();
    [&LASTING[..], &ACTIVE, &(END.len() as u16).to_le_bytes(), &description, &END].concat()
}

#[track_caller]
fn shell(witness: &mut Witness, command: &str) -> String {
    let done = witness.ask(&format!("sh {command}"));
    assert_eq!(done["status"], 0, "{command}: {done}");
    done["stdout"].as_str().expect("text").to_owned()
}

#[track_caller]
fn set_entry(witness: &mut Witness, name: &str) {
    let escaped: Vec<String> = entry(name).iter().map(|byte| format!("\\{byte:03o}")).collect();
    shell(witness, &format!("printf '{}' > {ENTRY}", escaped.concat()));
    assert_entry(witness, name);
}

#[track_caller]
fn assert_entry(witness: &mut Witness, name: &str) {
    let hex: Vec<String> = entry(name).iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(shell(witness, &format!("hexdump -v -e '1/1 \"%02x\"' {ENTRY}")), hex.concat(), "the entry {name}");
    witness.prove();
}

fn boot_entries(qemu: PathBuf) {
    let lab = Lab::empty().on_qemu(qemu);
    lab.create_uefi_guest(BASE);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    let nonce = witness.resync()["nonce"].clone();
    set_entry(&mut witness, "Monday");
    lab.snapshot("Monday");
    assert_entry(&mut witness, "Monday");
    set_entry(&mut witness, "Tuesday");

    // With memory: the guest goes on, and what it asks its firmware is what it was.
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--keep-as", "Tuesday"]);
    assert_eq!(witness.resync()["nonce"], nonce);
    assert_entry(&mut witness, "Monday");
    lab.ok(&["snapshot", "apply", BASE, "Tuesday", "--discard"]);
    assert_eq!(witness.resync()["nonce"], nonce);
    assert_entry(&mut witness, "Tuesday");

    // Without: the firmware begins anew, with what the disk says.
    lab.ok(&["snapshot", "apply", BASE, "Monday", "--discard", "--no-memory", "--start"]);
    let mut witness = lab.witness(BASE);
    let second = witness.resync()["nonce"].clone();
    assert_ne!(second, nonce);
    assert_entry(&mut witness, "Monday");

    // It is saved and merged like any other disk.
    set_entry(&mut witness, "Wednesday");
    lab.ok(&["vm", "save", BASE]);
    lab.ok(&["vm", "start", BASE]);
    let mut witness = lab.witness(BASE);
    assert_eq!(witness.resync()["nonce"], second);
    // Another worker serves it, too.
    lab.kill_worker();
    lab.ok(&["vm", "pause", BASE]);
    lab.ok(&["vm", "resume", BASE]);
    witness.resync();
    assert_entry(&mut witness, "Wednesday");
    set_entry(&mut witness, "Thursday");
    lab.ok(&["snapshot", "delete", BASE, "Monday", "--subtree", "--wait"]);
    assert_entry(&mut witness, "Thursday");
    lab.settle();
    assert_eq!(lab.json(&["vm", "show", BASE])["variables"]["depth"], 1);
    lab.assert_tidy();
    lab.ok(&["vm", "restart", BASE]);
    wait_for("another boot", || (witness.resync()["nonce"] != second).then_some(()));
    assert_entry(&mut witness, "Thursday");
    lab.ok(&["vm", "stop", BASE]);
    assert_eq!(lab.json(&["vm", "check", BASE])["clean"], true);
}

#[test]
fn boot_entries_on_qemu_7_2() {
    boot_entries(qemu_72());
}

#[test]
fn boot_entries_on_qemu_10_0() {
    boot_entries(qemu_10());
}
