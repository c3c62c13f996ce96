//! UEFI, as far as it needs no guest: machines that are off, with firmware that nobody could boot.

mod place;

use place::{Ended, Place, content};
use serde_json::Value;
use std::path::PathBuf;

/// What stands for the firmware's files, in a place with nothing else.
fn place(code: &[u8], variables: &[u8]) -> Place {
    let place = Place::new();
    std::fs::create_dir(place.path("ovmf")).unwrap();
    std::fs::write(place.path("ovmf/OVMF_CODE_4M.fd"), code).unwrap();
    std::fs::write(place.path("ovmf/OVMF_VARS_4M.fd"), variables).unwrap();
    place
}

/// A firmware volume of so many bytes, as its head says.
fn volume(len: usize) -> Vec<u8> {
    let mut volume: Vec<u8> = (0..len).map(|at| (at / 256) as u8).collect();
    volume[40..44].copy_from_slice(b"_FVH");
    volume
}

/// The variables of OVMF are as many: no whole number of MiB, nor of any image's blocks.
const VARIABLES: usize = 540_672;

fn good() -> Place {
    place(&volume(16 << 10), &volume(VARIABLES))
}

fn tenby(place: &Place, words: &[&str]) -> Ended {
    place.command(words).env("TENBY_OVMF", place.path("ovmf")).output().unwrap().into()
}

fn create(place: &Place) -> Ended {
    tenby(place, &["vm", "create", "web", "--firmware", "uefi", "--memory", "64M", "--disk", "new:8M"])
}

fn folder(place: &Place) -> PathBuf {
    place.root().join(place.machine("web")["id"].as_str().unwrap().replace('-', ""))
}

/// What the file that holds the present's variables reads as.
fn variables(place: &Place) -> String {
    let file = place.machine("web")["variables"]["file"].as_str().unwrap().to_owned();
    place.tenby(&["disk", "hash", &file, "--json"]).well().json()["sha256"].as_str().unwrap().to_owned()
}

#[test]
fn a_machine_keeps_its_own_firmware() {
    let place = good();
    create(&place).well();
    let raw = place.path("ovmf/OVMF_VARS_4M.fd");
    let (code, sum) = (std::fs::read(place.path("ovmf/OVMF_CODE_4M.fd")).unwrap(), |file: &str| {
        place.tenby(&["disk", "hash", file, "--from", "raw", "--json"]).well().json()["sha256"].clone()
    });
    let before = sum(&raw);
    // Whatever becomes of the package.
    std::fs::remove_file(&raw).unwrap();
    assert_eq!(std::fs::read(folder(&place).join("boot/firmware")).unwrap(), code);
    assert_eq!(before, variables(&place).as_str());

    let machine = place.machine("web");
    assert_eq!(machine["config"]["firmware"], "uefi");
    let ids: Vec<&Value> = machine["disks"].as_array().unwrap().iter().map(|disk| &disk["id"]).collect();
    assert_eq!(ids, ["disk0"]);
    let shown = place.tenby(&["vm", "show", "web"]).well().out;
    let line = shown
        .lines()
        .find(|line| line.starts_with("  firmware  uefi, variables "))
        .unwrap_or_else(|| panic!("{shown}"));
    assert!(line.ends_with(machine["variables"]["file"].as_str().unwrap()), "{line}");

    place.tenby(&["snapshot", "create", "web", "Monday"]).well();
    place.tenby(&["snapshot", "create", "web", "Tuesday"]).well();
    let tree = place.tree("web");
    let monday = &tree["snapshots"][0];
    assert_eq!(monday["disks"].as_array().unwrap().len(), 1);
    assert!(monday["disk_bytes"].as_u64() >= Some(VARIABLES as u64), "they count: {monday}");
    assert!(place.tenby(&["snapshot", "show", "web", "Monday"]).well().out.contains(", UEFI"));
    assert_eq!(place.machine("web")["variables"]["depth"], 3);
    assert_eq!(variables(&place), before);

    // They are no disk of the guest's.
    place.tenby(&["vm", "set", "web", "--remove-disk", "firmware"]).with(4);
    place.tenby(&["vm", "set", "web", "--grow-disk", "firmware=1M"]).with(4);
    place.tenby(&["vm", "set", "web", "--add-disk", "new:8M", "--remove-disk", "disk0"]).well();
    place.tenby(&["snapshot", "apply", "web", "Monday", "--discard"]).well();
    assert_eq!(place.machine("web")["disks"][0]["id"], "disk0");
    place.tenby(&["snapshot", "delete", "web", "Monday", "--subtree", "--wait"]).well();
    assert_eq!(place.machine("web")["variables"]["depth"], 1);
    assert_eq!(variables(&place), before);
    assert_eq!(place.tenby(&["vm", "check", "web", "--json"]).well().json()["clean"], true);
    place.tenby(&["vm", "delete", "web", "--yes"]).well();
}

#[test]
fn a_machine_with_a_bios_needs_none() {
    let place = Place::with_machine("web");
    let machine = place.machine("web");
    assert_eq!((&machine["config"]["firmware"], &machine["variables"]), (&Value::from("bios"), &Value::Null));
    assert!(place.tenby(&["vm", "show", "web"]).well().out.contains("\n  firmware  bios\n"));
}

#[test]
fn firmware_that_is_missing_or_none_is_refused() {
    let missing = Place::new();
    let refusal = create(&missing).with(1);
    assert!(refusal.err.contains("OVMF_CODE_4M.fd is missing"), "{refusal:?}");
    assert!(refusal.err.contains("hint: apt-get install ovmf\n"), "{refusal:?}");
    let doctor = tenby(&missing, &["doctor", "--json"]).json();
    let uefi = doctor["checks"].as_array().unwrap().iter().find(|check| check["what"] == "UEFI").unwrap().clone();
    assert!(uefi["ok"] == false && uefi["cost"].as_str().unwrap().contains("apt-get install ovmf"), "{uefi}");

    let of = |code: &[u8], variables: &[u8], words: &str| {
        let place = place(code, variables);
        let refusal = create(&place).with(5);
        assert!(refusal.err.contains(words), "{refusal:?}");
        assert_eq!(place.tenby(&["vm", "list", "--json"]).well().json()["vms"], Value::Array(Vec::new()));
        assert!(content(&place.root()).iter().all(|(file, _)| file.ends_with("lock")), "nothing was made");
    };
    of(&volume(16 << 10), &volume(VARIABLES + 512), "OVMF_VARS_4M.fd is no UEFI firmware: it has 541184 bytes");
    of(&volume(16 << 10), &[], "OVMF_VARS_4M.fd is no UEFI firmware: it has 0 bytes");
    of(&[7; 8192], &volume(VARIABLES), "OVMF_CODE_4M.fd is no UEFI firmware: it does not begin");
    of(&volume(8 << 20), &volume(4096), "more than 8M of flash memory");
}

/// What is shown, but for the sizes of files: those grow by what is written into them of themselves, in its own time.
fn but_for_bytes(shown: &Value) -> Value {
    match shown {
        Value::Array(all) => all.iter().map(but_for_bytes).collect(),
        Value::Object(all) => {
            let lasting = all.iter().filter(|(name, _)| !name.ends_with("bytes"));
            Value::Object(lasting.map(|(name, value)| (name.clone(), but_for_bytes(value))).collect())
        }
        other => other.clone(),
    }
}

#[test]
fn a_rescue_brings_it_back() {
    let place = good();
    create(&place).well();
    place.tenby(&["snapshot", "create", "web", "Monday"]).well();
    let (folder, machine, tree) = (folder(&place), place.machine("web"), place.tree("web"));
    let rescue = |words: &str| {
        // It waits for the worker, if there is one.
        tenby(&place, &["vm", "rescue", folder.to_str().unwrap()]).with(3);
        std::fs::remove_file(folder.join("ledger")).unwrap();
        let rescued = tenby(&place, &["vm", "rescue", folder.to_str().unwrap()]).well();
        assert!(rescued.out.contains(words), "{rescued:?}");
        assert_eq!(place.tenby(&["vm", "check", "web", "--json"]).well().json()["clean"], true);
        rescued.out
    };
    let out = rescue("Monday");
    assert!(!out.contains("- "), "nothing is lost: {out}");
    let again = place.machine("web");
    for field in ["config", "disks", "variables"] {
        assert_eq!(but_for_bytes(&again[field]), but_for_bytes(&machine[field]));
    }
    assert_eq!(but_for_bytes(&place.tree("web")["snapshots"]), but_for_bytes(&tree["snapshots"]));

    // What the UEFI keeps is lost, the code too: they can be had again, what was in them cannot.
    std::fs::remove_file(folder.join("boot/firmware")).unwrap();
    let machine = &place.tenby(&["vm", "ledger", "web", "--json"]).well().json()["machine"];
    let monday = machine["snapshots"].as_object().unwrap().values().next().unwrap();
    for layer in [&machine["now"]["disks"]["firmware"], &monday["disks"]["firmware"]] {
        let file = machine["layers"][layer.as_str().unwrap()]["file"].as_str().unwrap();
        std::fs::remove_file(folder.join(file)).unwrap();
    }
    let out = rescue("Monday: what its UEFI knew is lost");
    assert!(out.contains("boot/firmware: it is not there"), "{out}");
    let machine = place.machine("web");
    assert_eq!(machine["config"]["firmware"], "uefi");
    assert_eq!(place.names("web")[0], "Monday");
    place.tenby(&["snapshot", "apply", "web", "Monday", "--discard"]).well();
}
